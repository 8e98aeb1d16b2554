"""What both directions of a conversion share: worker threads in bounded memory, progress bar and resume log."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from mindspeed_mm.checkpoint.directory import partial_name, read_manifest, replaced_name
from mindspeed_mm.checkpoint.files import file_checksum, make_directory, remove, write_atomically
from mindspeed_mm.errors import UserError

T = TypeVar("T")

BUDGET_BYTES = 512 << 20
"""Bytes that all workers together hold, unless one indivisible tensor needs more."""
_PLAN = "plan.json"


def default_workers() -> int:
    """Default number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Two for each core, as some always wait for the disk.
    return min(8, 2 * cores)


class ByteBudget:
    """Limits the bytes that threads hold at the same time to ``BUDGET_BYTES``.

    A larger request is served alone, so that a tensor larger than the limit is still converted.
    """

    def __init__(self) -> None:
        self._limit = BUDGET_BYTES
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` more fit, and reserve them within the block."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + nbytes <= self._limit)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


class Stop(Exception):
    """Another thread failed, so this one stops."""


class ProgressBar:
    """A bar of bytes and rate on a terminal, and one line at the end."""

    def __init__(self, title: str, total: int) -> None:
        from tqdm import tqdm

        self._title, self._total, self._done = title, total, 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1000, disable=None, file=sys.stderr
        )
        self.stopped = False

    def advance(self, nbytes: int) -> None:
        """Count written bytes.

        Raises:
            Stop: if another thread failed.
        """
        if self.stopped:
            raise Stop
        with self._lock:
            # The files' own overhead is not counted.
            self._bar.update(min(nbytes, self._total - self._done))
            self._done = min(self._done + nbytes, self._total)

    def close(self) -> None:
        """End the bar; print the totals unless stopped."""
        self._bar.close()
        if self.stopped:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        print(f"{self._title}: {format_bytes(self._total)} in {seconds:.1f} s, {format_bytes(self._total / seconds)}/s")


def run_parallel(jobs: Sequence[Callable[[], T]], *, workers: int, progress: ProgressBar) -> list[T]:
    """Run all jobs on ``workers`` threads; returns their results in order.

    The first failure stops the other jobs at their next write and is raised.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            progress.stopped = True
            print("\nstopping as soon as the disk has taken what is being written", file=sys.stderr)
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        failures = [error for future in done if (error := future.exception()) is not None]
        if failures:
            progress.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise next((error for error in failures if not isinstance(error, Stop)), failures[0])
        return [future.result() for future in futures]


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn disk errors into one line with a remedy.

    Args:
        target: the directory being made; hidden files next to it are written as well.

    Raises:
        UserError: instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {target} is full; finished files are kept: free disk space and run the same command again"
            ) from error
        reason = error.strerror or str(error)
        if error.filename and not Path(error.filename).absolute().is_relative_to(target.absolute().parent):
            raise UserError(f"{error.filename} cannot be read: {reason}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"{target} cannot be written: {reason}; name another directory") from error
        raise UserError(
            f"{target} cannot be written: {reason}; finished files are kept: run the same command again, or name "
            "another directory"
        ) from error


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_bytes(count: float) -> str:
    """1234567 -> ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def check_disk_space(directory: Path, needed: int, *, replaces: bool) -> None:
    """Refuse to start if the result does not fit on the disk.

    Args:
        directory: an existing directory on the target disk.
        needed: bytes to be written.
        replaces: whether an existing result is replaced, which stays until the new one is complete.

    Raises:
        UserError: with both numbers.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        old = " (what it replaces stays until it is complete)" if replaces else ""
        raise UserError(
            f"the disk of {directory} has {format_bytes(free)} free and the result needs {format_bytes(needed)}{old}; "
            "free disk space or name another disk"
        )


class ResumeLog:
    """A hidden directory next to the target with the plan of a conversion and one record per finished file.

    A record is written after its file is flushed to disk; a file without a record is written again. Records are used
    only for the same plan, and only if the file has the recorded checksum.
    """

    def __init__(self, target: Path, plan: str) -> None:
        """
        Args:
            target: the directory being made.
            plan: fingerprint of everything that determines the bytes of the result.
        """
        self.plan = plan
        self._target = target
        self._partial = partial_name(target)
        self._directory = target.with_name(f".{target.name}.journal")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the target for this process; the system releases the lock when the process ends in any way.

        After an error, the output is removed if no file of it is finished.

        Raises:
            UserError: if another process is writing the same target.
        """
        make_directory(self._directory)
        with (self._directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is writing {self._target}; wait for it to end") from error
            try:
                yield
            except BaseException:
                if not any(self._directory.glob("*.record")):
                    remove(self._partial)
                    remove(self._directory)
                raise

    def resume(self) -> dict[str, dict[str, Any]]:
        """Records of the finished files of an interrupted run of the same plan, by file name.

        Unfinished files, and files with another checksum, are removed.
        """
        finished: dict[str, dict[str, Any]] = {}
        if self._read(_PLAN) == {"plan": self.plan}:
            records = {
                path.name.removesuffix(".record"): self._read(path.name) for path in self._directory.glob("*.record")
            }
            if records:
                print(f"checking {counted(len(records), 'file')} finished by an interrupted run")
            with ThreadPoolExecutor() as pool:
                intact = pool.map(lambda name: self._intact(name, records[name]), records)
                finished = {name: records[name] for name, good in zip(records, intact, strict=True) if good}
        if not finished:
            self.clear()
        for path in self._partial.glob("*"):
            if path.name not in finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        make_directory(self._directory)
        write_atomically(self._directory / _PLAN, json.dumps({"plan": self.plan}).encode())
        return finished

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Record a file that is flushed to disk; ``record`` has its ``size`` and ``checksum``."""
        write_atomically(self._directory / f"{name}.record", json.dumps(record).encode())

    def is_done(self) -> bool:
        """Whether an interrupted run of this plan completed the target, but did not remove the resume log."""
        if self._read(_PLAN) != {"plan": self.plan} or not self._target.exists():
            return False
        try:
            return read_manifest(self._target)["metadata"].get("plan") == self.plan
        except UserError:
            return False

    def clear(self) -> None:
        """Remove everything except the lock."""
        for path in self._directory.glob("*"):
            if path.name != "lock":
                path.unlink()

    def remove(self) -> None:
        """Remove the resume log, and the replaced target if it still exists; the new target is complete.

        The plan is removed last, so that an interrupted removal can be continued.
        """
        remove(replaced_name(self._target))
        for path in sorted(self._directory.glob("*"), key=lambda path: path.name == _PLAN):
            path.unlink()
        self._directory.rmdir()

    def _intact(self, name: str, record: dict[str, Any] | None) -> bool:
        path = self._partial / name
        if record is None or not path.is_file() or path.stat().st_size != record.get("size"):
            return False
        return file_checksum(path) == record.get("checksum")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self._directory / name).read_text())
        except (OSError, ValueError):
            return None
