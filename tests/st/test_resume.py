"""A run that was stopped, killed or moved to other processes, against one that was left alone.

``python -m pytest tests/st/test_resume.py -m "slow or not slow"`` runs the whole matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from tests.helpers.resumed_runs import (
    EVERYTHING,
    LAST,
    PLAIN,
    STEPS,
    Runs,
    add_killed,
    assert_same_checkpoint,
    assert_same_metrics,
    assert_same_run,
)
from tests.st.test_recipe import stored

pytestmark = pytest.mark.st

OPTIONS = {
    "plain": PLAIN,
    "workers": {"num_workers": 2},
    "packing": {"packing": True},
    "recompute": {"recompute_granularity": "full"},
    "selective": {"recompute_granularity": "selective"},
    "micro-batches of 1": {"micro_batch_size": 1},
    "everything": EVERYTHING,
    "EP 2": {"expert_model_parallel_size": 2},
    "CP 2": {"context_parallel_size": 2, "micro_batch_size": 4},
    "EP 2 and CP 2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    "saving beside training": {"async_save": True, "save_interval": 2},
    "balanced experts": {"moe_aux_loss_coeff": 0.1},
}
# (processes, stopped after these steps, name in OPTIONS)
MATRIX = [
    (processes, stops, name) for processes in (1, 2) for stops in ([1], [4], [7]) for name in list(OPTIONS)[:7]
] + [
    (2, [3], "EP 2"),
    (2, [3], "CP 2"),
    (4, [3], "EP 2 and CP 2"),
    (2, [3, 6], "saving beside training"),
    (2, [3], "balanced experts"),
]


def check_resumed(runs: Runs, whole: str, resumed: str) -> None:
    """To the bit: every step's numbers and samples, and all that the last checkpoint holds."""
    assert_same_run(runs.steps(whole), runs.parts(resumed))
    assert_same_checkpoint(runs.place / whole, runs.place / resumed)
    assert_same_metrics(runs.place / whole, runs.place / resumed)


def test_two_processes_with_everything_resume_to_the_bit(quick):
    check_resumed(quick, "whole, everything", "resumed, everything")


def test_the_best_checkpoints_are_kept_and_a_resumed_run_keeps_the_same(quick):
    """Two of the best and the last one, which is none of them; saved in the background, of two processes."""
    check_resumed(quick, "best", "best, resumed")
    whole, resumed = quick.place / "best", quick.place / "best, resumed"
    names = ("best_checkpoints.json", "best_checkpointed_iteration.txt")
    assert [(whole / name).read_text() for name in names] == [(resumed / name).read_text() for name in names]
    ranking = json.loads((whole / names[0]).read_text())["ranking"]
    left = sorted({LAST, *(one["directory"] for one in ranking)})
    assert len(left) == 3
    assert [sorted(path.name for path in place.glob("iter_*")) for place in (whole, resumed)] == [left, left]
    losses = {line["iteration"]: line["validation_loss"] for line in
              map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())}
    assert [(one["iteration"], one["value"]) for one in ranking] == sorted(losses.items(), key=lambda item: item[1])[:2]


def test_early_stopping_ends_a_run_of_two_processes_as_finished(quick):
    ended = max(quick.steps("early"))
    best = json.loads((quick.place / "early/best_checkpoints.json").read_text())["ranking"][0]["iteration"]
    assert ended == best + 3 < STEPS and (quick.place / f"early/iter_{ended:07d}").is_dir()
    assert f"training finished at iteration {ended} (early stopping: validation_loss has not improved" in quick.output


def test_one_process_resumes_to_the_bit(recipe, tmp_path):
    runs = Runs(recipe, tmp_path, processes=1)
    runs.add("whole")
    runs.add_stopped("resumed", [3, 6])
    runs.go()
    check_resumed(runs, "whole", "resumed")


