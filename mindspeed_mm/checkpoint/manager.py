"""Saving, beside the training or in front of it: begun at a step boundary, agreed among the processes, committed once.

Every process writes its own part in a thread of its own. Rank 0 prepares the directory, collects what the others
wrote, adds ``.metadata``, progress and manifest, renames, and moves the tracker. A failure on any rank abandons the
save on all.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import connect_store
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.commit import gigabytes
from mindspeed_mm.checkpoint.loader import agreed_error
from mindspeed_mm.checkpoint.save_coordination import SaveCoordinator
from mindspeed_mm.checkpoint.save_directory import open_save_directory
from mindspeed_mm.checkpoint.save_job import SaveJob
from mindspeed_mm.checkpoint.shards import items_to_write
from mindspeed_mm.checkpoint.staging import StagingBuffers, check_host_memory
from mindspeed_mm.errors import UserError

_numbers = itertools.count()  # of the saves of this process, whichever saver they are of: all processes count alike
_REPORT_SECONDS = 60.0  # between two lines about a save that is waited for


class SavedState(Protocol):
    """What is saved."""

    def shared(self) -> Mapping[str, Tensor]:
        """Tensors that all processes have: spread over them, or the same on each."""

    def own(self) -> Mapping[str, Tensor]:
        """Tensors that only this process has."""

    def expected_bytes(self) -> int:
        """About what this process will write."""


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """What the flags say about saving.

    Attributes:
        root: ``--save``.
        asynchronous: ``--async-save``: write beside the training.
        keep_last: ``--keep-last``; None to keep all.
        keep_every: ``--keep-every``; None where no iteration is kept for its number.
        failure_limit: ``--save-failure-limit``: failed saves in a row that end the run.
        timeout_minutes: how long a save may be waited for in which no process gets on.
    """

    root: Path
    asynchronous: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    failure_limit: int = 3
    timeout_minutes: float = 30


class CheckpointManager:
    """Saves a run's checkpoints; all processes call every method after the same step.

    Attributes:
        failures: saves in a row that have failed; the same on all processes after ``start`` and ``wait``.
    """

    def __init__(
        self,
        state: SavedState,
        options: SaveOptions,
        *,
        backend: Backend,
        metadata: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        """Make the directory, clean it, and see that all processes find it.

        Args:
            state: what to save.
            options: how.
            backend: of the device that the state lies on.
            metadata: facts for the manifests.
            say: prints a line; called on rank 0 only.

        Raises:
            UserError: on all processes, if the directory cannot be written or is not shared, or if the copies that
                ``--async-save`` makes do not fit into the host's memory.
        """
        self.failures = 0
        self._last_error: str | None = None
        self._state, self._options, self._backend = state, options, backend
        self._metadata = dict(metadata or {})
        self._rank = dist.get_rank()
        self._say = say if self._rank == 0 else lambda line: None
        self._job: SaveJob | None = None
        # a process that was started by itself has no other store, and nobody to share it with
        self._store = connect_store("checkpoint", timeout_seconds=60) or dist.distributed_c10d._get_default_store()
        for line in open_save_directory(options.root):
            self._say(f" {options.root}: {line}")
        self._copies = StagingBuffers(pinned=backend.is_accelerator)
        # Memory is slow to come by; taken beside the first steps, it is there when the first save wants it.
        self._reserving: threading.Thread | None = None
        if options.asynchronous:
            nbytes = state.expected_bytes()
            with agreed_error():
                check_host_memory(nbytes)
            self._reserving = threading.Thread(
                target=self._copies.reserve, args=(nbytes,), name="save memory", daemon=True
            )
            self._reserving.start()

    def start(self, progress: Any) -> None:
        """Save the present state; without ``--async-save`` it is saved when this returns.

        Args:
            progress: where the run stands, a dataclass with an ``iteration``.

        Raises:
            UserError: on all processes, once too many saves in a row have failed.
        """
        self._await_previous(progress.iteration)
        started = time.perf_counter()
        shared = self._state.shared()
        items = items_to_write(shared, self._state.own(), rank=self._rank)
        if self._reserving is not None:
            self._reserving.join()
            items = self._copies.copy(items)
            self._backend.synchronize()
        self._job = SaveJob(
            items=items,
            names=list(shared),
            target=self._options.root / directory.iteration_name(progress.iteration),
            progress=dataclasses.asdict(progress),
            metadata=self._metadata,
            keep_last=self._options.keep_last,
            keep_every=self._options.keep_every,
            agreement=self._next_agreement(),
            started=started,
        )
        self._job.begin()
        # After a failure the next save is waited for, so that all processes count the failures alike.
        if not self._options.asynchronous or self.failures:
            self.wait()

    def poll(self) -> None:
        """Say so if the save in flight has ended; never waits."""
        if self._job is not None and self._job.has_ended():
            self._conclude()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: on all processes, once too many saves in a row have failed; or if this one does not end.
        """
        if self._job is not None:
            self._join(self._job)
            self._conclude()
        if self.failures >= self._options.failure_limit:
            raise UserError(
                f"{_saves(self.failures)} failed (--save-failure-limit {self._options.failure_limit}): "
                f"{self._last_error}. The newest checkpoint is {self._newest()}"
            )

    def finish(self) -> None:
        """Wait for the last save of the run.

        Raises:
            UserError: on all processes, if it failed.
        """
        self.wait()
        dist.barrier()  # whoever leaves first may take the store along, from which the others still have to hear
        if self.failures:
            raise UserError(
                f"the last checkpoint of the run was not written: {self._last_error}. "
                f"The newest checkpoint is {self._newest()}"
            )

    def abandon(self, *, seconds: float = 300.0) -> None:
        """Give a save in flight this time to end, where the run ends by an error; raises nothing."""
        if self._job is not None:
            self._job.join(seconds)
            self.poll()

    def _await_previous(self, iteration: int) -> None:
        previous, started = self._job, time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        if previous is not None and waited > 0.1:
            self._say(
                f" waited {waited:.1f} s for the save of iteration {previous.iteration} to end before that of "
                f"{iteration} could begin: a save takes longer than --save-interval steps"
            )

    def _join(self, job: SaveJob) -> None:
        """Wait for a save, saying now and then for which processes; for ever, as long as any gets on."""
        began = got_on = time.monotonic()
        beats: list[Any] = []
        while not job.join(_REPORT_SECONDS):
            now = time.monotonic()
            waited, before, beats = now - began, beats, job.beats()
            got_on = got_on if beats == before else now
            unfinished = ", ".join(map(str, job.unfinished())) or "none, rank 0 is committing"
            self._say(
                f" waiting for the save of iteration {job.iteration} for {waited:.0f} s; still writing: {unfinished}"
            )
            if now - got_on > 60 * self._options.timeout_minutes:
                raise UserError(
                    f"the save of iteration {job.iteration} has not got on for {self._options.timeout_minutes} minutes "
                    f"(--distributed-timeout-minutes); ranks still writing: {unfinished}; see to the file system of "
                    f"--save {self._options.root}"
                )

    def _conclude(self) -> None:
        job, self._job = self._job, None
        if job is None or job.conclusion is None:
            raise AssertionError("no save has ended")
        conclusion = job.conclusion
        self._last_error = conclusion.error
        if conclusion.error is None:
            self.failures = 0
            size, rate = gigabytes(conclusion.nbytes), gigabytes(conclusion.nbytes / max(job.seconds, 1e-3))
            beside = f" beside the training, which stood still for {job.stall:.2f} s"
            self._say(
                f" saved checkpoint {job.target} in {job.seconds:.1f} s{beside if self._options.asynchronous else ''} "
                f"({size}, {rate}/s)"
            )
        else:
            self.failures += 1
            self._say(
                f" warning: the checkpoint of iteration {job.iteration} was not written ({_saves(self.failures)} "
                f"failed, the run ends at {self._options.failure_limit}): {conclusion.error}. The newest checkpoint is "
                f"{self._newest()}"
            )
        for note in conclusion.notes:
            self._say(f" {note}")

    def _next_agreement(self) -> SaveCoordinator:
        return SaveCoordinator(self._store, number=next(_numbers), rank=self._rank, world_size=dist.get_world_size())

    def _newest(self) -> str:
        try:
            tracked = directory.read_tracker(self._options.root)
        except UserError as error:  # the trouble that is being reported
            return f"not known: {error}"
        if tracked is None:
            return f"none: nothing has been saved in {self._options.root}"
        return str(self._options.root / directory.checkpoint_name(tracked))


def _saves(count: int) -> str:
    return "1 save" if count == 1 else f"{count} saves in a row"
