"""Synchronous and asynchronous saves of a run's checkpoints, by torch's ``async_save``.

torch plans, writes and coordinates the ranks, in a thread and over a gloo group; a failure on any rank fails the save
on all. On rank 0 the writer calls back here: to prepare the directory before any rank writes, and to commit the
checkpoint, move the tracker and delete old checkpoints once all have written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import host_group
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.best import best_of_progress, check_best_files, write_best
from mindspeed_mm.checkpoint.files import becomes_visible, make_directory, new_file, remove
from mindspeed_mm.checkpoint.lock import LOCK, DirectoryLock
from mindspeed_mm.checkpoint.save_directory import (
    PROBE,
    best_on_disk,
    delete_old_checkpoints,
    remove_leftovers,
)
from mindspeed_mm.checkpoint.shards import Shard, Stager, check_host_memory
from mindspeed_mm.checkpoint.state import raise_on_all_ranks
from mindspeed_mm.checkpoint.storage import CheckpointWriter, SavePlanner
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 60.0  # between two log lines about a save that blocks training
_OVERHEAD = 0.01  # of archives, metadata and manifest, relative to the values
_SPARE_BYTES = 16 << 20


class SavedState(Protocol):
    """State of a run that is saved."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Tensors of this rank by name: shards, replicas of which torch writes one, and tensors of this rank only."""

    def expected_bytes(self) -> int:
        """Approximate number of bytes that this rank holds."""


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """Options of saving.

    Attributes:
        root: ``--save``.
        asynchronous: ``--async-save``: write from a copy in host memory while training continues.
        keep_last: ``--keep-last``; None to keep all.
        keep_every: ``--keep-every``; None for no further ones.
        keep_best: ``--keep-best``.
        failure_limit: ``--save-failure-limit``: failed saves in a row that end the run.
        timeout_minutes: time without progress on any rank after which waiting for a save fails.
        complete: adds files to the directory of a checkpoint, on rank 0, once its tensors are on disk.
        complete_bytes: size of these files.
        in_use: iterations that must not be deleted now; others change it.
    """

    root: Path
    asynchronous: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: int = 0
    failure_limit: int = 3
    timeout_minutes: float = 30
    complete: Callable[[Path], None] | None = None
    complete_bytes: int = 0
    in_use: set[int] = dataclasses.field(default_factory=set)

    @property
    def retention(self) -> str:
        """The flags by which old checkpoints are deleted."""
        flags = {"--keep-last": self.keep_last is not None, "--keep-best": bool(self.keep_best)}
        return ", ".join(flag for flag, given in flags.items() if given)


@dataclasses.dataclass
class _Save:
    """A save in flight.

    Attributes:
        iteration: of the checkpoint.
        directory: of the checkpoint.
        future: torch's.
        stall: seconds for which training was blocked.
        seconds: from the start to the end.
        nbytes: of the values of all ranks; on rank 0.
        deleted: iterations deleted by retention; on rank 0.
        warnings: what else did not succeed: to record the best checkpoints, to delete old ones; on rank 0.
    """

    iteration: int
    directory: directory.AtomicDirectory
    future: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)
    stall: float = 0.0
    seconds: float = 0.0
    nbytes: int = 0
    deleted: list[int] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


