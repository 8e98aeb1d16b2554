"""``metrics.jsonl`` in the ``--save`` directory: one JSON object per step, continuous over a resume."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import FILE_MODE, make_directory, write_atomically
from mindspeed_mm.evaluation.report.history import METRICS_FILE
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.metrics import StepRecord

logger = logging.getLogger(__name__)


class MetricsFile(Callback):
    """Appends each step's metrics, on rank 0. A file that cannot be written is warned of once; training continues.

    A step's line is written when the next step's record arrives, so that an evaluation after the step can add to it,
    and before every checkpoint: the file then holds all steps up to the checkpoint, on disk.
    """

    def __init__(self, directory: str) -> None:
        """``directory``: ``--save``."""
        self.path = Path(directory) / METRICS_FILE
        self._line: dict[str, Any] | None = None
        self._descriptor: int | None = None
        self._size = 0  # bytes of complete lines
        self._warned = False

    def on_run_start(self, run: Run) -> None:
        """Remove the lines of steps that the run will repeat, and what an interrupted write left.

        A run that starts at iteration 0 continues no other: it sets the file of an earlier run aside.
        """
        self._active = run.context.layout.is_main
        iteration = run.context.progress.iteration
        if self._active:
            with self._warning():
                if iteration:
                    self._discard_lines(after=iteration)
                else:
                    self._set_aside()

    def on_step_end(self, record: StepRecord) -> None:
        """Write the previous step's line."""
        self._write()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self._line = {"iteration": record.iteration, "time": now, **record.metrics}

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """Add to the step's line; of an evaluation that a resumed run makes up for, to the last one of the file."""
        if self._line is not None:
            self._line.update(metrics)
        elif self._active and self._descriptor is None:
            with self._warning():
                self._amend(iteration, metrics)

    def on_save(self, iteration: int) -> None:
        """A resumed run continues after this step: its line must be on disk."""
        self._write()
        if self._descriptor is not None:
            with self._warning():
                os.fsync(self._descriptor)

    def on_run_end(self, *, failed: bool) -> None:
        """Write the last line."""
        self._write()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        line, self._line = self._line, None
        if line is None or not self._active:
            return
        data = _text(line)
        with self._warning():
            if self._descriptor is None:
                make_directory(self.path.parent)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
                self._size = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._descriptor, data[written:], self._size + written)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)  # no torn line before the next one
                raise
            self._size += len(data)

    def _amend(self, iteration: int, metrics: Mapping[str, float]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and _iteration(lines[-1]) == iteration:
            lines[-1] = _text({**json.loads(lines[-1]), **metrics})
            write_atomically(self.path, b"".join(lines))

    def _set_aside(self) -> None:
        """Rename the file of an earlier run to ``metrics.1.jsonl``, or the next number that is free."""
        if not self.path.exists():
            return
        numbered = (self.path.with_name(f"metrics.{number}.jsonl") for number in itertools.count(1))
        target = next(path for path in numbered if not path.exists())
        self.path.rename(target)
        logger.info(f"{self.path} is of an earlier run; it is kept as {target.name}")

    def _discard_lines(self, *, after: int) -> None:
        """Keep the complete lines of iterations up to ``after``."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        kept = [line for line in lines if line.endswith(b"\n") and _iteration(line) in range(1, after + 1)]
        if kept != lines:
            write_atomically(self.path, b"".join(kept))
            logger.info(f"removed {len(lines) - len(kept)} lines after iteration {after} from {self.path}")

    @contextlib.contextmanager
    def _warning(self) -> Any:
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    f"{self.path} cannot be written ({error.strerror or error}); training continues, and steps are "
                    "missing in it until it can"
                )
            self._warned = True


def _text(line: Mapping[str, Any]) -> bytes:
    # JSON has no NaN and no infinity
    finite = {key: value if not isinstance(value, float) or math.isfinite(value) else None
              for key, value in line.items()}  # fmt: skip
    return (json.dumps(finite) + "\n").encode()


def _iteration(line: bytes) -> int | None:
    """The iteration of a line; None where it is not one."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
