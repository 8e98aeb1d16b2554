"""One save: every rank writes its files in a thread, and rank 0 commits the checkpoint.

Ranks coordinate through the key-value store of the process group, so neither collectives nor the main thread are
needed. The store is polled, never waited on: a wait would block the training's own use of it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
import socket
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.dcp_format import StoredChunk, write_metadata
from mindspeed_mm.checkpoint.dcp_writer import RankFile, SaveAborted, write_rank_files
from mindspeed_mm.checkpoint.files import becomes_visible, new_file, remove
from mindspeed_mm.checkpoint.save_directory import delete_old_checkpoints, remove_leftovers
from mindspeed_mm.checkpoint.shards import Chunk, total_bytes
from mindspeed_mm.errors import UserError

_POLL_SECONDS = (0.002, 0.1)  # between two polls of the store: at first, and after a second
_RESULT, _FAILURE, _READY = "result", "failure", "ready"
_OVERHEAD = 0.01  # of archives, metadata and manifest, relative to the values
_SPARE_BYTES = 16 << 20
_STOPPED = "stopped because another rank failed"
_HEARTBEAT_SECONDS = 0.5  # between two heartbeats, each with a look whether another rank has failed


class SaveCoordinator:
    """Coordination of one save: plans to rank 0, permission to write, reports to rank 0, result to all ranks.

    Attributes:
        rank: of this process.
    """

    def __init__(self, store: dist.Store, *, number: int, rank: int, world_size: int) -> None:
        """
        Args:
            store: of the process group.
            number: of this save, the same on all ranks.
            rank: of this process.
            world_size: number of ranks.
        """
        self.rank = rank
        self._store = dist.PrefixStore(f"checkpoint/{number}", store)
        self._world_size = world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank commits the checkpoint."""
        return self.rank == 0

    def send_plan(self, content: Any) -> None:
        """Send rank 0, before anything is written, what this rank is going to write."""
        self._set(f"plan/{self.rank}", content)

    def collect_plans(self) -> list[Any]:
        """On rank 0: the plans of all ranks."""
        return [self._get(f"plan/{rank}") for rank in range(self._world_size)]

    def allow_writing(self) -> None:
        """On rank 0: let the other ranks write."""
        self._set(_READY, True)

    def wait_for_permission(self) -> bool:
        """Wait for rank 0; returns whether to write, False if rank 0 has aborted the save."""
        self._poll(lambda: self._has(_READY) or self._has(_RESULT))
        return self._has(_READY)

    def send_report(self, content: Any, *, failed: bool = False) -> None:
        """Send rank 0 what this rank has written, or its error; ``failed`` stops the other ranks."""
        if failed:
            self._set(_FAILURE, True)
        self._set(f"report/{self.rank}", content)

    def has_failed(self) -> bool:
        """Whether any rank has failed to write."""
        return self._has(_FAILURE)

    def send_heartbeat(self, count: int) -> None:
        """Show the other ranks that this one makes progress: ``count`` increases from call to call."""
        self._store.set(f"heartbeat/{self.rank}", str(count))

    def heartbeats(self) -> list[bytes | None]:
        """The last heartbeat of each rank; the same list twice means that no rank has made progress."""
        keys = [f"heartbeat/{rank}" for rank in range(self._world_size)]
        return [self._store.get(key) if self._has(key) else None for key in keys]

    def collect_reports(self) -> list[Any]:
        """On rank 0: the reports of all ranks, once every rank has stopped writing."""
        return [self._get(f"report/{rank}") for rank in range(self._world_size)]

    def send_result(self, content: Any) -> None:
        """On rank 0: send the result of the save to the other ranks."""
        self._set(_RESULT, content)

    def wait_for_result(self) -> Any:
        """The result of the save, once rank 0 has sent it."""
        return self._get(_RESULT)

    def unfinished_ranks(self) -> list[int]:
        """Ranks that have not reported yet."""
        return [rank for rank in range(self._world_size) if not self._has(f"report/{rank}")]

    def clear(self) -> None:
        """On rank 0: remove plans and reports, which can be megabytes, from the store."""
        for rank in range(self._world_size):
            for kind in ("plan", "report"):
                self._store.delete_key(f"{kind}/{rank}")

    def _set(self, key: str, content: Any) -> None:
        self._store.set(key, zlib.compress(json.dumps(content).encode(), 1))

    def _get(self, key: str) -> Any:
        self._poll(lambda: self._has(key))
        return json.loads(zlib.decompress(self._store.get(key)))

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _poll(self, condition: Callable[[], bool]) -> None:
        started = time.monotonic()
        while not condition():
            time.sleep(_POLL_SECONDS[time.monotonic() - started > 1.0])


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """Result of a save, the same on all ranks.

    Attributes:
        error: why there is no checkpoint; None if there is one.
        nbytes: of the values of all ranks.
        deleted: names of checkpoints deleted by retention.
        retention_error: why old checkpoints could not be deleted.
    """

    error: str | None
    nbytes: int = 0
    deleted: Sequence[str] = ()
    retention_error: str | None = None


