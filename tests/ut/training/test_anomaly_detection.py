"""Steps that are not finite, and spikes: counted, reported with their samples, and too many end the run."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import nn

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.anomaly_detection import (
    AnomalyDetector,
    SpikeDetector,
    _merge_samples,
    sample_facts,
)
from mindspeed_mm.training.gradients import total_norm
from mindspeed_mm.training.metrics import SampleLosses, StepDetails, StepRecord

pytestmark = pytest.mark.usefixtures("process_group")


MODEL = nn.ModuleDict({"good": nn.Linear(2, 2, bias=False), "bad": nn.Linear(2, 2)})


def make(tmp_path, *flags):
    args = parse_args(
        [
            "--mm-data",
            "d",
            "--mm-model",
            "m",
            "--seq-length",
            "8",
            "--train-iters",
            "9",
            "--lr",
            "1",
            "--save",
            str(tmp_path / "save"),
            *flags,
        ]
    )
    return AnomalyDetector(
        args, model=MODEL, describe=lambda index: f"data.json, sample {index} (record {index + 100})"
    )


def record(iteration, *, loss=1.0, norm=1.0, losses=(1.0, 2.0, 3.0, 4.0), gradient_norms=()):
    samples = SampleLosses([7, 8, 9], torch.tensor([0, 1, 1, 2]), torch.tensor(losses))
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    metrics = {"loss": loss, "grad_norm": norm, "skipped_step": float(skipped), "learning_rate": 0.25}
    return StepRecord(iteration, metrics, StepDetails((samples,), gradient_norms))


def read(tmp_path, name):
    return json.loads((tmp_path / "save/reports" / name).read_text())


def test_a_loss_that_is_not_finite_names_its_sample(tmp_path, caplog):
    detector = make(tmp_path)
    detector.on_step_end(record(1))
    assert not (tmp_path / "save").exists()
    detector.on_step_end(record(2, loss=math.nan, losses=(1.0, 2.0, math.nan, 4.0)))
    found = read(tmp_path, "iteration_0000002_nonfinite.json")
    assert (found["iteration"], found["loss"], found["grad_norm"], found["skipped"]) == (2, "nan", 1.0, True)
    assert found["samples"][0] == {
        "sample": 8,
        "source": "data.json, sample 8 (record 108)",
        "mean_loss": "nan",
        "tokens": 2,
        "ranks": [0],
    }
    assert [(sample["sample"], sample["mean_loss"]) for sample in found["samples"][1:]] == [(9, 4.0), (7, 1.0)]
    printed = caplog.text
    assert "iteration 2: skipped, because the loss is nan" in printed and "record 108" in printed


def test_a_gradient_that_is_not_finite_names_its_parameters(tmp_path):
    for parameter in MODEL.parameters():
        parameter.grad = torch.ones_like(parameter)
    MODEL["bad"].bias.grad[1] = math.inf
    norm = total_norm(list(MODEL.parameters()))
    assert not norm.total.isfinite()
    make(tmp_path).on_step_end(record(3, norm=float(norm.total), gradient_norms=norm.parts))
    found = read(tmp_path, "iteration_0000003_nonfinite.json")
    assert found["parameters_with_nonfinite_gradients"] == ["bad.bias"]
    assert "norm of the gradients is inf" in found["reason"]


def test_too_many_in_a_row_stop_the_run_and_single_ones_do_not(tmp_path):
    detector = make(tmp_path, "--max-nonfinite-steps", "2")
    for iteration in range(1, 31):
        detector.on_step_end(record(iteration, loss=math.nan if iteration % 3 else 1.0))
    detector.on_step_end(record(31, loss=math.nan))
    detector.on_step_end(record(32, norm=math.inf))
    with pytest.raises(UserError, match=r"3 steps in a row .* --max-nonfinite-steps 2; .*iteration_0000033"):
        detector.on_step_end(record(33, loss=math.nan))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_stop_the_run_at_once(tmp_path, value):
    detector = make(tmp_path)
    detector.on_step_end(record(1, loss=math.nan))  # the step's own fault: it is skipped
    detector.on_step_end(record(2))
    with torch.no_grad():
        former = MODEL["bad"].bias[1].clone()
        MODEL["bad"].bias[1] = value
    try:
        with pytest.raises(UserError, match=r"^NaN or infinity in bad\.bias, with"):
            detector.on_step_end(record(3, norm=math.inf))
    finally:
        with torch.no_grad():
            MODEL["bad"].bias[1] = former


def test_the_first_stops_where_none_is_allowed(tmp_path):
    with pytest.raises(UserError, match="1 steps in a row"):
        make(tmp_path, "--max-nonfinite-steps", "0").on_step_end(record(1, loss=math.inf))


def test_a_spike_is_reported_and_nothing_else_happens(tmp_path, caplog):
    detector = make(tmp_path)
    for iteration in range(1, 40):
        detector.on_step_end(record(iteration, loss=2.0 + 0.1 * (iteration % 5)))
    assert not (tmp_path / "save").exists()
    detector.on_step_end(record(40, loss=9.0, norm=500.0))
    found = read(tmp_path, "iteration_0000040_spike.json")
    assert not found["skipped"] and "loss 9 is " in found["reason"] and "gradient norm 500" in found["reason"]
    assert found["samples"][0]["sample"] == 9 and "iteration 40" in caplog.text


def test_a_report_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "save").write_text("in the way")
    make(tmp_path).on_step_end(record(2, loss=math.nan))
    assert "cannot be written" in caplog.text


def test_parts_of_a_sample_on_several_processes_are_put_together():
    parts = [{"samples": [(5, 2.0, 1, "five"), (6, 9.0, 3, "six")]}, {"samples": [(5, 4.0, 2, "five")]}]
    assert _merge_samples(parts) == [
        {"sample": 6, "source": "six", "mean_loss": 3.0, "tokens": 3, "ranks": [0]},
        {"sample": 5, "source": "five", "mean_loss": 2.0, "tokens": 3, "ranks": [0, 1]},
    ]


def test_facts_of_a_sample_in_two_micro_batches():
    first = SampleLosses([1, 2], torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 3.0]))
    second = SampleLosses([2, 3], torch.tensor([0]), torch.tensor([4.0]))
    assert sample_facts([first, second]) == {1: (1.0, 1), 2: (9.0, 3), 3: (0.0, 0)}


def noisy(count, *, seed=0):
    generator = random.Random(seed)
    return [2.0 * 0.99**step + generator.gauss(0, 0.1) for step in range(count)]


def test_noise_and_descent_are_no_spikes():
    spikes = SpikeDetector("loss", factor=10)
    assert [message for value in noisy(2000) if (message := spikes.check(value))] == []


@pytest.mark.parametrize("before", [20, 500])
def test_a_spike_is_named_with_the_median(before):
    spikes = SpikeDetector("loss", factor=10)
    for value in noisy(before):
        assert spikes.check(value) is None
    message = spikes.check(9.0)
    assert message.startswith("loss 9 is ") and "standard deviations above the median" in message


def test_outliers_do_not_hide_the_next():
    spikes = SpikeDetector("loss", factor=10)
    for value in noisy(100):
        spikes.check(value)
    assert all(spikes.check(9.0) for _ in range(20))


def test_short_history_factor_0_and_values_that_are_not_finite():
    spikes = SpikeDetector("loss", factor=10)
    assert [spikes.check(value) for value in [1.0] * 19 + [1000.0]] == [None] * 20
    off = SpikeDetector("loss", factor=0)
    assert [off.check(value) for value in [1.0] * 50 + [1000.0]] == [None] * 51
    spikes = SpikeDetector("loss", factor=10)
    assert [spikes.check(value) for value in [1.0] * 50 + [math.nan, math.inf, 1.05]] == [None] * 53
    assert spikes.check(1.2)  # a flat curve: 20 % are 20 times the smallest spread that counts
