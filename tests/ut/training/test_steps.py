"""Steps whose outcome stays on the device: left out there if not finite, and read late without losing their place."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mindspeed_mm.backend.transfer import DeferredHostRead, DeviceEvent
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.log import DeviceSpeed, IntervalStats, format_line
from mindspeed_mm.training.optimizer import AdamW
from mindspeed_mm.training.reports import Reporter, StepReport
from mindspeed_mm.training.step import SampleLosses, StepResult, StepSums


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


def result(loss: float = 1.0, *, stop: float = 0.0, norm: float = 2.0, samples=()) -> StepResult:
    sums = StepSums(loss=loss, tokens=10, target_tokens=4, stop=stop)
    return StepResult(
        DeferredHostRead(torch.tensor([*sums, norm])), has_router_loss=False, bad_messages=(), samples=samples
    )


def report(iteration: int, **of_result) -> StepReport:
    return StepReport(iteration, 8 * iteration, 0.1, result(**of_result), waited=0.0)


def reporter(lag: int, *hooks, log_interval: int = 1) -> Reporter:
    return Reporter(
        log_interval=log_interval,
        train_iters=5,
        global_batch_size=8,
        log_tokens=False,
        is_main=True,
        lag=lag,
        mark=lambda: DeviceEvent(torch.device("cpu")),
        hooks=hooks,
    )


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


class QueuedNumbers:
    def __init__(self, device):
        self.ready = device.mark()

    def tolist(self):
        self.ready.synchronize()
        return [*StepSums(loss=1.0), 2.0]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("host", "device", "seconds"),
    [
        (1.0, 4.0, [5.0, 4.0, 4.0, 4.0, 4.0]),  # the first has nothing before it to be queued behind
        (4.0, 1.0, [5.0, 4.0, 4.0, 4.0, 4.0]),  # and here the last is done when it is read, and the device waits
    ],
    ids=["device is slower", "host is slower"],
)
@pytest.mark.parametrize("log_interval", [1, 2, 5])
def test_time_of_a_step_is_the_devices(lag, host, device, seconds, log_interval, capsys):
    """The same whenever the host comes to read it, the first and the last step included."""
    queue = Queue()
    queue.host = 100.0
    reports = Reporter(
        log_interval=log_interval,
        train_iters=5,
        global_batch_size=8,
        log_tokens=False,
        is_main=True,
        lag=lag,
        mark=queue.mark,
    )
    queue.host += 30.0  # a start that belongs to no step
    reports.restart_clock()
    if lag == 0:  # the host waits, so that each step begins with the device idle
        seconds = [5.0] * 5
    for iteration in range(1, 6):
        queue.work(host=host, device=device)
        outcome = StepResult(QueuedNumbers(queue), has_router_loss=False, bad_messages=())
        reports.add(StepReport(iteration, 8 * iteration, 0.1, outcome, waited=0.0))
    reports.flush()
    logged = [float(line.split("(ms): ")[1].split(" |")[0]) for line in capsys.readouterr().out.splitlines()]
    ends = [*range(log_interval, 5, log_interval), 5]
    starts = [0, *ends[:-1]]
    assert logged == pytest.approx(
        [1000.0 * sum(seconds[start:end]) / (end - start) for start, end in zip(starts, ends, strict=True)], abs=0.1
    )


def test_a_pause_belongs_to_no_step(capsys):
    """As a checkpoint or an evaluation between two steps."""
    queue = Queue()
    reports = Reporter(
        log_interval=1, train_iters=5, global_batch_size=8, log_tokens=False, is_main=True, lag=1, mark=queue.mark
    )
    for iteration in range(1, 6):
        queue.work(host=1.0, device=4.0)
        outcome = StepResult(QueuedNumbers(queue), has_router_loss=False, bad_messages=())
        reports.add(StepReport(iteration, 8 * iteration, 0.1, outcome, waited=0.0))
        if iteration == 3:
            reports.flush()
            queue.work(host=50.0, device=70.0)
            queue.mark().synchronize()
            reports.restart_clock()
    reports.flush()
    logged = [float(line.split("(ms): ")[1].split(" |")[0]) for line in capsys.readouterr().out.splitlines()]
    assert logged == [5000.0, 4000.0, 4000.0, 5000.0, 4000.0]


def test_moments_of_the_host():
    first = DeviceEvent(torch.device("cpu"))
    time.sleep(0.02)
    second = DeviceEvent(torch.device("cpu"))
    assert 0.02 <= second.seconds_since(first) < 1.0 and first.seconds_since(second) < 0


@pytest.mark.parametrize("lag", [0, 1])
def test_late_reading_prints_the_same_lines(lag, capsys):
    seen = []
    reports = reporter(lag, lambda step: seen.append(step.iteration))
    for iteration in range(1, 6):
        reports.add(report(iteration, loss=float(iteration)))
        assert seen == list(range(1, iteration + 1 - lag))
    reports.flush()
    assert seen == [1, 2, 3, 4, 5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("iteration ")[1].split("/")[0].strip() for line in lines] == ["1", "2", "3", "4", "5"]
    assert [line.split(" loss: ")[1].split(" |")[0] for line in lines] == [f"{i:.6E}" for i in range(1, 6)]
    assert "consumed samples:           24 |" in lines[2]


@pytest.mark.parametrize("lag", [0, 1])
def test_stop_is_told_when_its_step_is_read(lag):
    reports = reporter(lag)
    told = [reports.add(report(1, stop=1.0)), reports.add(report(2)), reports.flush()]
    assert told == [lag == 0, lag == 1, False]


def test_skipped_and_nan_steps_are_counted(capsys):
    reports = reporter(1, log_interval=5)
    for iteration, values in enumerate(
        [{}, {"loss": float("nan")}, {"norm": float("inf")}, {}, {"loss": float("inf")}], start=1
    ):
        reports.add(report(iteration, **values))
    reports.flush()
    line = capsys.readouterr().out
    assert "number of skipped iterations:   3 | number of nan iterations:   2" in line


def test_hook_may_end_the_run():
    def refuse(step: StepReport) -> None:
        raise UserError(f"step {step.iteration}")

    with pytest.raises(UserError, match="step 1"):
        reporter(0, refuse).add(report(1))


def test_losses_of_samples_on_demand():
    samples = (
        SampleLosses([7, 9, 8], torch.tensor([0, 0, 2]), torch.tensor([1.0, 2.0, 4.0])),
        SampleLosses([9], torch.tensor([0]), torch.tensor([float("nan")])),
    )
    losses = result(samples=samples).sample_losses()
    assert losses.keys() == {7, 9, 8}
    assert (losses[7], losses[8]) == (3.0, 4.0)
    assert losses[9] != losses[9]


def test_reporter_asks_the_device_once(monkeypatch):
    reads = []
    numbers = SimpleNamespace(tolist=lambda: reads.append(1) or [*StepSums(loss=1.0), 2.0])
    outcome = StepResult(numbers, has_router_loss=False, bad_messages=())
    assert (outcome.loss, outcome.grad_norm, outcome.router_loss, outcome.skipped) == (1.0, 2.0, None, False)
    assert len(reads) == 1


def test_speed_is_for_one_device(capsys):
    stats = IntervalStats()
    stats.add(seconds=2.0, loss=1.0, tokens=800, samples=4, skipped=False, nan=False, target_tokens=200, teraflop=24.0)
    options = {
        "iteration": 1,
        "train_iters": 1,
        "consumed_samples": 4,
        "learning_rate": 0.1,
        "global_batch_size": 4,
        "grad_norm": 1.0,
        "log_tokens": False,
    }
    line = format_line(stats, **options, speed=DeviceSpeed(4, 10.0, 3 * 2**29))
    assert line.endswith(
        "| data wait: 0.0% | tokens/s per device: 100.0 | supervised tokens/s per device: 25.0 | TFLOP/s per device: 3 "
        "| MFU: 30.0% | peak memory (GiB): 1.50 |"
    )
    assert "MFU" not in format_line(stats, **options, speed=DeviceSpeed(4))
