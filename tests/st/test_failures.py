"""Two processes that are told to stop, hang, or meet numbers that are not finite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_recipe import recipe_flags, write_recipe
from tests.st.test_recipe import stored
from tests.st.test_resume import STEPS, assert_same_checkpoint, assert_same_run, steps_of, torchrun

pytestmark = pytest.mark.st
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]], str]:
    """All runs in the same two processes, since starting these is what takes time."""
    root = write_recipe(tmp_path_factory.mktemp("recipe"))
    nan = {"rank": 1, "kind": "nan", "iteration": 0, "phase": ""}
    runs = {
        "whole": {},
        "told": {"fault": {"rank": 1, "iteration": 4, "phase": "backward", "kind": "signal", "signal": "SIGUSR1"}},
        "told, then resumed": {"save": "told", "load": root / "told"},
        "nan once": {"fault": {**nan, "iterations": [3]}, "save_interval": 2},
        "nan from then on": {"fault": {**nan, "iterations": range(3, 9)}, "save_interval": 2, "max_nonfinite_steps": 2},
        "asleep": {
            "fault": {"rank": 1, "iteration": 8, "phase": "waiting for data", "kind": "sleep", "seconds": 6},
            "hang_watch_factor": 3.0, "hang_watch_seconds": 1.0,
        },
        "deterministic": {"deterministic_mode": True},
        "deterministic again": {"deterministic_mode": True},
    }
    described = []
    for name, options in runs.items():
        options = {"save": name, **options}
        fault = options.pop("fault", None)
        fault = fault and {**fault, "iterations": list(fault.get("iterations", ()))}
        flags = recipe_flags(root, save=root / options.pop("save"), **options)
        described.append({"flags": flags, "fault": fault})
    found, output = torchrun(root, described, processes=2)
    return root, dict(zip(runs, found, strict=True)), output


def test_a_signal_to_one_process_stops_all_after_the_step(outcome):
    root, runs, output = outcome
    told, resumed = steps_of(runs["told"]), steps_of(runs["told, then resumed"])
    assert max(told) == 4  # the step that it came in: it is asked for when the step's sums are made
    assert re.search(rf"training stopped, as it was told to, at iteration {max(told)};", output)
    assert_same_run(steps_of(runs["whole"]), [told, resumed])
    assert_same_checkpoint(root / "whole" / LAST, root / "told" / LAST)


def test_a_step_that_is_not_finite_is_skipped_by_all(outcome):
    root, runs, output = outcome
    whole, steps = steps_of(runs["whole"]), steps_of(runs["nan once"])
    assert [step for step, facts in steps.items() if facts["skipped"]] == [3]
    for step, facts in steps.items():  # schedule and data go on as if nothing had been
        for name in ("learning_rate", "consumed", "samples"):
            assert facts[name] == whole[step][name]
        assert (facts["loss"] == whole[step]["loss"]) == (step < 3), step
    counts = {value.item() for name, value in stored(root / "nan once" / LAST).items() if name.endswith(".step")}
    assert counts == {STEPS - 1}
    assert "number of skipped iterations:   1 | number of nan iterations:   1" in output
    report = json.loads((root / "nan once/reports/iteration_0000003_nonfinite.json").read_text())
    bad = [sample for sample in report["samples"] if sample["mean_loss"] == "nan"]
    first_of_rank_1 = {ids[0] for ids in steps[3]["samples"][1]}
    assert {sample["sample"] for sample in bad} == first_of_rank_1 and all(sample["ranks"] == [1] for sample in bad)
    assert all(re.search(r"data\.json, sample \d+ \(record \d+\)", sample["source"]) for sample in report["samples"])
    assert sorted(sample["sample"] for sample in report["samples"]) == sorted(
        sample for rank in steps[3]["samples"] for ids in rank for sample in ids
    )
    assert len(report["parameters_with_nonfinite_gradients"]) > 10


def test_too_many_of_them_stop_the_run_and_leave_its_checkpoint(outcome):
    root, runs, _ = outcome
    run = runs["nan from then on"]
    assert run["status"] == 2 and "--max-nonfinite-steps 2" in run["error"] and sorted(run["steps"]) == list("12345")
    tracker = root / "nan from then on/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4"  # saved on schedule; its parameters are those of the last good step
    whole = stored(root / "nan from then on/iter_0000004")
    assert all(value.isfinite().all() for name, value in whole.items() if not name.startswith("rng"))
    before = stored(root / "nan from then on/iter_0000002")
    assert all(torch.equal(value, before[name]) for name, value in whole.items() if name.startswith("model"))


def test_a_process_that_hangs_is_reported_with_where_the_others_wait(outcome):
    root, runs, output = outcome
    assert steps_of(runs["asleep"])[STEPS] == steps_of(runs["whole"])[STEPS]  # it goes on when the sleeper wakes
    reports = root / "asleep/reports"
    sleeper = (reports / "hang_iteration_0000008_rank00001.txt").read_text()
    waiter = (reports / "hang_iteration_0000008_rank00000.txt").read_text()
    assert "iteration 8, waiting for data for" in sleeper and "time.sleep(fault" in sleeper
    assert "iteration 8, waiting for data for" not in waiter and "all_reduce" in waiter
    found = re.search(
        r"warning: iteration 8 has taken (\S+) s, the median is (\S+) s; stacks of all processes: \S+/reports\n"
        r"   rank 0: iteration 8, counting tokens for .*all_reduce.*\n   rank 1: iteration 8, waiting for data for",
        output,
    )
    assert found and float(found[1]) > max(1.0, 3 * float(found[2]))


def test_deterministic_mode_gives_the_same_numbers_again(outcome):
    root, runs, _ = outcome
    first, second = (steps_of(runs[name]) for name in ("deterministic", "deterministic again"))
    assert first == second
    assert_same_checkpoint(root / "deterministic" / LAST, root / "deterministic again" / LAST)
