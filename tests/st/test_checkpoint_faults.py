"""Faults at chosen points of resuming, saving and deleting: nothing that was saved is lost, and the run goes on.

The fast share runs with the other tests. All of it, with a table of the faults:

    python -m pytest -m slow -s tests/st/test_checkpoint_faults.py tests/ut/checkpoint/test_convert_kill.py
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.st
LAST = 4  # of checkpoint_faults.py


def sweep(ranks: int, way: str, fault: str, rank: int, when: str, count: int) -> dict[str, Any]:
    """See ``checkpoint_faults.main``; a count of 0 is every point."""
    return {"ranks": ranks, "asynchronous": way == "async", "fault": fault, "rank": rank, "when": when, "count": count}


FAST = [
    sweep(1, "sync", "kill", 0, "ever", 6),
    sweep(1, "async", "kill", 0, "ever", 6),
    sweep(2, "async", "kill", 0, "ever", 5),
    sweep(2, "async", "kill", 1, "ever", 3),
    sweep(2, "async", "torn", 0, "ever", 2),
    sweep(2, "async", "kill all", 0, "ever", 3),
    sweep(1, "async", "power cut", 0, "ever", 6),
    sweep(1, "async", "full disk", 0, "ever", 5),
    sweep(2, "async", "I/O error", 1, "ever", 4),
]
WHOLE = {
    "resume": [
        sweep(1, "sync", "kill", 0, "before", 0),
        sweep(1, "sync", "power cut", 0, "before", 0),
        sweep(2, "async", "kill", 0, "before", 0),
        sweep(2, "async", "kill", 1, "before", 0),
        sweep(2, "async", "kill all", 0, "before", 0),
    ],
    "save": [
        sweep(1, "sync", "kill", 0, "saving", 156),
        sweep(1, "sync", "power cut", 0, "saving", 70),
        sweep(1, "sync", "torn", 0, "saving", 40),
        sweep(2, "sync", "kill", 0, "saving", 60),
        sweep(2, "sync", "kill", 1, "saving", 50),
    ],
    "async save": [
        sweep(1, "async", "kill", 0, "saving", 156),
        sweep(1, "async", "power cut", 0, "saving", 70),
        sweep(2, "async", "kill", 0, "saving", 80),
        sweep(2, "async", "kill", 1, "saving", 60),
        sweep(2, "async", "kill all", 0, "saving", 80),
        sweep(2, "async", "torn", 0, "saving", 40),
        sweep(2, "async", "random time", 0, "ever", 60),
    ],
    "errors": [
        sweep(1, "async", "full disk", 0, "ever", 80),
        sweep(2, "async", "full disk", 1, "ever", 40),
        sweep(1, "sync", "I/O error", 0, "ever", 40),
        sweep(2, "sync", "I/O error", 0, "ever", 60),
    ],
}
LEAST = {"resume": 200, "save": 350, "async save": 500, "errors": 200}


def run(sweeps: list[dict[str, Any]], directory: Path, timeout: float) -> list[dict[str, Any]]:
    """Do the sweeps; returns what came of each case, after printing a table."""
    (directory / "sweeps.json").write_text(json.dumps(sweeps))
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "tests.drivers.checkpoint_faults", str(directory / "sweeps.json"),
         str(directory / "results.json")],
        check=True, cwd=root, timeout=timeout, stdout=sys.__stderr__,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    cases = json.loads((directory / "results.json").read_text())["cases"]
    rows: collections.Counter[tuple] = collections.Counter()
    survived: collections.Counter[tuple] = collections.Counter()
    for case in cases:
        way = "async" if case["asynchronous"] else "sync"
        key = (case["fault"], "at a random time" if case["seconds"] else f"during {case['struck']}", case["ranks"], way)
        rows[key] += 1
        survived[key] += case["error"] is None
    print("\n| fault | when | processes | saving | tried | survived |\n| --- | --- | --- | --- | --- | --- |")
    for key in sorted(rows):
        print("| " + " | ".join(map(str, (*key, rows[key], survived[key]))) + " |")
    return cases


def assert_nothing_lost(cases: list[dict[str, Any]], at_least: int) -> None:
    assert len(cases) >= at_least
    lost = [case for case in cases if case["error"]]
    assert not lost, f"{len(lost)} of {len(cases)}: {lost[:3]}"


def test_some_faults(tmp_path: Path) -> None:
    cases = run(FAST, tmp_path, timeout=240)
    assert_nothing_lost(cases, at_least=35)
    assert {case["resumed_from"] for case in cases} >= {1, 2, 3}  # faults before, between and after saves
    assert "nothing" not in {case["struck"] for case in cases}  # every fault happened


@pytest.mark.slow
@pytest.mark.parametrize("part", WHOLE)
def test_every_fault(tmp_path: Path, part: str) -> None:
    cases = run(WHOLE[part], tmp_path, timeout=7200)
    assert_nothing_lost(cases, at_least=LEAST[part])
    expected = {"resume": {1}, "errors": {1, LAST}}.get(part, {1, 2, 3})  # after most errors the run goes on by itself
    assert {case["resumed_from"] for case in cases} >= expected


MISTAKES = {
    "the tracker moves first": (
        "kill",
        "commit = directory.AtomicDirectory.commit\n"
        "def early(self, *arguments):\n"
        "    directory.write_tracker(self.target.parent, int(self.target.name[5:]))\n"
        "    commit(self, *arguments)\n"
        "directory.AtomicDirectory.commit = early\n",
    ),
    "nothing is flushed": ("power cut", "files._RawFile.sync = lambda self: None\n"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_saver_that_is_not_safe_is_caught(tmp_path: Path, mistake: str) -> None:
    """The driver is shown savers with a mistake."""
    fault, change = MISTAKES[mistake]
    code = (
        "import json, pathlib, sys\n"
        "from mindspeed_mm.checkpoint import directory, files\n"
        f"{change}"
        "from tests.drivers import checkpoint_faults\n"
        "checkpoint_faults.main(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    root, sweeps = Path(__file__).parents[2], [sweep(1, "sync", fault, 0, "ever", 8)]
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(sweeps), str(tmp_path / "results.json")],
        check=True, cwd=root, timeout=240, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert any(case["error"] for case in cases)
