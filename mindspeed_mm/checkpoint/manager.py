"""Synchronous and asynchronous checkpointing: staged at a step boundary, coordinated across ranks, committed by rank 0.

Every rank writes its chunks in a thread. Rank 0 prepares the directory, collects the reports of all ranks, adds
``.metadata``, progress and manifest, renames the directory and moves the tracker. A failure on any rank aborts the save
on all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import connect_store
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.files import becomes_visible, make_directory, new_file
from mindspeed_mm.checkpoint.loader import raise_on_all_ranks
from mindspeed_mm.checkpoint.save_directory import PROBE, SaveLock, remove_leftovers
from mindspeed_mm.checkpoint.save_job import SaveCoordinator, SaveJob, gigabytes
from mindspeed_mm.checkpoint.shards import StagingBuffers, check_host_memory, chunks_to_write
from mindspeed_mm.errors import UserError

logger = logging.getLogger(__name__)

_save_numbers = itertools.count()  # of the saves of this process, over all managers; the same on all ranks
_REPORT_SECONDS = 60.0  # between two log lines about a save that blocks training


class SavedState(Protocol):
    """State of a run that is saved."""

    def shared(self) -> Mapping[str, Tensor]:
        """Tensors of all ranks, sharded or replicated."""

    def own(self) -> Mapping[str, Tensor]:
        """Tensors of this rank only."""

    def expected_bytes(self) -> int:
        """Approximate number of bytes that this rank will write."""


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """Options of saving.

    Attributes:
        root: ``--save``.
        asynchronous: ``--async-save``: write from a copy in host memory while training continues.
        keep_last: ``--keep-last``; None to keep all.
        keep_every: ``--keep-every``; None for no further ones.
        failure_limit: ``--save-failure-limit``: failed saves in a row that end the run.
        timeout_minutes: time without progress on any rank after which waiting for a save fails.
    """

    root: Path
    asynchronous: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    failure_limit: int = 3
    timeout_minutes: float = 30


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
        self._state, self._options, self._backend = state, options, backend
        self._metadata = dict(metadata or {})
        self._rank = dist.get_rank()
        self._job: SaveJob | None = None
        # a process without a launcher has no other store, and no other rank
        self._store = connect_store("checkpoint", timeout_seconds=60) or dist.distributed_c10d._get_default_store()
        for line in _open_save_directory(options.root):
            self._log(logging.INFO, f"{options.root}: {line}")
        self._buffers = StagingBuffers(pinned=backend.is_accelerator)
        # Allocation is slow, so it overlaps with the first steps.
        self._reserving: threading.Thread | None = None
        if options.asynchronous:
            nbytes = state.expected_bytes()
            with raise_on_all_ranks():
                check_host_memory(nbytes)
            self._reserving = threading.Thread(
                target=self._buffers.reserve, args=(nbytes,), name="staging buffers", daemon=True
            )
            self._reserving.start()

    def start(self, progress: Any) -> None:
        """Save the present state; without ``--async-save`` it is saved on return.

        Args:
            progress: of the run, a dataclass with an ``iteration``.

        Raises:
            UserError: on all ranks, once too many saves in a row have failed.
        """
        self._wait_for_previous(progress.iteration)
        started = time.perf_counter()
        shared = self._state.shared()
        chunks = chunks_to_write(shared, self._state.own(), rank=self._rank)
        if self._reserving is not None:
            self._reserving.join()
            chunks = self._buffers.copy(chunks)
            self._backend.synchronize()
        self._job = SaveJob(
            chunks=chunks,
            names=list(shared),
            target=self._options.root / directory.iteration_name(progress.iteration),
            progress=dataclasses.asdict(progress),
            metadata=self._metadata,
            keep_last=self._options.keep_last,
            keep_every=self._options.keep_every,
            coordinator=self._new_coordinator(),
            started=started,
        )
        self._job.begin()
        # After a failure the next save is synchronous, so that all ranks count the same failures.
        if not self._options.asynchronous or self.failures:
            self.wait()

    def poll(self) -> None:
        """Log the result if the save in flight has ended; never blocks."""
        if self._job is not None and self._job.has_ended():
            self._finish_job()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: on all ranks, once too many saves in a row have failed, or if this one makes no progress.
        """
        if self._job is not None:
            self._join(self._job)
            self._finish_job()
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
        if self._job is not None:
            self._job.join(seconds)
            self.poll()

    def _wait_for_previous(self, iteration: int) -> None:
        previous, started = self._job, time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if previous is not None and waited > 0.1:
            self._log(
                logging.INFO,
                f"waited {waited:.1f} s for the save of iteration {previous.iteration} to end before that of "
                f"{iteration} could begin: a save takes longer than --save-interval steps",
            )

    def _join(self, job: SaveJob) -> None:
        """Wait for a save as long as any rank makes progress, and log the unfinished ranks at intervals."""
        began = last_progress = time.monotonic()
        heartbeats: list[Any] = []
        while not job.join(_REPORT_SECONDS):
            now = time.monotonic()
            previous, heartbeats = heartbeats, job.heartbeats()
            last_progress = last_progress if heartbeats == previous else now
            unfinished = ", ".join(map(str, job.unfinished())) or "none, rank 0 is committing"
            self._log(
                logging.INFO,
                f"waiting for the save of iteration {job.iteration} for {now - began:.0f} s; ranks still writing: "
                f"{unfinished}",
            )
            if now - last_progress > 60 * self._options.timeout_minutes:
                raise UserError(
                    f"the save of iteration {job.iteration} has made no progress for {self._options.timeout_minutes} "
                    f"minutes (--distributed-timeout-minutes); ranks still writing: {unfinished}; check the file "
                    f"system of --save {self._options.root}"
                )

    def _finish_job(self) -> None:
        job, self._job = self._job, None
        if job is None or job.result is None:
            raise AssertionError("no save has ended")
        result = job.result
        self._last_error = result.error
        if result.error is not None:
            self.failures += 1
            self._log(
                logging.WARNING,
                f"the checkpoint of iteration {job.iteration} was not written ({_saves(self.failures)} failed, the run "
                f"ends at {self._options.failure_limit}): {result.error}. The newest checkpoint is {self._newest()}",
            )
            return
        self.failures = 0
        size, rate = gigabytes(result.nbytes), gigabytes(result.nbytes / max(job.seconds, 1e-3))
        blocked = f", training blocked for {job.stall:.2f} s" if self._options.asynchronous else ""
        self._log(logging.INFO, f"saved checkpoint {job.target} in {job.seconds:.1f} s{blocked} ({size}, {rate}/s)")
        if result.deleted:
            self._log(logging.INFO, f"deleted {', '.join(result.deleted)} (--keep-last)")
        if result.retention_error is not None:
            self._log(logging.WARNING, f"an old checkpoint could not be deleted: {result.retention_error}")

    def _log(self, level: int, message: str) -> None:
        if self._rank == 0:
            logger.log(level, message)

    def _new_coordinator(self) -> SaveCoordinator:
        number = next(_save_numbers)
        return SaveCoordinator(self._store, number=number, rank=self._rank, world_size=dist.get_world_size())

    def _newest(self) -> str:
        try:
            tracked = directory.read_tracker(self._options.root)
        except UserError as error:  # the failure that is being reported
            return f"not known: {error}"
        if tracked is None:
            return f"none: nothing has been saved in {self._options.root}"
        return str(self._options.root / directory.checkpoint_name(tracked))


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
    lock = SaveLock(Path(root)) if root is not None and dist.get_rank() == 0 else None
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


def _open_save_directory(root: Path) -> list[str]:
    """Make the directory and remove leftovers of an interrupted run. Called by all ranks.

    Returns:
        On rank 0 a line for each leftover.

    Raises:
        UserError: on all ranks, if rank 0 cannot write there, or another rank does not see its files.
    """
    rank = dist.get_rank()
    probe = root / f"{PROBE}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    message: list[str | None] = [None, str(probe)]
    lines: list[str] = []
    if rank == 0:
        try:
            make_directory(root)
            lines = remove_leftovers(root)
            with new_file(probe):
                pass
        except OSError as error:
            message[0] = f"--save {root} cannot be written ({error.strerror or error}); name another directory"
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
    probe = Path(str(message[1]))
    blind: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if becomes_visible(probe) else f"rank {rank} on {socket.gethostname()}")
    if rank == 0:
        with contextlib.suppress(OSError):  # the next run removes it
            probe.unlink(missing_ok=True)
    if any(blind):
        raise UserError(
            f"--save {root} is not the same directory on all machines: {next(filter(None, blind))} does not see what "
            "rank 0 writes there; name a directory on a file system that they share"
        )
    return lines
