"""Steps that are not finite or leap: counted, reported with their samples, and ended when there are too many."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.backend.process_group import shutdown_distributed
from mindspeed_mm.backend.transfer import DeferredHostRead
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.anomaly_detection import AnomalyDetector, _merge_samples, sample_facts
from mindspeed_mm.training.gradients import total_norm
from mindspeed_mm.training.reports import StepReport
from mindspeed_mm.training.step import SampleLosses, StepResult, StepSums


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    shutdown_distributed()


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


def report(iteration, *, loss=1.0, norm=1.0, losses=(1.0, 2.0, 3.0, 4.0), gradient_norms=()):
    samples = SampleLosses([7, 8, 9], torch.tensor([0, 1, 1, 2]), torch.tensor(losses))
    numbers = DeferredHostRead(torch.tensor([*StepSums(loss=loss, tokens=4), norm]))
    result = StepResult(
        numbers, has_router_loss=False, bad_messages=(), samples=[samples], gradient_norms=gradient_norms
    )
    return StepReport(iteration, iteration * 3, 0.25, result, waited=0.0)


def read(tmp_path, name):
    return json.loads((tmp_path / "save/reports" / name).read_text())


def test_a_loss_that_is_not_finite_names_its_sample(tmp_path, capsys):
    health = make(tmp_path)
    health(report(1))
    assert not (tmp_path / "save").exists()
    health(report(2, loss=math.nan, losses=(1.0, 2.0, math.nan, 4.0)))
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
    printed = capsys.readouterr().out
    assert "warning: iteration 2: skipped, because the loss is nan" in printed and "record 108" in printed


def test_a_gradient_that_is_not_finite_names_its_parameters(tmp_path):
    for parameter in MODEL.parameters():
        parameter.grad = torch.ones_like(parameter)
    MODEL["bad"].bias.grad[1] = math.inf
    norm = total_norm(list(MODEL.parameters()))
    assert not norm.total.isfinite()
    make(tmp_path)(report(3, norm=float(norm.total), gradient_norms=norm.parts))
    found = read(tmp_path, "iteration_0000003_nonfinite.json")
    assert found["parameters_with_nonfinite_gradients"] == ["bad.bias"]
    assert "norm of the gradients is inf" in found["reason"]


def test_too_many_in_a_row_stop_the_run_and_single_ones_do_not(tmp_path):
    health = make(tmp_path, "--max-nonfinite-steps", "2")
    for iteration in range(1, 31):
        health(report(iteration, loss=math.nan if iteration % 3 else 1.0))
    health(report(31, loss=math.nan))
    health(report(32, norm=math.inf))
    with pytest.raises(UserError, match=r"3 steps in a row .* --max-nonfinite-steps 2; .*iteration_0000033"):
        health(report(33, loss=math.nan))


def test_the_first_stops_where_none_is_allowed(tmp_path):
    with pytest.raises(UserError, match="1 steps in a row"):
        make(tmp_path, "--max-nonfinite-steps", "0")(report(1, loss=math.inf))


def test_a_leap_is_reported_and_nothing_else_happens(tmp_path, capsys):
    health = make(tmp_path)
    for iteration in range(1, 40):
        health(report(iteration, loss=2.0 + 0.1 * (iteration % 5)))
    assert not (tmp_path / "save").exists()
    health(report(40, loss=9.0, norm=500.0))
    found = read(tmp_path, "iteration_0000040_spike.json")
    assert not found["skipped"] and "loss 9 lies" in found["reason"] and "gradient norm 500" in found["reason"]
    assert found["samples"][0]["sample"] == 9 and "warning: iteration 40" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_does_not_stop_training(tmp_path, capsys):
    (tmp_path / "save").write_text("in the way")
    make(tmp_path)(report(2, loss=math.nan))
    assert "cannot be written" in capsys.readouterr().out


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
