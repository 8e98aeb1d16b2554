"""A run that was stopped, killed or moved to other processes, against one that was left alone.

``python -m pytest tests/st/test_resume.py -m "slow or not slow"`` runs the whole matrix.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_recipe import recipe_flags, write_data_file, write_recipe
from tests.st.test_recipe import stored

ROOT = Path(__file__).parents[2]
STEPS = 8  # of 4 of the 26 samples: the seventh step runs into the second epoch
pytestmark = pytest.mark.st


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def torchrun(
    root: Path, runs: list[dict[str, Any]], *, processes: int, restarts: int = 0, status: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Go through ``runs`` with some processes; returns what each logged, and what was printed."""
    (root / "runs.json").write_text(json.dumps(runs))
    (root / "out.json").unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts), str(ROOT / "tests/st/resume_driver.py"), str(root / "runs.json"),
        str(root / "out.json"),
    ]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=600,
    )
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == (status == 0), output
    found = json.loads((root / "out.json").read_text()) if (root / "out.json").exists() else []
    return found, output


def steps_of(run: dict[str, Any]) -> dict[int, dict[str, Any]]:
    assert run["status"] == 0, run["error"]
    return {int(step): facts for step, facts in run["steps"].items()}


def assert_same_run(whole: dict[int, Any], parts: list[dict[int, Any]]) -> None:
    """Every step happened in exactly one part, with the numbers and samples of the whole, to the bit."""
    assert sorted(step for part in parts for step in part) == sorted(whole) == list(range(1, STEPS + 1))
    for part in parts:
        for step, facts in part.items():
            assert facts == whole[step], step


def assert_same_checkpoint(one: Path, other: Path, *, without: str = "-") -> None:
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "optimizer", "rng"}
    assert [name for name in ours if not name.startswith(without) and not torch.equal(ours[name], theirs[name])] == []


def case(root: Path, *, packing: bool = False, **flags: Any) -> dict[str, Any]:
    """Flags of a case; ``micro_batch_size`` and the rest as in ``recipe_flags``."""
    if packing:
        flags["mm_data"] = write_data_file(root, "packed.json", basic={"packing": True})
        flags.update(seq_length=96, micro_batch_size=1)
    return flags


