"""Running the parts of a conversion in parallel, in bounded memory, with a progress bar."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from mindspeed_mm.errors import UserError

T = TypeVar("T")

WRITE_BYTES = 1 << 20
"""Bytes in one write: several times faster than 16 MB at once where Linux buffers them, and quick to interrupt."""
BUDGET_BYTES = 512 << 20
"""Bytes that all workers together hold, unless one indivisible tensor needs more."""


def default_workers() -> int:
    """Threads to use when the user names no number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Two for each core, as at any time some wait for the disk.
    return min(8, 2 * cores)


class ByteBudget:
    """Keeps the bytes that threads hold at one time below ``BUDGET_BYTES``.

    A request above it is served alone, so that one tensor larger than the limit still goes through.
    """

    def __init__(self) -> None:
        self._limit = BUDGET_BYTES
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` more fit, and hold them within the block."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


class Stop(Exception):
    """Another part of the work failed; this one ends early."""


class Progress:
    """A bar of bytes and rate on a terminal; the same as one line at the end elsewhere."""

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
        """Count bytes that are written.

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
        """End the bar; print the totals if the work was done."""
        self._bar.close()
        if self.stopped:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        print(f"{self._title}: {format_bytes(self._total)} in {seconds:.1f} s, {format_bytes(self._total / seconds)}/s")


def run_parallel(jobs: Sequence[Callable[[], T]], *, workers: int, progress: Progress) -> list[T]:
    """Run all jobs on ``workers`` threads; results in the order of the jobs.

    The first failure stops the others at their next write and is raised.
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
    """Turn errors of the disk into one line that says what to do.

    Args:
        target: what is being made; hidden files beside it are written as well.

    Raises:
        UserError: instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {target} is full; finished files are kept: make room and run the same command again"
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
    """A number of bytes for people: 1234567 -> ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def check_disk_space(directory: Path, needed: int, *, replaces: bool) -> None:
    """Refuse to start where the result does not fit.

    Args:
        directory: an existing directory on the disk to be written.
        needed: bytes still to be written.
        replaces: whether something is replaced, which stays until the result is complete.

    Raises:
        UserError: with both numbers.
    """
    import shutil

    free = shutil.disk_usage(directory).free
    if free < needed:
        old = " (what it replaces stays until it is complete)" if replaces else ""
        raise UserError(
            f"the disk of {directory} has {format_bytes(free)} free and the result needs {format_bytes(needed)}{old}; "
            "make room or name another disk"
        )
