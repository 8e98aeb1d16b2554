"""The best checkpoints: their ranking, retention, and what is recorded once they are durable."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.best import BEST_FILE, BestSoFar
from mindspeed_mm.checkpoint.directory import BEST_TRACKER, RUN_KEY, find_checkpoint, resolve_checkpoint
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.save_directory import best_on_disk, continue_best, remove_leftovers
from mindspeed_mm.errors import UserError
from tests.ut.checkpoint.test_manager import State, fill_disk, iterations, lines

__all__ = ["lines"]
pytestmark = pytest.mark.usefixtures("process_group")
NAN = float("nan")
RUN = "host:1:2"


def manager_of(state: State, root: Path, *, run: str = RUN, **options: Any) -> CheckpointManager:
    return CheckpointManager(
        state, SaveOptions(root, **options), backend=select_backend("cpu"), metadata={RUN_KEY: run}
    )


def ranked(values: list[float], *, metric: str = "validation_loss", keep: int = 2) -> tuple[BestSoFar, list[bool]]:
    best = BestSoFar(metric)
    return best, [best.add(iteration, value, keep=keep) for iteration, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("metric", "values", "saved", "order"),
    [
        ("validation_loss", [3, 2, 2.5, 1, 2.2], [True, True, True, True, False], [4, 2, 3, 1]),
        ("validation_exact_match/a", [0, 0.5, 0.2, 0.5], [True, True, True, True], [2, 4, 3, 1]),
        ("validation_token_accuracy", [0.5, 0.5, 0.5], [True, True, False], [1, 2]),  # of equal ones the earlier
        ("validation_loss", [NAN, 2, NAN, math.inf, 3, NAN], [False, True, False, False, True, False], [2, 5]),
        ("validation_exact_match", [math.inf, 0.1], [False, True], [2]),
    ],
)
def test_ranking(metric, values, saved, order):
    best, found = ranked(values, metric=metric)
    assert (found, [iteration for iteration, _ in best.ranking]) == (saved, order)


def test_ranking_is_bounded_and_an_iteration_is_in_it_once():
    best, _ = ranked([float(-step) for step in range(100)])
    assert [iteration for iteration, _ in best.ranking] == [100, 99, 98, 97]
    assert best.add(98, -500.0, keep=2) and [iteration for iteration, _ in best.ranking] == [98, 100, 99, 97]
    assert not BestSoFar("validation_loss").add(1, 0.5, keep=0)


@pytest.mark.parametrize(
    ("metric", "threshold", "values", "waited"),
    [
        ("validation_loss", 0.0, [3, 2, 2, 2.5, 1, NAN], [0, 0, 1, 2, 0, 1]),
        ("validation_loss", 0.5, [3, 2.6, 2.5, 2.4, NAN, 1.9], [0, 1, 0, 1, 2, 0]),  # small gains add up
        ("validation_exact_match", 0.0, [0, 0, 0.1, 0.05, 0.1, 0.2], [0, 1, 0, 1, 2, 0]),
        ("validation_loss", 0.0, [NAN, NAN, 5], [1, 2, 0]),
    ],
)
def test_evaluations_without_improvement(metric, threshold, values, waited):
    best = BestSoFar(metric)
    assert [best.wait(value, threshold=threshold) for value in values] == waited


def test_progress_holds_it(tmp_path: Path) -> None:
    best, _ = ranked([3.0, 2.0])
    best.only, best.reference, best.waited = [2], 2.0, 1
    path = tmp_path / "iter_0000002"
    path.mkdir()
    written = dataclasses.asdict(Progress(iteration=2, best=best))
    (path / "progress.json").write_text(json.dumps(written))
    assert Progress.read(path).best == best
    for damaged in (
        {"metric": 3}, {"metric": "m", "ranking": [[1]]}, {"metric": "m", "ranking": [["1", 2.0]]}, [], {"new": 1},
        {"metric": "m", "waited": -1}, {"metric": "m", "ranking": [[1, None]]}, {"metric": "m", "reference": "x"},
        {"metric": "m", "runs": "one"}, {"metric": "m", "runs": [1]},
    ):
        (path / "progress.json").write_text(json.dumps({**written, "best": damaged}))
        with pytest.raises(UserError, match="progress.json: best is .*not what a run writes; restore it"):
            Progress.read(path)


def save(manager: Any, best: BestSoFar, iteration: int, value: float, *, keep: int, only: bool = True) -> None:
    """What the callbacks do after an evaluation, and a save in any case."""
    if not best.runs:
        best.add_run(RUN)
    if best.add(iteration, value, keep=keep) and only:
        best.only.append(iteration)
    manager.start(Progress(iteration=iteration, best=best))


def recorded(root: Path) -> list[tuple[int, float]]:
    content = json.loads((root / BEST_FILE).read_text())
    assert int((root / BEST_TRACKER).read_text()) == content["ranking"][0]["iteration"]
    assert all((root / one["directory"] / "manifest.json").is_file() for one in content["ranking"])
    return [(one["iteration"], one["value"]) for one in content["ranking"]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_retention_keeps_the_last_and_the_best(tmp_path: Path, asynchronous: bool, lines: list[str]) -> None:
    manager = manager_of(State(), tmp_path, asynchronous=asynchronous, keep_last=1, keep_best=2)
    best, left = BestSoFar("validation_loss"), []
    for iteration, value in enumerate([5.0, 3.0, 4.0, 6.0, 2.0, 7.0], start=1):
        save(manager, best, iteration, value, keep=2)
        manager.wait()
        left.append(iterations(tmp_path))
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 5], [2, 5, 6]]
    assert recorded(tmp_path) == [(5, 2.0), (2, 3.0)] and directory.read_tracker(tmp_path) == 6
    assert any("(--keep-last, --keep-best)" in line for line in lines)


def test_without_keep_last_only_what_was_saved_for_it_is_deleted(tmp_path: Path) -> None:
    manager, best = manager_of(State(), tmp_path, keep_best=1), BestSoFar("validation_loss")
    for iteration, value in enumerate([5.0, 4.0, 3.0, 6.0, 2.0], start=1):
        save(manager, best, iteration, value, keep=1, only=iteration % 2 == 1)
    assert iterations(tmp_path) == [2, 4, 5]


def test_best_is_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best checkpoint that could not be written displaces none."""
    manager, best = manager_of(State(), tmp_path, keep_last=1, keep_best=1), BestSoFar("validation_loss")
    save(manager, best, 1, 5.0, keep=1)
    with monkeypatch.context() as patch:
        fill_disk(patch, after=0)
        save(manager, best, 2, 4.0, keep=1)
    assert manager.failures == 1 and recorded(tmp_path) == [(1, 5.0)]
    save(manager, best, 3, 9.0, keep=1)
    assert iterations(tmp_path) == [1, 3] and recorded(tmp_path) == [(1, 5.0)]
    save(manager, best, 4, 3.0, keep=1)
    assert iterations(tmp_path) == [4] and recorded(tmp_path) == [(4, 3.0)]