class CheckpointManager:
    """Saves a run's checkpoints; all ranks call every method after the same step. Rank 0 logs.

    Attributes:
        failures: saves in a row that have failed; the same on all ranks after ``start`` and ``wait``.
    """

    def __init__(
        self,
        state: SavedState,
        options: SaveOptions,
        *,
        backend: Backend,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the directory, remove leftovers in it, and check that all ranks share it.

        Args:
            state: to save.
            options: of saving.
            backend: of the device that holds the state.
            metadata: facts for the manifests.

        Raises:
            UserError: on all ranks, if the directory cannot be written or is not shared, or if the staging buffers of
                ``--async-save`` do not fit into host memory.
        """
        self.failures = 0
        self._last_error: str | None = None
        self._state, self._options = state, options
        self._metadata = dict(metadata or {})
        self._rank = dist.get_rank()
        host_group()  # made here, on all ranks, and not kept, so that shutdown_distributed ends its threads
        self._save: _Save | None = None
        self._hosts, lines = _open_save_directory(options.root, keep_best=bool(options.keep_best))
        for line in lines:
            self._log(logging.INFO, f"{options.root}: {line}")
        self._stager = Stager(backend) if options.asynchronous else None
        # Allocation is slow, so it overlaps with the first steps.
        self._reserving: threading.Thread | None = None
        if self._stager is not None:
            nbytes = state.expected_bytes()
            with raise_on_all_ranks():
                check_host_memory(nbytes)
            self._reserving = threading.Thread(
                target=self._stager.reserve, args=(nbytes,), name="staging buffers", daemon=True
            )
            self._reserving.start()

    @property
    def in_use(self) -> set[int]:
        """Iterations that retention leaves for later; whoever reads a checkpoint adds it."""
        return self._options.in_use

    def start(self, progress: Any) -> None:
        """Save the present state; without ``--async-save`` it is saved on return.

        Args:
            progress: of the run, a dataclass with an ``iteration``.

        Raises:
            UserError: on all ranks, once too many saves in a row have failed.
        """
        self._wait_for_previous(progress.iteration)
        started = time.perf_counter()
        target = self._options.root / directory.iteration_name(progress.iteration)
        save = self._save = _Save(progress.iteration, directory.AtomicDirectory(target, overwrite=True))
        facts = dataclasses.asdict(progress)
        writer = CheckpointWriter(
            save.directory.partial,
            prepare=lambda nbytes: self._prepare(save, nbytes),
            commit=lambda files: self._commit(save, facts, files),
            stager=self._stager,
        )
        shards = {name: Shard.of(tensor) for name, tensor in self._state.state_dict().items()}
        if self._reserving is not None:
            self._reserving.join()
        save.future = dcp.async_save(  # a synchronous save has no stager, and is waited for
            shards, storage_writer=writer, planner=SavePlanner(), process_group=host_group()
        )
        save.future.add_done_callback(lambda _: setattr(save, "seconds", time.perf_counter() - started))
        save.stall = time.perf_counter() - started
        # After a failure the next save is synchronous, so that all ranks count the same failures.
        if not self._options.asynchronous or self.failures:
            self.wait()

    def poll(self) -> None:
        """Log the result if the save in flight has ended; never blocks."""
        if self._save is not None and self._save.future.done():
            self._finish_save()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: on all ranks, once too many saves in a row have failed, or if this one makes no progress.
        """
        if self._save is not None:
            self._join(self._save)
            self._finish_save()
        if self.failures >= self._options.failure_limit:
            raise UserError(
                f"{_saves(self.failures)} failed (--save-failure-limit {self._options.failure_limit}): "
                f"{self._last_error}. The newest checkpoint is {self._newest()}"
            )

    def finish(self) -> None:
        """Wait for the last save of the run.

        Raises:
            UserError: on all ranks, if it failed.
        """
        self.wait()
        dist.barrier()  # the rank that hosts the store must not leave before the others have the result
        if self.failures:
            raise UserError(
                f"the last checkpoint of the run was not written: {self._last_error}. "
                f"The newest checkpoint is {self._newest()}"
            )

    def abandon(self, *, seconds: float = 300.0) -> None:
        """Wait at most this long for a save in flight when the run ends with an error; raises nothing."""
        if self._save is not None:
            concurrent.futures.wait([self._save.future], timeout=seconds)
            self.poll()

    def _prepare(self, save: _Save, nbytes: int) -> None:
        """On rank 0: clean up after earlier saves, check the disk space, and make the directory to write into."""
        save.nbytes, root = nbytes, self._options.root
        if not is_directory(root):
            self._log(logging.WARNING, f"--save {root} was removed during training and is recreated")
            make_directory(root)
        remove_leftovers(root)
        needed = int(nbytes * (1 + _OVERHEAD)) + self._options.complete_bytes + _SPARE_BYTES
        free = shutil.disk_usage(root).free
        if free < needed:
            raise UserError(
                f"{root} has {_gigabytes(free)} free and the checkpoint needs {_gigabytes(needed)}; free disk space, "
                "or let --keep-last delete old checkpoints"
            )
        save.directory.prepare()

    def _commit(
        self, save: _Save, progress: Mapping[str, Any], files: Mapping[str, directory.WrittenFile]
    ) -> None:
        """On rank 0: complete the checkpoint, record the best, point the tracker to it, and delete old ones."""
        with new_file(save.directory.partial / directory.PROGRESS_FILE) as output:
            output.write(json.dumps(progress, indent=1).encode())
        if self._options.complete is not None:
            self._options.complete(save.directory.partial)
        save.directory.commit(self._metadata, files)
        root, options = self._options.root, self._options
        best = best_of_progress(progress) if options.keep_best else None
        if best is not None:  # before the tracker: a finished run is not resumed, which would make up for it
            try:
                write_best(root, best, best_on_disk(root, best, newest=save.iteration, keep=options.keep_best))
            except OSError as error:
                save.warnings.append(f"the best checkpoints could not be recorded: {error}")
        directory.write_tracker(root, save.iteration)
        try:
            if options.keep_last is not None or best is not None:
                save.deleted = delete_old_checkpoints(
                    root, newest=save.iteration, keep_last=options.keep_last, keep_every=options.keep_every,
                    in_use=tuple(options.in_use), best=best, keep_best=options.keep_best,
                )
        except (OSError, UserError) as error:
            save.warnings.append(f"an old checkpoint could not be deleted: {error}")

    def _wait_for_previous(self, iteration: int) -> None:
        previous, started = self._save, time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if previous is not None and waited > 0.1:
            self._log(
                logging.INFO,
                f"waited {waited:.1f} s for the save of iteration {previous.iteration} to end before that of "
                f"{iteration} could begin: a save takes longer than --save-interval steps",
            )

    def _join(self, save: _Save) -> None:
        """Wait for a save as long as any rank makes progress, and log that at intervals."""
        began = last_progress = time.monotonic()
        on_disk = -1
        while not concurrent.futures.wait([save.future], timeout=_REPORT_SECONDS).done:
            now = time.monotonic()
            previous, on_disk = on_disk, _bytes_below(save.directory.partial)
            last_progress = last_progress if on_disk == previous else now
            status = f"{_gigabytes(on_disk)} on disk"
            self._log(
                logging.INFO,
                f"waiting for the save of iteration {save.iteration} for {now - began:.0f} s; {status}",
            )
            if now - last_progress > 60 * self._options.timeout_minutes:
                raise UserError(
                    f"the save of iteration {save.iteration} has made no progress for {self._options.timeout_minutes} "
                    f"minutes (--distributed-timeout-minutes), {status}; check the file system of --save "
                    f"{self._options.root}"
                )

    def _finish_save(self) -> None:
        save, self._save = self._save, None
        if save is None:
            raise AssertionError("no save has ended")
        error = save.future.exception()
        self._last_error = None if error is None else self._explain(error)
        if error is not None:
            self.failures += 1
            if self._rank == 0:
                remove(save.directory.partial)
            self._log(
                logging.WARNING,
                f"the checkpoint of iteration {save.iteration} was not written ({_saves(self.failures)} failed, the "
                f"run ends at {self._options.failure_limit}): {self._last_error}. The newest checkpoint is "
                f"{self._newest()}",
            )
            return
        self.failures = 0
        size, rate = _gigabytes(save.nbytes), _gigabytes(save.nbytes / max(save.seconds, 1e-3))
        blocked = f", training blocked for {save.stall:.2f} s" if self._options.asynchronous else ""
        self._log(
            logging.INFO,
            f"saved checkpoint {save.directory.target} in {save.seconds:.1f} s{blocked} ({size}, {rate}/s)",
        )
        if save.deleted:
            names = ", ".join(directory.iteration_name(iteration) for iteration in save.deleted)
            self._log(logging.INFO, f"deleted {names} ({self._options.retention})")
        for line in save.warnings:
            self._log(logging.WARNING, line)

    def _explain(self, error: BaseException) -> str:
        """One line: rank, file, cause, and the free disk space if that is the cause."""
        if not isinstance(error, CheckpointException):
            text = " ".join(str(error).split())
            return f"the ranks lost contact, see the log of the rank that ended first ({type(error).__name__}: {text})"
        (rank, (cause, frames)), *others = sorted(error.failures.items())
        text = f"rank {rank} on {self._hosts[rank]}: {cause}"
        if isinstance(cause, OSError):
            text = f"rank {rank} on {self._hosts[rank]}: {cause.filename or 'a file'} could not be written: "
            text += cause.strerror or str(cause)
            if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                free = _gigabytes(shutil.disk_usage(self._options.root).free)
                text += f" ({free} free); free disk space, or let --keep-last delete old checkpoints"
            else:
                text += "; check the disk or the file system of --save"
        elif not isinstance(cause, UserError):
            text = f"rank {rank} on {self._hosts[rank]}: {type(cause).__name__}: {' '.join(str(cause).split())} "
            text += f"({Path(frames[-1].filename).name}:{frames[-1].lineno})"
        return text + (f" (and {len(others)} more)" if others else "")

    def _log(self, level: int, message: str) -> None:
        if self._rank == 0:
            logger.log(level, message)

    def _newest(self) -> str:
        try:
            tracked = directory.read_tracker(self._options.root)
        except UserError as error:  # the failure that is being reported
            return f"not known: {error}"
        if tracked is None:
            return f"none: nothing has been saved in {self._options.root}"
        return str(self._options.root / directory.checkpoint_name(tracked))


def _gigabytes(count: float) -> str:
    """12345678901 -> ``12.35 GB``."""
    return f"{count / 1e9:.2f} GB"


def _bytes_below(path: Path) -> int:
    """Bytes of the files in a directory that other processes write."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path))
    except OSError:  # not yet made, or just renamed
        return 0


def _saves(count: int) -> str:
    return "1 save" if count == 1 else f"{count} saves in a row"


@contextlib.contextmanager
def locked_save_directory(root: str | None) -> Iterator[None]:
    """Keep other runs from saving into ``root`` inside the block. Entered by all ranks.

    Args:
        root: ``--save``; nothing is locked for None.

    Raises:
        UserError: on all ranks, if another run is saving there.
    """
    lock = DirectoryLock(Path(root) / LOCK, f"--save {root}") if root is not None and dist.get_rank() == 0 else None
    try:
        if root is not None:
            with raise_on_all_ranks():
                warning = lock.acquire() if lock is not None else None
            if warning is not None:
                logger.warning(warning)
        yield
    finally:
        if lock is not None:
            lock.release()


def _open_save_directory(root: Path, *, keep_best: bool = False) -> tuple[list[str], list[str]]:
    """Make the directory and remove leftovers of an interrupted run. Called by all ranks.

    Returns:
        The host of each rank; on rank 0 a line for each leftover.

    Raises:
        UserError: on all ranks, if rank 0 cannot write there, something is in the way of the files of ``--keep-best``,
            or another rank does not see its files.
    """
    rank = dist.get_rank()
    probe = root / f"{PROBE}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    message: list[str | None] = [None, str(probe)]
    lines: list[str] = []
    if rank == 0:
        try:
            make_directory(root)
            lines = remove_leftovers(root)
            if keep_best:
                check_best_files(root)
            with new_file(probe):
                pass
        except OSError as error:
            message[0] = f"--save {root} cannot be written ({error.strerror or error}); name another directory"
        except UserError as error:
            message[0] = str(error)
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
    probe = Path(str(message[1]))
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (socket.gethostname(), becomes_visible(probe)))
    if rank == 0:
        with contextlib.suppress(OSError):  # the next run removes it
            probe.unlink(missing_ok=True)
    blind = [f"rank {number} on {host}" for number, (host, visible) in enumerate(seen) if not visible]
    if blind:
        raise UserError(
            f"--save {root} is not the same directory on all machines: {blind[0]} does not see what rank 0 writes "
            "there; name a directory on a file system that they share"
        )
    return [host for host, _ in seen], lines
