"""A second run that would save into the same directory is refused while the first lives, and no longer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint import lock as lock_module
from mindspeed_mm.checkpoint.lock import LOCK, DirectoryLock
from mindspeed_mm.errors import UserError

HOLDER = """
import os, pathlib, sys, time
from mindspeed_mm.checkpoint.lock import LOCK, DirectoryLock
root = pathlib.Path(sys.argv[1])
lock = DirectoryLock(root / LOCK, f"--save {root}")
assert lock.acquire() is None
worker = os.fork() if "worker" in sys.argv else 1
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(lock_module, "LOCK_SECONDS", 0.3)


def lock_of(root: Path) -> DirectoryLock:
    """As a run's."""
    return DirectoryLock(root / LOCK, f"--save {root}")


@contextlib.contextmanager
def holder(root: Path, *words: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Another process that holds the lock of ``root``, and the id of its data worker if it has one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), *words], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_second_run_is_told_who_writes_there(tmp_path):
    root = tmp_path / "save dir"
    with holder(root) as (process, _):
        lock = lock_of(root)
        with pytest.raises(UserError) as refused:
            lock.acquire()
        lock.release()  # of one that holds nothing: the other's stays
        with pytest.raises(UserError):
            lock_of(root).acquire()
    text = str(refused.value)
    assert text.startswith(f"--save {root} is being written by another run (process {process.pid} on host ")
    assert os.uname().nodename in text and text.endswith(f"remove {root / LOCK}") and "\n" not in text
    assert (root / LOCK).stat().st_mode & 0o777 == 0o640


def test_death_releases_it_whatever_outlives_the_process(tmp_path):
    with holder(tmp_path, "worker") as (process, worker):
        process.kill()
        process.wait()
        try:
            os.kill(worker, 0)  # it lives, and has the same files open
            assert lock_of(tmp_path).acquire() is None
        finally:
            os.kill(worker, signal.SIGKILL)


def test_end_leaves_nothing_behind(tmp_path):
    made, found, used = tmp_path / "made", tmp_path, tmp_path / "used"
    for root in (made, found, used):
        lock = lock_of(root)
        assert lock.acquire() is None and (root / LOCK).read_text().startswith(f"process {os.getpid()} on host ")
        if root == used:
            (root / "checkpoint").touch()
        lock.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint", "used"]


def test_remedy_for_a_lost_host_works_and_the_lost_one_takes_nothing_away(tmp_path):
    """A file system may hold the lock of a host that is gone; the user removes the file."""
    lost = lock_of(tmp_path)
    assert lost.acquire() is None
    (tmp_path / LOCK).unlink()
    with holder(tmp_path) as (process, _):
        lost.release()
        assert (tmp_path / LOCK).read_text().startswith(f"process {process.pid} ")


def test_lock_file_that_its_holder_takes_away_is_not_a_lock(tmp_path, monkeypatch):
    """The first ends between our opening of its file and our locking of it; a third must not have another one."""
    lock_now, taken = fcntl.lockf, []

    def lockf(descriptor: int, operation: int) -> None:
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(descriptor)
        lock_now(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = lock_of(tmp_path)
    assert lock.acquire() is None and len(taken) == 2
    assert os.path.samestat(os.fstat(taken[1]), (tmp_path / LOCK).stat())
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_is_a_line_and_no_obstacle(tmp_path, monkeypatch, code):
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = lock_of(tmp_path)
    reason = os.strerror(code)
    assert lock.acquire() == (
        f"--save {tmp_path} could not be locked ({reason}): make sure that no second process writes there"
    )
    lock.release()