def test_a_run_without_a_best_one_does_not_leave_that_of_another(tmp_path: Path) -> None:
    (tmp_path / BEST_TRACKER).write_text("7")
    save(manager_of(State(), tmp_path, keep_best=1), BestSoFar("validation_loss"), 1, NAN, keep=1)
    assert not (tmp_path / BEST_TRACKER).exists()
    assert json.loads((tmp_path / BEST_FILE).read_text())["ranking"] == []


def test_an_asynchronous_save_records_the_best_only_when_it_is_durable(tmp_path: Path, monkeypatch) -> None:
    manager, best = manager_of(State(), tmp_path, asynchronous=True, keep_best=1), BestSoFar("validation_loss")
    commits = []
    commit = directory.AtomicDirectory.commit
    monkeypatch.setattr(directory.AtomicDirectory, "commit", lambda *arguments: (
        commits.append((tmp_path / BEST_TRACKER).exists()), commit(*arguments)))
    save(manager, best, 1, 5.0, keep=1)
    manager.finish()
    assert commits == [False] and recorded(tmp_path) == [(1, 5.0)]


def test_best_stands_for_the_best_checkpoint(tmp_path: Path) -> None:
    manager, best = manager_of(State(), tmp_path, keep_best=1), BestSoFar("validation_loss")
    for iteration, value in ((1, 2.0), (2, 3.0)):
        save(manager, best, iteration, value, keep=1, only=False)
    wanted = tmp_path / "iter_0000001"
    assert resolve_checkpoint(tmp_path / "best") == find_checkpoint(tmp_path / "best", "--load_dir") == wanted
    assert directory.checkpoint_to_load(tmp_path / "best", plain=False)[0] == wanted
    with pytest.raises(UserError, match="none/best does not exist"):
        resolve_checkpoint(tmp_path / "none" / "best")
    (tmp_path / BEST_TRACKER).write_text("one")
    with pytest.raises(UserError, match="best_checkpointed_iteration.txt holds 'one'"):
        resolve_checkpoint(tmp_path / "best")


