"""Runs of the tiny recipe that the same processes go through one after the other, and how two of them are compared.

Starting processes is what takes time, so that tests share them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.lock import LOCK, DirectoryLock
from tests.helpers.tiny_recipe import recipe_flags, write_data_file
from tests.st.test_recipe import stored

ROOT = Path(__file__).parents[2]
STEPS = 8  # of 4 of the 26 samples: the seventh step runs into the second epoch
LAST = f"iter_{STEPS:07d}"
BAD_RECORD = 7  # of the first epoch's, with an image

PLAIN: dict[str, Any] = {}
EVERYTHING = {"packing": True, "mixture": True, "num_workers": 2, "recompute_granularity": "full", "eval_interval": 2}

# of a learning rate that is too high in the end; an epoch of 17 of the 26 samples
BEST: dict[str, Any] = {
    "eval_interval": 1, "keep_best": 2, "keep_last": 1, "lr": 0.2, "lr_warmup_iters": 7, "async_save": True,
}


class Runs:
    """Some runs, in the order in which they are added, and what came of them.

    Attributes:
        place: holds their ``--save`` directories.
        output: what they printed.
    """

    def __init__(self, recipe: Path, place: Path, *, processes: int) -> None:
        """No runs yet.

        Args:
            recipe: what ``write_recipe`` made.
            place: a directory.
            processes: how many there are.
        """
        self.place, self.output = place, ""
        self._recipe, self._processes = recipe, processes
        self._described: dict[str, dict[str, Any]] = {}
        self._found: dict[str, dict[str, Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._described

    def __getitem__(self, name: str) -> dict[str, Any]:
        """What a run logged: ``status``, ``error`` and ``steps``."""
        return self._found[name]

    def add(
        self, name: str, *, save: str | None = None, load: str | None = None, fault: dict[str, Any] | None = None,
        packing: bool = False, mixture: bool = False, **flags: Any,
    ) -> None:
        """Add a run.

        Args:
            name: of the run, and of its ``--save`` unless ``save`` names another.
            save: directory below ``place``.
            load: the same, to resume from.
            fault: see ``resume_runs.py``.
            packing: pack samples.
            mixture: of three data sets instead of one.
            flags: as of ``recipe_flags``.
        """
        basic: dict[str, Any] = {"dataset": mixed_data(self._recipe)} if mixture else {}
        if packing:
            flags = {"seq_length": 96, **flags, "micro_batch_size": 1}
            basic["packing"] = True
        if basic:
            flags["mm_data"] = write_data_file(self._recipe, f"{'-'.join(basic)}.json", basic=basic)
        source = None if load is None else self.place / load
        words = recipe_flags(self._recipe, save=self.place / (save or name), load=source, **flags)
        self._described[name] = {"flags": words, "fault": fault}

    def add_stopped(self, name: str, stops: Iterable[int], **options: Any) -> None:
        """Add the parts of a run that is stopped after some steps, and resumed each time."""
        for number, stop in enumerate([*stops, None]):
            load = name if number else None
            self.add(f"{name}, part {number}", save=name, load=load, exit_interval=stop, **options)

    def parts(self, name: str) -> list[dict[int, Any]]:
        """The steps of each part of a run of ``add_stopped``."""
        return [self.steps(found) for found in self._described if found.startswith(f"{name}, part ")]

    def steps(self, name: str) -> dict[int, dict[str, Any]]:
        """What a run that ended well logged of each step."""
        assert self[name]["status"] == 0, self[name]["error"]
        return {int(step): facts for step, facts in self[name]["steps"].items()}

    def go(self, *, restarts: int = 0) -> Runs:
        """Do them all; a restart goes on with the run in which a process was killed."""
        runs, out = self.place / "runs.json", self.place / "out.json"
        out.unlink(missing_ok=True)
        runs.write_text(json.dumps(list(self._described.values())))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self._processes),
            "--max-restarts", str(restarts), str(ROOT / "tests/drivers/resume_runs.py"), str(runs), str(out),
        ]
        result = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=1800,
        )
        self.output = result.stdout + result.stderr
        assert result.returncode == 0, self.output
        self._found = dict(zip(self._described, json.loads(out.read_text()), strict=True))
        return self


def mixed_data(recipe: Path) -> dict[str, dict[str, Any]]:
    """The recipe's 26 samples as a mixture of three data sets, of which an epoch has 26: 6 + 12 + 8."""
    records = json.loads((recipe / "data.json").read_text())
    shares = {"half": (0, 12, 0.5), "twice": (12, 18, 2.0), "once": (18, 26, 1.0)}
    for name, (start, end, _) in shares.items():
        (recipe / f"{name}.json").write_text(json.dumps(records[start:end]))
    return {name: {"path": str(recipe / f"{name}.json"), "repeat": repeat} for name, (*_, repeat) in shares.items()}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """This process as another run that saves into a directory."""
    lock = DirectoryLock(directory / LOCK, f"--save {directory}")
    assert lock.acquire() is None
    yield
    lock.release()