@pytest.fixture(scope="module")
def matrix(request, recipe, tmp_path_factory) -> Callable[[int], Runs]:
    """The runs of a number of processes, made when they are first asked for: those that the tests chosen need."""
    made: dict[int, Runs] = {}

    def of(processes: int) -> Runs:
        if processes not in made:
            made[processes] = runs = Runs(recipe, tmp_path_factory.mktemp("matrix"), processes=processes)
            chosen = [item.callspec.params for item in request.session.items if "matrix" in item.fixturenames]
            for stops, name in ((of["stops"], of["name"]) for of in chosen if of["processes"] == processes):
                if name not in runs:
                    runs.add(name, **OPTIONS[name])
                runs.add_stopped(f"{name} {stops}", stops, **OPTIONS[name])
            runs.go()
        return made[processes]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stops", "name"), MATRIX)
def test_stopped_and_resumed_in_every_combination(matrix, processes, stops, name):
    check_resumed(matrix(processes), name, f"{name} {stops}")


def check_killed(runs: Runs) -> None:
    """The restart continued from the checkpoint of step 3, with all in it, whatever the flags said of loading."""
    assert "restart 1 by torchrun: continuing from" in runs.output and "iter_0000003" in runs.output
    whole, rest = runs.steps("whole"), runs.steps("killed")
    assert sorted(rest) == [4, 5, 6, 7, 8] and all(rest[step] == whole[step] for step in rest)
    assert_same_checkpoint(runs.place / "whole", runs.place / "killed")
    assert_same_metrics(runs.place / "whole", runs.place / "killed")


def test_killed_process_is_started_again_and_nothing_is_lost(quick):
    check_killed(quick)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "phase", "options"),
    [(1, "backward", {}), (2, "save", {}), (2, "backward", {"async_save": True}), (2, "backward", EVERYTHING)],
)
def test_killed_elsewhere_and_started_again(recipe, tmp_path, processes, phase, options):
    """SIGKILL in a step, or with a save half done."""
    runs = Runs(recipe, tmp_path, processes=processes)
    runs.add("whole", **options)
    add_killed(runs, phase, rank=processes - 1, **options)
    check_killed(runs.go(restarts=1))


def test_flags_leave_out_what_they_say_and_no_more(quick):
    """The moments and the generators can be left out of saving and loading; schedule and samples go on in any case."""
    whole = quick.steps("whole")
    names = {
        save: {key.split(".")[0] for key in stored(quick.place / save / "iter_0000003")} for save in ("full", "bare")
    }
    assert names == {"full": {"model", "optimizer", "rng"}, "bare": {"model"}}
    assert "will be saved without optimizer state and RNG states" in quick.output
    without_moments, without_rng, without_both = (
        quick.steps(name) for name in ("without moments", "without generators", "without both")
    )
    for steps in (without_moments, without_rng, without_both):
        assert sorted(steps) == [4, 5, 6, 7, 8]
        for step, facts in steps.items():  # the original's learning rate restarts together with the moments
            for same in ("learning_rate", "consumed", "samples"):
                assert facts[same] == whole[step][same]
    assert without_moments == without_both and without_moments[4] == whole[4] and without_moments[5] != whole[5]
    assert all(without_rng[step] == whole[step] for step in without_rng)  # nothing in this model draws random numbers
    ours, theirs = quick.place / "whole", quick.place / "without generators"
    assert_same_checkpoint(ours, theirs, without="rng")
    ours, theirs = stored(ours / LAST), stored(theirs / LAST)
    assert not all(torch.equal(value, theirs[name]) for name, value in ours.items() if name.startswith("rng"))
    # what the checkpoint does not have is not loaded, and the log says so
    assert quick.steps("moments wanted") == quick.steps("generators wanted") == without_both
    assert "iter_0000003 has no optimizer state, which starts from zero (saved with --no-save-optim)" in quick.output
    assert "iter_0000003 has no RNG states, which start from --seed (saved with --no-save-rng)" in quick.output


