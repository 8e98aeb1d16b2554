"""Two processes that are told to stop, hang, or meet numbers that are not finite."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.resumed_runs import BAD_RECORD, LAST, ROOT, STEPS, assert_same_checkpoint, assert_same_run
from tests.helpers.tiny_recipe import recipe_flags
from tests.st.test_recipe import stored

pytestmark = pytest.mark.st


def test_a_signal_to_one_process_stops_all_after_the_step(quick):
    told, resumed = quick.steps("told"), quick.steps("told, then resumed")
    assert max(told) == 4  # the step that it came in: it is asked for when the step's sums are made
    assert re.search(rf"training stopped as requested at iteration {max(told)};", quick.output)
    assert_same_run(quick.steps("whole"), [told, resumed])
    assert_same_checkpoint(quick.place / "whole", quick.place / "told")


def test_a_step_that_is_not_finite_is_skipped_by_all(quick):
    whole, steps = quick.steps("whole"), quick.steps("nan once")
    assert [step for step, facts in steps.items() if facts["skipped"]] == [3]
    for step, facts in steps.items():  # schedule and data go on as if nothing had been
        for name in ("learning_rate", "consumed", "samples"):
            assert facts[name] == whole[step][name]
        assert (facts["loss"] == whole[step]["loss"]) == (step < 3), step
    counts = {value.item() for name, value in stored(quick.place / "nan once" / LAST).items() if name.endswith(".step")}
    assert counts == {STEPS - 1}
    assert "number of skipped iterations:   1 | number of nan iterations:   1" in quick.output
    report = json.loads((quick.place / "nan once/reports/iteration_0000003_nonfinite.json").read_text())
    bad = [sample for sample in report["samples"] if sample["mean_loss"] == "nan"]
    first_of_rank_1 = {ids[0] for ids in steps[3]["samples"][1]}
    assert {sample["sample"] for sample in bad} == first_of_rank_1 and all(sample["ranks"] == [1] for sample in bad)
    assert all(re.search(r"data\.json, record \d+", sample["source"]) for sample in report["samples"])
    assert sorted(sample["sample"] for sample in report["samples"]) == sorted(
        sample for rank in steps[3]["samples"] for ids in rank for sample in ids
    )
    assert len(report["parameters_with_nonfinite_gradients"]) > 10


def test_too_many_of_them_stop_the_run_and_leave_its_checkpoint(quick):
    run = quick["nan from then on"]
    assert run["status"] == 2 and "--max-nonfinite-steps 2" in run["error"] and sorted(run["steps"]) == list("12345")
    tracker = quick.place / "nan from then on/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4"  # saved on schedule; its parameters are those of the last good step
    whole = stored(quick.place / "nan from then on/iter_0000004")
    assert all(value.isfinite().all() for name, value in whole.items() if not name.startswith("rng"))
    before = stored(quick.place / "nan from then on/iter_0000002")
    assert all(torch.equal(value, before[name]) for name, value in whole.items() if name.startswith("model"))


def test_a_process_that_hangs_is_reported_with_where_the_others_wait(quick):
    assert quick.steps("asleep")[STEPS] == quick.steps("whole")[STEPS]  # it goes on when the sleeper wakes
    reports = quick.place / "asleep/reports"
    sleeper = (reports / "hang_iteration_0000008_rank00001.txt").read_text()
    waiter = (reports / "hang_iteration_0000008_rank00000.txt").read_text()
    assert "iteration 8, waiting for data for" in sleeper and "time.sleep(fault" in sleeper
    assert "iteration 8, waiting for data for" not in waiter and "all_reduce" in waiter
    found = re.search(
        r"warning: iteration 8 (has taken (\S+) s, the median is (\S+) s|takes too long on another rank); "
        r"stack traces of all ranks: .+/reports\n"
        r"   rank 0: iteration 8, counting tokens for .*all_reduce.*\n   rank 1: iteration 8, waiting for data for",
        quick.output,
    )
    assert found, quick.output[quick.output.find("warning: iteration 8") :][:1000]
    assert found[2] is None or float(found[2]) > max(1.0, 3 * float(found[3]))


def test_a_lost_data_worker_ends_the_run_with_nothing_lost(quick):
    """The steps whose data one rank could not load are taken back on all ranks, and what was trained is saved."""
    ended, resumed = quick["worker killed"], quick.steps("worker killed, then resumed")
    last = max(map(int, ended["steps"]))
    assert ended["status"] == 2 and 2 <= last < STEPS
    reason = rf"iteration {last + 1}: a data worker was ended by SIGKILL; .* \(saved first: iteration {last}\)"
    assert re.fullmatch(reason, ended["error"])
    assert_same_run(quick.steps("whole"), [{int(step): facts for step, facts in ended["steps"].items()}, resumed])
    # the step that was taken back has drawn from the generators, from which only these tests draw
    assert_same_checkpoint(quick.place / "whole", quick.place / "worker killed", without="rng")


def test_a_sample_that_cannot_be_used_ends_the_run_after_a_save(quick):
    """Its header is whole, so that no check before training finds it; its step is taken back, the others are kept."""
    whole, ended = quick.steps("whole"), quick["bad sample"]
    met = next(step for step, facts in whole.items() for ids in facts["samples"] for own in ids if BAD_RECORD in own)
    assert met > 1 and ended["status"] == 2 and sorted(map(int, ended["steps"])) == list(range(1, met))
    reason = rf"iteration {met}: \S*damaged\.json, .*damaged\.png cannot be used.* \(saved first: iteration {met - 1}\)"
    assert re.fullmatch(reason, ended["error"])
    assert all(ended["steps"][str(step)] == whole[step] for step in range(1, met))
    kept = stored(quick.place / f"bad sample/iter_{met - 1:07d}")
    assert {name.split(".")[0] for name in kept} >= {"model", "optimizer"}


def test_a_new_stage_has_the_weights_and_counts_from_the_start(quick):
    whole, stage = quick.steps("whole"), quick.steps("next stage")
    assert sorted(stage) == [1, 2]
    for step, facts in stage.items():
        assert all(facts[name] == whole[step][name] for name in ("learning_rate", "consumed", "samples"))
    assert float.fromhex(stage[1]["loss"]) < 0.9 * float.fromhex(whole[1]["loss"])
    refused = quick["no steps left"]
    assert refused["status"] == 2 and not refused["steps"] and "or start a new stage" in refused["error"]


def test_deterministic_mode_changes_no_number_on_a_cpu(quick):
    assert quick.steps("deterministic") == quick.steps("whole")
    assert_same_checkpoint(quick.place / "deterministic", quick.place / "whole")


def test_deterministic_mode_repeats_itself_with_more_threads(recipe, tmp_path):
    """As in a launcher of one rank on two cores; without it the order of sums may differ between two runs."""
    for name in ("one", "other"):
        flags = recipe_flags(recipe, save=tmp_path / name, deterministic_mode=True, train_iters=4)
        subprocess.run(
            [sys.executable, "pretrain_transformers.py", *flags], cwd=ROOT, check=True, capture_output=True,
            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
    ours, theirs = (stored(tmp_path / name / "iter_0000004") for name in ("one", "other"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_whose_save_directory_another_one_uses_is_refused_on_all_processes(quick):
    run = quick["locked"]
    assert run["status"] == 2 and not run["steps"]
    assert f"is being written by another run (process {os.getpid()} on host" in run["error"]
    assert not (quick.place / "locked").exists()  # the other run, which made it, has left it empty