def with_damaged_image(recipe: Path, *, record: int) -> str:
    """A data file whose data set is the recipe's, but for the cut-off image of one record; returns its path."""
    records = json.loads((recipe / "data.json").read_text())
    (name,) = records[record]["images"]
    whole = (recipe / name).read_bytes()
    (recipe / "images/damaged.png").write_bytes(whole[: len(whole) // 2])
    records[record]["images"] = ["images/damaged.png"]
    (recipe / "damaged.json").write_text(json.dumps(records))
    return write_data_file(recipe, "data_damaged.json", basic={"dataset": str(recipe / "damaged.json")})


def quick_runs(recipe: Path, place: Path) -> Runs:
    """Everything that the quick tests of two processes compare; the last one loses a process, which is restarted."""
    runs = Runs(recipe, place, processes=2)
    runs.add("whole")
    runs.add("whole, everything", **EVERYTHING)
    runs.add_stopped("resumed, everything", [4], **EVERYTHING)

    best = {**BEST, "mm_data": write_data_file(recipe, "data_best.json", basic={"val_rate": 0.35})}
    runs.add("best", **best)
    runs.add_stopped("best, resumed", [3, 6], **best)
    runs.add("early", **best, early_stopping_patience=3)

    runs.add("full", exit_interval=3)
    runs.add("bare", exit_interval=3, no_save_optim=True, no_save_rng=True)
    runs.add("without moments", load="full", no_load_optim=True)
    runs.add("without generators", load="full", no_load_rng=True)
    runs.add("without both", load="bare", no_load_optim=True, no_load_rng=True)
    runs.add("moments wanted", load="bare", no_load_rng=True)
    runs.add("generators wanted", load="bare", no_load_optim=True)

    nan = {"rank": 1, "kind": "nan", "iteration": 0, "phase": ""}
    runs.add("told", fault={"rank": 1, "iteration": 4, "phase": "backward", "kind": "signal", "signal": "SIGUSR1"})
    runs.add("told, then resumed", save="told", load="told")
    runs.add("nan once", fault={**nan, "iterations": [3]}, save_interval=2)
    runs.add(
        "nan from then on", fault={**nan, "iterations": list(range(3, 9))}, save_interval=2, max_nonfinite_steps=2
    )
    runs.add(
        "asleep", hang_watch_factor=3.0, hang_watch_seconds=1.0,
        fault={"rank": 1, "iteration": 8, "phase": "waiting for data", "kind": "sleep", "seconds": 6},
    )
    killed = {"rank": 1, "iteration": 2, "phase": "forward", "kind": "kill workers"}
    runs.add("worker killed", fault=killed, num_workers=1)
    runs.add("worker killed, then resumed", save="worker killed", load="worker killed")
    runs.add("bad sample", mm_data=with_damaged_image(recipe, record=BAD_RECORD), num_workers=1)
    runs.add("next stage", load="whole", finetune=True, exit_interval=2)
    runs.add("no steps left", save="next stage", load="whole")
    runs.add("locked")
    runs.add("deterministic", deterministic_mode=True)
    runs.add("exported", save_interval=2, keep_last=1, save_hf_interval=4)
    add_killed(runs, "backward")
    with locked(place / "locked"):
        return runs.go(restarts=1)


def add_killed(runs: Runs, phase: str, *, rank: int = 1, **options: Any) -> None:
    """Add, as the last one, a run that loses a process in a step after its first save, or in its second save."""
    fault = {"rank": rank, "iteration": 6 if phase == "save" else 5, "phase": phase, "kind": "kill"}
    runs.add("killed", save_interval=3, no_load_optim=True, no_load_rng=True, fault=fault, **options)


def assert_same_run(whole: dict[int, Any], parts: list[dict[int, Any]]) -> None:
    """Every step happened in exactly one part, with the numbers and samples of the whole, to the bit."""
    assert sorted(step for part in parts for step in part) == sorted(whole) == list(range(1, STEPS + 1))
    for part in parts:
        for step, facts in part.items():
            assert facts == whole[step], step
    samples = [facts["samples"] for facts in whole.values()]
    assert len({json.dumps(ids) for ids in samples}) == STEPS  # the comparison would see another order


def assert_same_metrics(one: Path, other: Path) -> None:
    """``metrics.jsonl`` of two ``--save`` directories: one line per step, without duplicates or gaps, and equal."""
    ours, theirs = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (one, other)
    )
    assert [line["iteration"] for line in ours] == list(range(1, STEPS + 1))
    measured = {"time", "peak_memory_gib", *(name for name in ours[0] if "second" in name)}
    for mine, other_line in zip(ours, theirs, strict=True):
        assert mine.keys() == other_line.keys()
        assert [key for key in mine if key not in measured and mine[key] != other_line[key]] == [], mine["iteration"]
    assert {"loss", "grad_norm", "learning_rate", "tokens"} <= set(ours[0]) - measured


def assert_same_checkpoint(one: Path, other: Path, *, without: str = "-") -> None:
    """The last checkpoints of two ``--save`` directories hold the same tensors, to the bit."""
    ours, theirs = stored(one / LAST), stored(other / LAST)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "optimizer", "rng"}
    assert [name for name in ours if not name.startswith(without) and not torch.equal(ours[name], theirs[name])] == []