def test_hugging_face_weights_are_written_while_training(quick, recipe, tmp_path):
    """As mm-convert writes them from the same checkpoint; ``--keep-last 1`` waits for an export."""
    place = quick.place / "exported"
    quick.steps("exported")
    assert quick.output.count(f"exported {place / 'hf'}") == 2
    assert sorted(path.name for path in place.glob("iter_*")) == ["iter_0000008"]
    assert sorted(path.name for path in (place / "hf").iterdir()) == ["iter_0000004", "iter_0000008"]
    converted = dcp_to_hf(place / "iter_0000008", tmp_path / "converted", recipe / "checkpoint")
    for path in converted.glob("*.safetensors"):
        assert path.read_bytes() == (place / "hf/iter_0000008" / path.name).read_bytes()
    names = [{path.name for path in directory.iterdir()} for directory in (converted, place / "hf/iter_0000008")]
    assert names[0] == names[1] and "model.safetensors" in names[0]


# (processes, until this step, layout)
LAYOUTS: list[tuple[int, int, dict[str, int]]] = [
    (2, 2, {}), (4, 4, {"expert_model_parallel_size": 2}), (2, 6, {"context_parallel_size": 2}), (1, STEPS, {}),
]
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 1}, "packed": {"packing": True}, "mixed": {"packing": True, "mixture": True},
}


@pytest.fixture(scope="module")
def moved(recipe, tmp_path_factory) -> dict[str, tuple[dict[int, Any], dict[int, Any]]]:
    """For each way the steps of a run of two processes, and of one that went through the layouts."""
    place = tmp_path_factory.mktemp("moved")
    whole: dict[str, dict[int, Any]] = {}
    parts: dict[str, dict[int, Any]] = {way: {} for way in WAYS}
    for processes, until, layout in LAYOUTS:
        runs = Runs(recipe, place, processes=processes)
        for way, options in WAYS.items():
            if not parts[way]:
                runs.add(f"{way}, whole", **options)
            load, stop = (way if parts[way] else None), (None if until == STEPS else until)
            runs.add(way, load=load, exit_interval=stop, **{**options, **layout})
        runs.go()
        for way in WAYS:
            whole.setdefault(way, {}).update({} if parts[way] else runs.steps(f"{way}, whole"))
            parts[way].update(runs.steps(way))
    assert_close_channels(place / "mixed, whole", place / "mixed")
    return {way: (whole[way], parts[way]) for way in WAYS}


def assert_close_channels(one: Path, other: Path) -> None:
    """The losses of a mixture's data sets agree within 1e-5, over the same numbers of target tokens."""
    ours, theirs = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (one, other)
    )
    names = {name for line in ours for name in line if name.startswith("loss/")}
    assert names == {"loss/half", "loss/twice", "loss/once"}
    for mine, other_line in zip(ours, theirs, strict=True):
        assert mine["target_tokens"] == sum(mine[f"target_tokens/{name.removeprefix('loss/')}"] for name in names)
        for name in names & mine.keys():
            assert math.isclose(mine[name], other_line[name], rel_tol=1e-5), (mine["iteration"], name)
        counts = [name for name in mine if name.startswith("target_tokens/")]
        assert [mine[name] for name in counts] == [other_line[name] for name in counts]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_processes_and_layouts_go_on_with_the_same_run(moved, way):
    """FSDP over 2 -> 4 with experts spread -> 2 with context parallelism -> 1: same samples, losses within 1e-5."""
    whole, parts = moved[way]
    assert sorted(parts) == list(range(1, STEPS + 1))
    for step, facts in whole.items():
        for name in ("loss", "norm"):
            ours, theirs = (float.fromhex(of[name]) for of in (parts[step], facts))
            assert math.isclose(ours, theirs, rel_tol=1e-5 if name == "loss" else 1e-4), (step, name)
        for name in ("learning_rate", "consumed"):
            assert parts[step][name] == facts[name]
        assert seen(parts[step]) == seen(facts)


def seen(facts: dict[str, Any]) -> list[int]:
    """Samples of a step, whichever process and micro-batch had them."""
    return sorted({sample for rank in facts["samples"] for ids in rank for sample in ids})