def test_checkpoints_of_another_run_are_neither_the_best_nor_deleted(tmp_path: Path) -> None:
    """A run that saves into the directory of another, whose iterations have the numbers of its own ranking."""
    first = manager_of(State(), tmp_path / "first", keep_best=1)
    best = BestSoFar("validation_loss")
    for iteration, value in ((1, 5.0), (2, 4.0), (3, 3.0)):
        save(first, best, iteration, value, keep=1)
    other = manager_of(State(), tmp_path / "other", run="host:3:4")
    for iteration in (1, 2, 3, 4):
        other.start(Progress(iteration=iteration))
    resumed = Progress.read(tmp_path / "first" / "iter_0000003").best
    assert resumed.only == [1, 2, 3]
    continue_best(resumed, tmp_path / "first" / "iter_0000003", save=str(tmp_path / "other"))
    assert resumed.only == [] and resumed.ranking == [(3, 3.0), (2, 4.0)] and resumed.runs == [RUN]
    resumed.add_run("host:5:6")
    for only in ([], [1, 2, 3]):  # the numbers alone decide nothing
        resumed.only = [*only]
        manager = manager_of(State(), tmp_path / "other", run="host:5:6", keep_best=2)
        save(manager, resumed, 4, 6.0, keep=2)
        assert iterations(tmp_path / "other") == [1, 2, 3, 4] and not (tmp_path / "other" / BEST_TRACKER).exists()
    save(manager, resumed, 5, 2.0, keep=2)
    save(manager, resumed, 6, 1.0, keep=2)
    assert iterations(tmp_path / "other") == [1, 2, 3, 4, 5, 6]
    assert recorded(tmp_path / "other") == [(6, 1.0), (5, 2.0)]
    save(manager, resumed, 7, 0.5, keep=2)
    assert iterations(tmp_path / "other") == [1, 2, 3, 4, 6, 7] and iterations(tmp_path / "first") == [3]


def test_a_resumed_run_in_the_same_directory_goes_on_with_its_checkpoints(tmp_path: Path) -> None:
    best = BestSoFar("validation_loss")
    save(manager_of(State(), tmp_path, keep_best=1), best, 1, 5.0, keep=1)
    (tmp_path / "link").symlink_to(tmp_path)
    for run, iteration, value in (("host:2:2", 2, 4.0), ("host:3:3", 3, 9.0), ("host:4:4", 4, 3.0)):
        newest = directory.resolve_checkpoint(tmp_path)
        best = Progress.read(newest).best
        continue_best(best, newest, save=str(tmp_path / "link"))
        best.add_run(run)
        save(manager_of(State(), tmp_path, run=run, keep_best=1), best, iteration, value, keep=1)
    assert iterations(tmp_path) == [3, 4] and best.only == [1, 2, 4] and recorded(tmp_path) == [(4, 3.0)]
    # a manifest that cannot be read is of no run, and its checkpoint is left alone
    (tmp_path / "iter_0000004" / "manifest.json").write_text("{")
    assert best_on_disk(tmp_path, best, newest=4, keep=1) == []


@pytest.mark.parametrize("name", [BEST_FILE, BEST_TRACKER])
def test_retention_goes_on_where_the_best_cannot_be_recorded(tmp_path: Path, name: str, lines: list[str]) -> None:
    manager, best = manager_of(State(), tmp_path, keep_last=1, keep_best=1), BestSoFar("validation_loss")
    save(manager, best, 1, 5.0, keep=1)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    for iteration in (2, 3, 4):
        save(manager, best, iteration, 5.0 - iteration, keep=1)
    # a tracker that could not be moved keeps the checkpoint that it names
    assert iterations(tmp_path) == ([1, 4] if name == BEST_FILE else [4])
    assert sum("the best checkpoints could not be recorded: [Errno 21]" in line for line in lines) == 3
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(UserError, match=f"{name} is not a regular file, and --keep-best .*; remove it"):
        manager_of(State(), tmp_path, keep_best=1)
    manager_of(State(), tmp_path)


def test_leftovers_of_an_interrupted_record_are_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".{name}.tmp" for name in (BEST_FILE, BEST_TRACKER)]
    for path in left:
        path.write_text("")
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left)


def test_the_best_is_recorded_before_the_run_can_be_resumed_from_it(tmp_path: Path, monkeypatch) -> None:
    manager, best, seen = manager_of(State(), tmp_path, keep_best=1), BestSoFar("validation_loss"), []
    write_tracker = directory.write_tracker
    monkeypatch.setattr(directory, "write_tracker", lambda *arguments: (
        seen.append((recorded(tmp_path), iterations(tmp_path))), write_tracker(*arguments)))
    for iteration, value in ((1, 5.0), (2, 4.0)):
        save(manager, best, iteration, value, keep=1)
    assert seen == [([(1, 5.0)], [1]), ([(2, 4.0)], [1, 2])] and iterations(tmp_path) == [2]