class SaveJob:
    """Writes the chunks of this rank in a thread; on rank 0 also prepares and commits the checkpoint.

    Attributes:
        iteration: of the checkpoint.
        target: directory of the checkpoint.
        stall: seconds for which the training was blocked, until ``begin`` returned.
        seconds: from the start to the result.
        result: once the thread has ended.
    """

    def __init__(
        self,
        *,
        chunks: Sequence[Chunk],
        names: Sequence[str],
        target: Path,
        progress: Mapping[str, Any],
        metadata: Mapping[str, Any],
        keep_last: int | None,
        keep_every: int | None,
        coordinator: SaveCoordinator,
        started: float,
    ) -> None:
        """
        Args:
            chunks: of this rank; must not change until the thread has ended.
            names: of all tensors that the checkpoint must contain.
            target: directory of the checkpoint.
            progress: of the run, with its ``iteration``.
            metadata: facts for the manifest.
            keep_last: number of checkpoints to keep; None for all.
            keep_every: keep those whose iteration is a multiple of this.
            coordinator: of this save.
            started: ``time.perf_counter`` at the start of the save.
        """
        self.iteration: int = progress["iteration"]
        self.target = target
        self.stall = self.seconds = 0.0
        self.result: SaveResult | None = None
        self._names = names
        self._chunks, self._progress, self._metadata = chunks, progress, metadata
        self._keep_last, self._keep_every = keep_last, keep_every
        self._coordinator, self._started = coordinator, started
        self._last_heartbeat, self._heartbeats = 0.0, 0
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)

    def begin(self) -> None:
        """Start to write; returns at once."""
        self._thread.start()
        self.stall = time.perf_counter() - self._started

    def has_ended(self) -> bool:
        """Whether there is a result."""
        return not self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Wait at most this long for the result; returns whether there is one."""
        self._thread.join(timeout=seconds)
        return self.has_ended()

    def unfinished(self) -> list[int]:
        """Ranks that are still writing."""
        return self._coordinator.unfinished_ranks()

    def heartbeats(self) -> list[Any]:
        """A value that changes as long as any rank makes progress."""
        return [*self._coordinator.heartbeats(), self.unfinished()]

    def _run(self) -> None:
        try:
            result = self._save_and_commit() if self._coordinator.is_main else self._save()
        except Exception as error:  # the store is gone, or a bug: the main thread must report it
            result = SaveResult(f"{self._describe_rank()}: {_describe(error)}")
        self.seconds = time.perf_counter() - self._started
        self.result = result

    def _save(self) -> SaveResult:
        coordinator = self._coordinator
        coordinator.send_plan(total_bytes(self._chunks))
        if coordinator.wait_for_permission():
            self._write()
        return SaveResult(**coordinator.wait_for_result())

    def _save_and_commit(self) -> SaveResult:
        coordinator = self._coordinator
        coordinator.send_plan(total_bytes(self._chunks))
        nbytes = sum(coordinator.collect_plans())
        try:
            partial = _prepare(self.target, nbytes=nbytes)
        except Exception as error:
            result = SaveResult(self._explain(error))
        else:
            coordinator.allow_writing()
            self._write()
            result = self._commit(partial, coordinator.collect_reports(), nbytes)
        coordinator.send_result(dataclasses.asdict(result))
        coordinator.clear()
        return result

    def _write(self) -> None:
        """Write the files of this rank and report them, or the error."""
        partial = directory.partial_name(self.target)
        try:
            if not becomes_visible(partial):
                raise UserError(
                    f"{partial}, made by rank 0, is not visible here; --save must be on a file system that all "
                    "machines share"
                )
            files = write_rank_files(
                partial, self._chunks, rank=self._coordinator.rank, should_continue=self._should_continue
            )
        except SaveAborted:
            self._coordinator.send_report({"error": f"{self._describe_rank()}: {_STOPPED}"})
        except Exception as error:
            self._coordinator.send_report({"error": self._explain(error)}, failed=True)
        else:
            self._coordinator.send_report({"files": [file.to_json() for file in files]})

    def _should_continue(self) -> bool:
        now = time.monotonic()
        if now - self._last_heartbeat < _HEARTBEAT_SECONDS:
            return True
        self._last_heartbeat = now
        self._heartbeats += 1
        self._coordinator.send_heartbeat(self._heartbeats)
        return not self._coordinator.has_failed()

    def _commit(self, partial: Path, reports: Sequence[Mapping[str, Any]], nbytes: int) -> SaveResult:
        errors = [report["error"] for report in reports if "error" in report]
        if not errors:
            try:
                _commit(
                    partial,
                    self.target,
                    names=self._names,
                    files=[RankFile.from_json(file) for report in reports for file in report["files"]],
                    progress=self._progress,
                    metadata=self._metadata,
                )
            except Exception as error:
                errors = [self._explain(error)]
        if errors:
            remove(partial)  # all ranks have reported, so none is writing there
            causes = [error for error in errors if not error.endswith(_STOPPED)] or errors
            more = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
            return SaveResult(causes[0] + more)
        return self._apply_retention(SaveResult(None, nbytes))

    def _apply_retention(self, result: SaveResult) -> SaveResult:
        if self._keep_last is None:
            return result
        try:
            deleted = delete_old_checkpoints(
                self.target.parent, newest=self.iteration, keep_last=self._keep_last, keep_every=self._keep_every
            )
        except (OSError, UserError) as error:
            return dataclasses.replace(result, retention_error=str(error))
        return dataclasses.replace(result, deleted=[directory.iteration_name(iteration) for iteration in deleted])

    def _explain(self, error: Exception) -> str:
        """One line: rank, file, cause, and the free disk space if that is the cause."""
        text = f"{self._describe_rank()}: {_describe(error)}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = gigabytes(shutil.disk_usage(self.target.parent).free)
            text += f" ({free} free); free disk space, or let --keep-last delete old checkpoints"
        elif isinstance(error, OSError):
            text += "; check the disk or the file system of --save"
        return text

    def _describe_rank(self) -> str:
        return f"rank {self._coordinator.rank} on {socket.gethostname()}"


def _prepare(target: Path, *, nbytes: int) -> Path:
    """Remove leftovers of earlier saves, check the disk space, and make the directory to write into.

    Args:
        target: directory of the checkpoint.
        nbytes: of the values of all ranks.

    Raises:
        UserError: if the disk has less space than is needed.
        OSError: if the directory cannot be made.
    """
    remove_leftovers(target.parent)
    needed = int(nbytes * (1 + _OVERHEAD)) + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"{target.parent} has {gigabytes(free)} free and the checkpoint needs {gigabytes(needed)}; free disk "
            "space, or let --keep-last delete old checkpoints"
        )
    return directory.prepare_directory(target, overwrite=True)


def _commit(
    partial: Path,
    target: Path,
    *,
    names: Sequence[str],
    files: Sequence[RankFile],
    progress: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Complete the checkpoint in ``partial``, rename it to ``target``, and point the tracker to it.

    Raises:
        UserError: if a file is missing.
        OSError: if writing failed; the tracker then still points to the previous checkpoint.
    """
    chunks = [chunk for file in files for chunk in file.chunks]
    _check_complete(chunks, names)
    write_metadata(partial / directory.METADATA, chunks)
    with new_file(partial / directory.PROGRESS_FILE) as output:
        output.write(json.dumps(dict(progress), indent=1).encode())
    written = {file.name: file.written for file in files}
    directory.finish_directory(partial, target, metadata, overwrite=True, written=written)
    directory.write_tracker(target.parent, progress["iteration"])


def gigabytes(count: float) -> str:
    """12345678901 -> ``12.35 GB``."""
    return f"{count / 1e9:.2f} GB"


def _check_complete(chunks: Sequence[StoredChunk], names: Sequence[str]) -> None:
    """Every element of every tensor is stored once; anything else is a bug."""
    by_tensor: dict[str, dict[tuple[int, ...], StoredChunk]] = {}
    for chunk in chunks:
        by_offsets = by_tensor.setdefault(chunk.name, {})
        if chunk.offsets in by_offsets:
            raise AssertionError(f"{chunk.name} at {chunk.offsets} was written twice")
        by_offsets[chunk.offsets] = chunk
    if missing := set(names) - by_tensor.keys():
        raise AssertionError(f"{min(missing)} was not written")
    for name, by_offsets in by_tensor.items():
        expected = math.prod(next(iter(by_offsets.values())).global_shape)
        stored = sum(math.prod(chunk.shape) for chunk in by_offsets.values())
        if stored != expected:
            raise AssertionError(f"{stored} of {expected} elements of {name} were written")


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} could not be written: {error.strerror or error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(frame.filename).name}:{frame.lineno})"
