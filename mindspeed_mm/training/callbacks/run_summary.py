"""The last lines of a run: how it ended, and the averages that the recipe's launcher prints."""

from __future__ import annotations

import logging
import os

from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.launch_environment import RUN_STATE
from mindspeed_mm.training.logging_setup import RAW
from mindspeed_mm.training.metrics import StepRecord

logger = logging.getLogger(__name__)

_FIRST, _LAST = 51, 150  # steps of the run that the averages are over, where it has as many


class RunSummary(Callback):
    """Averages over steps 51 to 150 of this run, or in a shorter one over all but a warm-up of a tenth."""

    def __init__(self, *, packed: bool) -> None:
        """``packed``: the number of samples in a step varies, so they are counted."""
        self._packed = packed
        self._steps: list[tuple[float, float, float]] = []  # seconds, samples and tokens of each step

    def on_run_start(self, run: Run) -> None:
        """Keep the run, for its end."""
        self._run = run

    def on_step_end(self, record: StepRecord) -> None:
        """Keep what the averages are made of."""
        if len(self._steps) < _LAST:
            metrics = record.metrics
            samples = metrics["samples"] if self._packed else self._run.args.global_batch_size
            self._steps.append((metrics["seconds"], samples, metrics["tokens"]))

    def on_run_end(self, *, failed: bool) -> None:
        """Log how the run ended, and the averages."""
        reason = "" if failed else self._why_stopped()
        if not failed and not reason:
            self._log_end(reason)
        for line in self._averages():
            logger.info(line, extra=RAW)
        if reason:  # last, where it is looked for
            self._log_end(reason)

    def _why_stopped(self) -> str:
        """Why the run ended before its last step; empty if it did not."""
        args = self._run.args
        if self._run.error is not None:
            return "by an error"
        if self._run.context.progress.iteration >= args.train_iters or self._run.finished_early:
            return ""
        return "as requested" if self._run.stopped else "by --exit-interval" if args.exit_interval else ""

    def _log_end(self, reason: str) -> None:
        args, context = self._run.args, self._run.context
        iteration, peak = context.progress.iteration, context.backend.peak_memory_bytes() / 2**30
        how = f"stopped {reason}" if reason else "finished"
        early = f" ({self._run.finished_early})" if self._run.finished_early and not reason else ""
        logger.info(f"training {how} at iteration {iteration}{early}; peak memory {peak:.2f} GiB")
        if reason and args.save and iteration:
            option = "LOAD_PATH=" if RUN_STATE in os.environ else "--load "
            logger.info(f"to continue: {option}{args.save}")
        elif reason:
            logger.info("nothing was saved" if args.save else "nothing was saved: there is no --save")

    def _averages(self) -> list[str]:
        count = len(self._steps)
        if not count:
            return []
        first = _FIRST if count == _LAST else min(count, 1 + (count + 9) // 10)
        seconds, samples, tokens = map(sum, zip(*self._steps[first - 1 :], strict=True))
        return [
            f"Elapsed Time Per iteration: {1000.0 * seconds / (count - first + 1):.1f}",
            f"Average Samples per Second: {samples / max(1e-9, seconds):.3f}",
            f"Consumed Tokens per Second: {tokens / max(1e-9, seconds):.3f}",
        ]