PLAIN: dict[str, Any] = {}
EVERYTHING = {
    "packing": True, "num_workers": 2, "recompute_granularity": "full", "eval_interval": 2,
}
# (processes, stops after these steps, options)
QUICK = {
    "1 process": (1, [3, 6], PLAIN),
    "2 processes, packing, workers, recompute": (2, [4], EVERYTHING),
}
MATRIX = {
    f"{processes} processes, {stops}, {name}": (processes, stops, options)
    for processes in (1, 2)
    for stops in ([1], [4], [7])
    for name, options in {
        "plain": PLAIN,
        "workers": {"num_workers": 2},
        "packing": {"packing": True},
        "recompute": {"recompute_granularity": "full"},
        "selective": {"recompute_granularity": "selective"},
        "micro-batches of 1": {"micro_batch_size": 1},
        "everything": EVERYTHING,
    }.items()
} | {
    "EP 2": (2, [3], {"expert_model_parallel_size": 2}),
    "CP 2": (2, [3], {"context_parallel_size": 2, "micro_batch_size": 4}),
    "EP 2 and CP 2": (4, [3], {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
    "saving beside training": (2, [3, 6], {"async_save": True, "save_interval": 2}),
    "balanced experts": (2, [3], {"moe_aux_loss_coeff": 0.1}),
}


def check_case(root: Path, save: Path, name: str, table: dict[str, Any]) -> None:
    processes, stops, options = table[name]
    flags = case(root, **options)
    runs = [{"flags": recipe_flags(root, save=save / "whole", **flags)}]
    for number, stop in enumerate([*stops, None]):
        load = save / "parts" if number else None
        runs.append({"flags": recipe_flags(root, save=save / "parts", load=load, exit_interval=stop, **flags)})
    (whole, *parts), _ = torchrun(root, runs, processes=processes)
    assert_same_run(steps_of(whole), [steps_of(part) for part in parts])
    samples = [facts["samples"] for facts in steps_of(whole).values()]
    assert len({json.dumps(ids) for ids in samples}) == STEPS  # the comparison would see another order
    assert_same_checkpoint(save / f"whole/iter_{STEPS:07d}", save / f"parts/iter_{STEPS:07d}")


@pytest.mark.parametrize("name", QUICK)
def test_stopped_and_resumed_is_the_same_run(root, tmp_path, name):
    check_case(root, tmp_path, name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_stopped_and_resumed_in_every_combination(root, tmp_path, name):
    check_case(root, tmp_path, name, MATRIX)


@pytest.mark.parametrize(
    ("phase", "options"),
    [
        ("backward", {}),
        pytest.param("save", {}, marks=pytest.mark.slow),
        pytest.param("backward", {"async_save": True}, marks=pytest.mark.slow),
    ],
)
def test_killed_process_is_started_again_and_nothing_is_lost(root, tmp_path, phase, options):
    """SIGKILL in a step, or with a save half done; torchrun starts again, from this run's checkpoint with all in it."""
    first = {"load": None, "save_interval": 3, "no_load_optim": True, "no_load_rng": True, **options}
    iteration = 6 if phase == "save" else 5
    fault = {"rank": 1, "iteration": iteration, "phase": phase, "kind": "kill"}
    whole, _ = torchrun(root, [{"flags": recipe_flags(root, save=tmp_path / "whole", **first)}], processes=2)
    run = {"flags": recipe_flags(root, save=tmp_path / "killed", **first), "fault": fault}
    killed, output = torchrun(root, [run], processes=2, restarts=1)
    assert "restart 1 by torchrun: continuing from" in output and "iter_0000003" in output
    whole, rest = steps_of(whole[0]), steps_of(killed[0])
    assert sorted(rest) == [4, 5, 6, 7, 8] and all(rest[step] == whole[step] for step in rest)
    assert_same_checkpoint(tmp_path / f"whole/iter_{STEPS:07d}", tmp_path / f"killed/iter_{STEPS:07d}")


def test_flags_leave_out_what_they_say_and_no_more(root, tmp_path):
    """The moments and the generators can be left out of saving and loading; schedule and samples go on in any case."""

    def run(save: str, load: str | None = None, **flags: Any) -> dict[str, Any]:
        target = None if load is None else tmp_path / load
        return {"flags": recipe_flags(root, save=tmp_path / save, load=target, **flags)}

    runs = [
        run("whole"),
        run("full", exit_interval=3),
        run("bare", exit_interval=3, no_save_optim=True, no_save_rng=True),
        run("1", "full", no_load_optim=True),
        run("2", "full", no_load_rng=True),
        run("3", "bare", no_load_optim=True, no_load_rng=True),
        run("4", "bare", no_load_rng=True),
        run("5", "bare", no_load_optim=True),
    ]
    found, output = torchrun(root, runs, processes=2)
    whole = steps_of(found[0])
    names = {save: {key.split(".")[0] for key in stored(tmp_path / save / "iter_0000003")} for save in ("full", "bare")}
    assert names == {"full": {"model", "optimizer", "rng"}, "bare": {"model"}}
    assert "will be saved without AdamW's moments and random generator states" in output
    without_moments, without_rng, without_both = (steps_of(run) for run in found[3:6])
    for steps in (without_moments, without_rng, without_both):
        assert sorted(steps) == [4, 5, 6, 7, 8]
        for step, facts in steps.items():  # the original's learning rate restarts together with the moments
            for same in ("learning_rate", "consumed", "samples"):
                assert facts[same] == whole[step][same]
    assert without_moments == without_both and without_moments[4] == whole[4] and without_moments[5] != whole[5]
    assert all(without_rng[step] == whole[step] for step in without_rng)  # nothing in this model draws random numbers
    last = f"iter_{STEPS:07d}"
    assert_same_checkpoint(tmp_path / "whole" / last, tmp_path / "2" / last, without="rng")
    assert not all(
        torch.equal(value, stored(tmp_path / "2" / last)[name])
        for name, value in stored(tmp_path / "whole" / last).items() if name.startswith("rng")
    )
    assert [run["status"] for run in found[6:]] == [2, 2]
    assert "no optimizer state" in found[6]["error"] and "--no-load-optim" in found[6]["error"]
    assert "no random generator state" in found[7]["error"] and "--no-load-rng" in found[7]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_other_processes_and_layouts_go_on_with_the_same_run(root, tmp_path, packing):
    """FSDP over 2 -> 4 with experts spread -> 2 with context parallelism -> 1: same samples, losses within 1e-5."""
    options = {**case(root, packing=packing), "micro_batch_size": 1}
    (whole,), _ = torchrun(root, [{"flags": recipe_flags(root, save=tmp_path / "whole", **options)}], processes=2)
    layouts = [
        (2, 2, {}), (4, 4, {"expert_model_parallel_size": 2}), (2, 6, {"context_parallel_size": 2}), (1, STEPS, {}),
    ]
    parts: dict[int, Any] = {}
    for number, (processes, until, layout) in enumerate(layouts):
        load = tmp_path / "moved" if number else None
        stop = None if until == STEPS else until
        flags = recipe_flags(root, save=tmp_path / "moved", load=load, exit_interval=stop, **options, **layout)
        (run,), _ = torchrun(root, [{"flags": flags}], processes=processes)
        parts.update(steps_of(run))
    assert sorted(parts) == list(range(1, STEPS + 1))
    for step, facts in steps_of(whole).items():
        for name in ("loss", "norm"):
            ours, theirs = (float.fromhex(of[name]) for of in (parts[step], facts))
            assert math.isclose(ours, theirs, rel_tol=1e-5 if name == "loss" else 1e-4), (step, name)
        for name in ("learning_rate", "consumed"):
            assert parts[step][name] == facts[name]
        assert seen(parts[step]) == seen(facts)


def seen(facts: dict[str, Any]) -> list[int]:
    """Samples of a step, whichever process and micro-batch had them."""
    return sorted({sample for rank in facts["samples"] for ids in rank for sample in ids})
