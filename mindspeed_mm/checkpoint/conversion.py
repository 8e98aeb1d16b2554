"""What both directions of a conversion share: readers, reading ahead, progress, resuming, and errors in one line."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.directory import AtomicDirectory, WrittenFile, verify_directory
from mindspeed_mm.checkpoint.huggingface import HFReader
from mindspeed_mm.checkpoint.lock import DirectoryLock
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.partial import find_base
from mindspeed_mm.checkpoint.shards import Rows
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError

T = TypeVar("T")

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
HELD_BYTES = 512 << 20
"""Bytes that are read ahead, unless one indivisible tensor needs more."""
_SPARE_BYTES = 64 << 20  # for metadata, manifest, tokenizer files and headers


def default_workers() -> int:
    """Default number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Two for each core, as some always wait for the disk.
    return min(8, 2 * cores)


def read_ahead(
    jobs: Iterable[tuple[int, Callable[[], T]]], pool: ThreadPoolExecutor, limit: int
) -> Iterator[T]:
    """Results of jobs in their order; the pool works ahead as long as the results together have ``limit`` bytes.

    Args:
        jobs: (bytes, function) of each; one that is larger than the limit is run alone.
        pool: that runs them.
        limit: in bytes.
    """
    pending: collections.deque[tuple[int, Future[T]]] = collections.deque()
    held = 0
    try:
        for nbytes, job in jobs:
            while pending and held + nbytes > limit:
                size, future = pending.popleft()
                yield future.result()
                held -= size
            pending.append((nbytes, pool.submit(job)))
            held += nbytes
        while pending:
            yield pending.popleft()[1].result()
    finally:
        for _, future in pending:
            future.cancel()


def open_reader(
    checkpoint: Path, manifest: Mapping[str, Any], *, base_dir: str | Path | None, check: bool = True,
    expert_layout: str = "auto",
) -> Any:
    """The tensors of a checkpoint, and for a partial one those of its base.

    Args:
        checkpoint: its directory.
        manifest: its manifest.
        base_dir: where the base is now; None for where it was.
        check: compare checksums.
        expert_layout: of a base that is a Hugging Face directory.

    Raises:
        UserError: if the checkpoint or its base is damaged, or the base is missing or another one.
    """
    mode = "read" if check else "sizes"
    reader = CheckpointReader(checkpoint, manifest, check=mode)
    moved_to = None if base_dir is None else str(base_dir)
    base = find_base(manifest, checkpoint, moved_to=moved_to, option="--base_dir")
    if base is None:
        return reader
    path = Path(base.path)
    if base.kind == "huggingface":
        return PartialReader(reader, HFReader(path, expert_layout=expert_layout))
    return PartialReader(reader, CheckpointReader(path, verify_directory(path), check=mode))


class PartialReader:
    """A checkpoint's tensors, and from its base the parameters that it does not hold.

    Attributes:
        base: reader of the base.
    """

    def __init__(self, own: CheckpointReader, base: CheckpointReader | HFReader) -> None:
        self._own, self.base, self.path = own, base, own.path
        parameters = {name: entry for name, entry in base.tensors.items() if name.startswith(MODEL_PREFIX)}
        self.tensors = {**parameters, **own.tensors}

    def _of(self, name: str) -> Any:
        return self._own if name in self._own.tensors else self.base

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """See ``CheckpointReader``."""
        return self._of(name).read(name, rows)

    def ranges(self, name: str) -> list[Rows]:
        """See ``CheckpointReader``."""
        return self._of(name).ranges(name)

    def verify_whole_files(self, names: Iterable[str], announce: Callable[[str], None]) -> None:
        """See ``CheckpointReader``."""
        names = set(names)
        self._own.verify_whole_files(names & self._own.tensors.keys(), announce)
        self.base.verify_whole_files(names - self._own.tensors.keys(), announce)


class ProgressBar:
    """A bar of bytes and rate on a terminal, and one line at the end."""

    def __init__(self, title: str) -> None:
        self._title, self._total, self._done = title, 0, 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._stopped = False

    def begin(self, total: int) -> None:
        """Show the bar."""
        from tqdm import tqdm

        self._total = total
        self._bar = tqdm(
            total=total, desc=self._title, unit="B", unit_scale=True, unit_divisor=1000, disable=None, file=sys.stderr
        )

    def advance(self, nbytes: int) -> None:
        """Count bytes; raises once stopped."""
        if self._stopped:
            raise InterruptedError("stopped")
        with self._lock:
            # The files' own overhead is not counted.
            self._bar.update(min(nbytes, self._total - self._done))
            self._done = min(self._done + nbytes, self._total)

    def stop(self) -> None:
        """Let the threads that still write stop at their next write."""
        self._stopped = True

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def print_totals(self) -> None:
        """Print bytes, seconds and rate."""
        self.close()
        seconds = max(time.monotonic() - self._started, 1e-9)
        print(f"{self._title}: {format_bytes(self._total)} in {seconds:.1f} s, {format_bytes(self._total / seconds)}/s")


@contextlib.contextmanager
def resumable(directory: AtomicDirectory, plan: str) -> Iterator[dict[str, WrittenFile]]:
    """The finished files of an interrupted conversion; after an error, remove a partial directory without any."""
    directory.check()  # again, as another process may have held the lock until now
    try:
        with _ended_by_sigterm():
            yield directory.resume(plan)
    except BaseException:
        directory.abandon()
        raise


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process by an exception, as Ctrl-C does, unless the caller has a handler of its own."""
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no handler can be set
    default = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    lock = DirectoryLock(target.with_name(f".{target.name}.lock"), str(target))
    if warning := lock.acquire():
        print(f"warning: {warning}", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


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


def remaining(directory: AtomicDirectory, nbytes: int, finished: Mapping[str, WrittenFile]) -> int:
    """Bytes that are still to be written.

    Raises:
        UserError: if they do not fit on the disk.
    """
    kept = sum(file.size for file in finished.values())
    if finished:
        print(f"resuming: {counted(len(finished), 'file')} ({format_bytes(kept)}) are already written and verified")
    needed = max(0, nbytes - kept)
    free = shutil.disk_usage(directory.partial).free
    if free < needed + _SPARE_BYTES:
        old = " (what it replaces stays until it is complete)" if directory.target.exists() else ""
        raise UserError(
            f"the disk of {directory.target.parent} has {format_bytes(free)} free and the result needs "
            f"{format_bytes(needed + _SPARE_BYTES)}{old}; free disk space or name another disk"
        )
    return needed


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
