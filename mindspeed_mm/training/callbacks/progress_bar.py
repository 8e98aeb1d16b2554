"""``--progress``: a bar of the run's steps on the terminal; without one, a log line where the log is silent."""

from __future__ import annotations

import logging
import time

from mindspeed_mm.progress import Phase, format_seconds
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.metrics import StepRecord

logger = logging.getLogger(__name__)

_SILENT_SECONDS = 60.0


def _short(number: float) -> str:
    """With three digits: 417, 4.17k, 41.7k."""
    if number < 999.5:
        return f"{number:.3g}"
    return f"{number / 1e3:.3g}k" if number < 999_500 else f"{number / 1e6:.3g}M"


class ProgressBar(Callback):
    """Shows rank 0's progress. Comes after the log line, which is printed above the bar."""

    def on_run_start(self, run: Run) -> None:
        """Show the bar."""
        progress = run.context.progress
        self._run = run
        self._phase: Phase | None = None
        self._said = time.monotonic()
        self._began, self._first = self._said, progress.iteration
        if run.context.layout.is_main and progress.iteration < run.args.train_iters:
            self._phase = Phase(
                "training", unit="steps", total=run.args.train_iters, done=progress.iteration, lines=False
            )
            if not self._phase.on_terminal:
                logger.info(f"--progress: there is no terminal; a line every {_SILENT_SECONDS:g} s between log lines")

    def on_step_end(self, record: StepRecord) -> None:
        """Move on."""
        if self._phase is None:
            return
        metrics = record.metrics
        tokens = metrics["tokens"] / max(1e-9, metrics["seconds"])
        self._phase.advance(1, loss=f"{metrics['loss']:.4g}", tokens=f"{_short(tokens)}/s")
        now = time.monotonic()
        if record.iteration % self._run.args.log_interval == 0:
            self._said = now
        elif not self._phase.on_terminal and now - self._said >= _SILENT_SECONDS:
            self._said = now
            total = self._run.args.train_iters
            per_step = (now - self._began) / (record.iteration - self._first)
            logger.info(
                f"iteration {record.iteration} of {total} ({100 * record.iteration / total:.0f}%), loss "
                f"{metrics['loss']:.4g}, {per_step:.3g} s per iteration, "
                f"{format_seconds(per_step * (total - record.iteration))} left"
            )

    def on_run_end(self, *, failed: bool) -> None:
        """Remove the bar."""
        if self._phase is not None:
            self._phase.close()
