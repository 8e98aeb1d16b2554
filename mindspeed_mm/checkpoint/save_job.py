"""One save of one process, in a thread of its own from the first write to the conclusion."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint import commit, directory, retention
from mindspeed_mm.checkpoint.save_coordination import SaveCoordinator
from mindspeed_mm.checkpoint.save_directory import appears
from mindspeed_mm.checkpoint.shard_writer import Abandoned, write_shards
from mindspeed_mm.checkpoint.shards import Item, bytes_of
from mindspeed_mm.errors import UserError

_GAVE_UP = "gave up because another process did"
_ASK_SECONDS = 0.5  # between two questions whether another process has failed


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """What came of a save, the same on all processes.

    Attributes:
        error: why there is no checkpoint; None if there is one.
        nbytes: of all processes' values.
        notes: lines to print.
    """

    error: str | None
    nbytes: int = 0
    notes: Sequence[str] = ()


class SaveJob:
    """Writes this process's part; on rank 0 also all that is done once.

    Attributes:
        iteration: that is saved.
        target: place of the checkpoint.
        stall: seconds for which the training stood still, until ``begin`` returned.
        seconds: from the start to the conclusion.
        conclusion: once the thread has ended.
    """

    def __init__(
        self,
        *,
        items: Sequence[Item],
        names: Sequence[str],
        target: Path,
        progress: Mapping[str, Any],
        metadata: Mapping[str, Any],
        keep_last: int | None,
        keep_every: int | None,
        agreement: SaveCoordinator,
        started: float,
    ) -> None:
        """
        Args:
            items: what this process writes; must not change until the thread has ended.
            names: of all tensors that the checkpoint must have.
            target: place of the checkpoint.
            progress: where the run stands.
            metadata: facts for the manifest.
            keep_last: how many checkpoints to keep; None for all.
            keep_every: keep those of iterations that are multiples of this.
            agreement: with the other processes, for this save alone.
            started: when, by ``time.perf_counter``.
        """
        self.iteration: int = progress["iteration"]
        self.target = target
        self.stall = self.seconds = 0.0
        self.conclusion: Conclusion | None = None
        self._names = names
        self._items, self._progress, self._metadata = items, progress, metadata
        self._keep_last, self._keep_every = keep_last, keep_every
        self._agreement, self._started = agreement, started
        self._asked, self._beats = 0.0, 0
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)

    def begin(self) -> None:
        """Start to write; returns at once."""
        self._thread.start()
        self.stall = time.perf_counter() - self._started

    def has_ended(self) -> bool:
        """Whether there is a conclusion."""
        return not self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Wait for the conclusion, at most so long; whether there is one."""
        self._thread.join(timeout=seconds)
        return self.has_ended()

    def unfinished(self) -> list[int]:
        """Ranks that are still writing."""
        return self._agreement.missing_reports()

    def beats(self) -> list[Any]:
        """Changes as long as any process gets on with writing."""
        return [*self._agreement.beats(), self.unfinished()]

    def _run(self) -> None:
        try:
            conclusion = self._save_for_all() if self._agreement.is_main else self._save_part()
        except Exception as error:  # the store is gone, or a mistake of this program: the training must hear of it
            conclusion = Conclusion(f"{self._who()}: {_describe(error)}")
        self.seconds = time.perf_counter() - self._started
        self.conclusion = conclusion

    def _save_part(self) -> Conclusion:
        agreement = self._agreement
        agreement.announce(bytes_of(self._items))
        if agreement.wait_until_open():
            self._write()
        return Conclusion(**agreement.conclusion())

    def _save_for_all(self) -> Conclusion:
        agreement = self._agreement
        agreement.announce(bytes_of(self._items))
        nbytes = sum(agreement.plans())
        try:
            partial = commit.prepare(self.target, nbytes=nbytes)
        except Exception as error:
            conclusion = Conclusion(self._explain(error))
        else:
            agreement.open()
            self._write()
            conclusion = self._commit(partial, agreement.reports(), nbytes)
        agreement.conclude(dataclasses.asdict(conclusion))
        agreement.forget()
        return conclusion

    def _write(self) -> None:
        """Write this process's files and report them, or why not."""
        partial = directory.partial_name(self.target)
        try:
            if not appears(partial):
                raise UserError(
                    f"{partial}, which rank 0 has made, is not to be seen; --save must lie on a file system that all "
                    "machines share"
                )
            shards = write_shards(partial, self._items, rank=self._agreement.rank, go_on=self._go_on)
        except Abandoned:
            self._agreement.report({"error": f"{self._who()}: {_GAVE_UP}"})
        except Exception as error:
            self._agreement.report({"error": self._explain(error)}, failed=True)
        else:
            self._agreement.report({"shards": [shard.to_json() for shard in shards]})

    def _go_on(self) -> bool:
        now = time.monotonic()
        if now - self._asked < _ASK_SECONDS:
            return True
        self._asked = now
        self._beats += 1
        self._agreement.beat(self._beats)
        return not self._agreement.has_failed()

    def _commit(self, partial: Path, reports: Sequence[Mapping[str, Any]], nbytes: int) -> Conclusion:
        errors = [report["error"] for report in reports if "error" in report]
        if not errors:
            try:
                commit.commit(
                    partial,
                    self.target,
                    names=self._names,
                    shards=[shard for report in reports for shard in report["shards"]],
                    progress=self._progress,
                    metadata=self._metadata,
                )
            except Exception as error:
                errors = [self._explain(error)]
        if errors:
            commit.abandon(partial)
            causes = [error for error in errors if not error.endswith(_GAVE_UP)] or errors
            more = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
            return Conclusion(causes[0] + more)
        return Conclusion(None, nbytes, self._retire())

    def _retire(self) -> list[str]:
        if self._keep_last is None:
            return []
        try:
            gone = retention.retire(
                self.target.parent, newest=self.iteration, keep_last=self._keep_last, keep_every=self._keep_every
            )
        except (OSError, UserError) as error:
            return [f"warning: an old checkpoint could not be deleted: {error}"]
        return [f"deleted {', '.join(map(directory.iteration_name, gone))} (--keep-last)"] if gone else []

    def _explain(self, error: Exception) -> str:
        """One line: who, which file, what, and how much room there is if that is the trouble."""
        text = f"{self._who()}: {_describe(error)}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = commit.gigabytes(shutil.disk_usage(self.target.parent).free)
            text += f" ({free} free); make room, or let --keep-last delete old checkpoints"
        elif isinstance(error, OSError):
            text += "; see to the disk or the file system of --save"
        return text

    def _who(self) -> str:
        return f"rank {self._agreement.rank} on {socket.gethostname()}"


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} could not be written: {error.strerror or error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(place.filename).name}:{place.lineno})"
