"""Metrics stay on the device, are reduced together and read late; a step that is not finite is skipped there."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.backend.transfer import DeviceEvent
from mindspeed_mm.training.metrics import QueuedStep, StepDetails, StepMetrics, StepReader, rates_per_device
from mindspeed_mm.training.optimizers.adamw import AdamW


def optimizer_of(parameter: nn.Parameter) -> AdamW:
    return AdamW([{"params": [parameter], "lr": 0.1, "weight_decay": 0.1}])


@pytest.mark.parametrize("on_device", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(on_device):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = optimizer_of(parameter)
    assert optimizer.skips_on_device  # the CPU's kernel does, in every torch that is supported
    optimizer.skips_on_device = on_device
    parameter.grad = torch.full((4,), 2.0)
    optimizer.step_where(torch.tensor(True))
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    parameter.grad = torch.full((4,), float("nan"))
    optimizer.step_where(torch.tensor(False))
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    parameter.grad = torch.full((4,), 2.0)
    optimizer.step_where(torch.tensor(True))
    assert optimizer.state[parameter]["step"] == 2


def test_the_flag_makes_no_difference_to_a_step():
    values, gradient = torch.rand(50), torch.rand(50)
    results = []
    for plain in (True, False):
        parameter = nn.Parameter(values.clone())
        optimizer = optimizer_of(parameter)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step() if plain else optimizer.step_where(torch.tensor(True))
        results.append(parameter.detach())
    assert torch.equal(*results)


class Queue:
    """A device that does its work one after another while the host goes on; seconds of both, without waiting for any.

    ``work`` takes ``host`` seconds to queue and ``device`` seconds to do. Nobody knows when the device is at some place
    of the queue before the host has waited for it.
    """

    def __init__(self):
        self.host = self.free = 0.0

    def work(self, *, host, device):
        self.host += host
        self.free = max(self.free, self.host) + device

    def mark(self):
        return Place(self, max(self.free, self.host))


class Place:
    def __init__(self, device, at):
        self.device, self.at = device, at

    def synchronize(self):
        self.device.host = max(self.device.host, self.at)

    def seconds_since(self, earlier):
        self.synchronize()
        return self.at - earlier.at


class QueuedMetrics:
    """Metrics of a step whose work is queued."""

    def __init__(self, device, **values):
        self.ready, self.values = device.mark(), {"loss": 1.0, **values}

    def read(self):
        self.ready.synchronize()
        return self.values


def queued(iteration, device, **values):
    known = {"consumed_samples": 8 * iteration, "learning_rate": 0.1}
    return QueuedStep(iteration, known, QueuedMetrics(device, **values), StepDetails())


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("host", "device", "seconds"),
    [
        (1.0, 4.0, [5.0, 4.0, 4.0, 4.0, 4.0]),  # no step is before the first, which its work could be queued behind
        (4.0, 1.0, [5.0, 4.0, 4.0, 4.0, 4.0]),  # the last is done when it is read, and the device waits for the host
    ],
    ids=["device is slower", "host is slower"],
)
def test_seconds_of_a_step_are_the_devices(lag, host, device, seconds):
    """The same whenever the host reads it, the first and the last step included."""
    queue = Queue()
    queue.host = 100.0
    reader = StepReader(lag=lag, mark=queue.mark)
    queue.host += 30.0  # a start that belongs to no step
    reader.restart_clock()
    if lag == 0:  # the host waits, so that each step begins with the device idle
        seconds = [5.0] * 5
    records = []
    for iteration in range(1, 6):
        queue.work(host=host, device=device)
        records += reader.add(queued(iteration, queue))
        assert len(records) == iteration - lag
    records += reader.flush()
    assert [record.metrics["seconds"] for record in records] == pytest.approx(seconds, abs=1e-4)


def test_a_pause_belongs_to_no_step():
    """As a checkpoint or an evaluation between two steps."""
    queue = Queue()
    reader = StepReader(lag=1, mark=queue.mark)
    records = []
    for iteration in range(1, 6):
        queue.work(host=1.0, device=4.0)
        records += reader.add(queued(iteration, queue))
        if iteration == 3:
            records += reader.flush()
            queue.work(host=50.0, device=70.0)
            queue.mark().synchronize()
            reader.restart_clock()
    records += reader.flush()
    assert [record.metrics["seconds"] for record in records] == [5.0, 4.0, 4.0, 5.0, 4.0]


def test_events_of_the_host():
    first = DeviceEvent(torch.device("cpu"))
    time.sleep(0.02)
    second = DeviceEvent(torch.device("cpu"))
    assert 0.02 <= second.seconds_since(first) < 1.0 and first.seconds_since(second) < 0


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_are_read_in_order_with_what_the_host_knew(lag):
    queue = Queue()
    reader = StepReader(lag=lag, mark=queue.mark)
    records = []
    for iteration in range(1, 6):
        records += reader.add(queued(iteration, queue, loss=float(iteration)))
    records += reader.flush()
    assert [record.iteration for record in records] == [1, 2, 3, 4, 5]
    assert [record.metrics["loss"] for record in records] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [record.metrics["consumed_samples"] for record in records] == [8, 16, 24, 32, 40]


@pytest.fixture
def two_ranks(monkeypatch):
    """A reduction in which the other rank has the same numbers; counts its calls."""
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tensor.shape) or tensor.mul_(2))
    return calls


def test_one_reduction_and_one_read_for_all_metrics(two_ranks, monkeypatch):
    metrics = StepMetrics(torch.device("cpu"))
    metrics.add("loss", torch.tensor(1.0, requires_grad=True))
    metrics.add("tokens", 10)
    metrics.add("loss", torch.tensor(0.5, dtype=torch.float64))
    metrics.add("tokens", 5)
    metrics.add("stop_requests", False)
    metrics.reduce()
    assert len(two_ranks) == 1 and metrics["loss"] == 3.0
    metrics.set("grad_norm", torch.tensor(7.0))
    metrics.set("skipped", torch.tensor(True))
    metrics.send()
    reads = []
    monkeypatch.setattr(metrics._host, "tolist", lambda read=metrics._host.tolist: reads.append(1) or read())
    expected = {"loss": 3.0, "tokens": 30.0, "stop_requests": 0.0, "grad_norm": 7.0, "skipped": 1.0}
    assert metrics.read() == expected and metrics.read() == expected and len(reads) == 1


def test_adding_a_metric_leaves_the_tensor_alone(two_ranks):
    loss = torch.tensor(2.0)
    metrics = StepMetrics(torch.device("cpu"))
    metrics.add("loss", loss)
    metrics.add("loss", loss)
    metrics.reduce()
    assert loss == 2.0 and metrics["loss"] == 8.0


def test_rates_are_for_one_device():
    step = {"seconds": 2.0, "tokens": 800, "target_tokens": 200, "tflop": 24.0}
    rates = rates_per_device(step, devices=4, peak_tflops=10.0)
    assert rates == pytest.approx({
        "tokens_per_second_per_device": 100.0, "target_tokens_per_second_per_device": 25.0,
        "tflop_per_second_per_device": 3.0, "mfu": 0.3,
    })
    assert "mfu" not in rates_per_device(step, devices=4, peak_tflops=None)
