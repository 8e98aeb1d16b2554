"""Samples that cannot be used, and steps without a target token: skip up to a limit; all ranks decide together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.metrics import StepRecord, gather_messages

logger = logging.getLogger(__name__)

_SHOWN = 5
_EMPTY_STEPS = 10  # steps in a row without a target token: the data cannot be meant so


class SkippedSamples(Callback):
    """Counts skipped samples over the run.

    Attributes:
        seen: so far, on all ranks.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: one more than this stops the run; 0 stops at the first."""
        self._limit = limit
        self.seen = 0
        self._empty_steps = 0
        self._warned: set[str] = set()

    def on_run_start(self, run: Run) -> None:
        """Keep the run, which an error ends after a save."""
        self._run = run

    def on_step_end(self, record: StepRecord) -> None:
        """Count a step's, and steps in which there is nothing to learn."""
        metrics = record.metrics
        for name, what in (("skipped_too_long", "longer than --seq-length"), ("skipped_no_target", "no target token")):
            if metrics.get(name, 0) > 0:
                self._warn_once(name, f"iteration {record.iteration} skips {metrics[name]:.0f} samples: {what}")
        self._empty_steps = self._empty_steps + 1 if metrics.get("target_tokens", 1) == 0 else 0
        if self._empty_steps:
            self._warn_once("target_tokens", f"iteration {record.iteration} has no target token to learn from")
        if self._empty_steps >= _EMPTY_STEPS:
            self._run.stop_after_save(UserError(
                f"the last {_EMPTY_STEPS} iterations, up to {record.iteration}, had no target token, so that nothing "
                "was learned: are all samples longer than --seq-length, or their answers empty?"
            ))
        self.check(round(record.metrics["skipped_unusable"]), record.details.skipped_messages)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned and dist.get_rank() == 0:
            logger.warning(f"{message} (said once; the log's counters go on)")
        self._warned.add(kind)

    def check(self, count: int, messages: Sequence[str]) -> None:
        """Count skipped samples, and end the run, after a save, if there are more than the limit.

        Called by all ranks together, with the same ``count``.

        Args:
            count: over all ranks.
            messages: file, sample and reason of each that this rank met.
        """
        if not count:
            return
        everything = gather_messages(messages)
        self.seen += count
        if self.seen > self._limit:
            more = f" (and {len(everything) - 1} more in this step)" if len(everything) > 1 else ""
            remedy = (
                f"; these make {self.seen} bad samples, more than dataloader_param.max_bad_samples {self._limit}"
                if self._limit
                else '; or skip such samples with dataloader_param.on_bad_sample "skip"'
            )
            self._run.stop_after_save(UserError(f"{everything[0]}{more}{remedy}"))
            return
        for message in everything[:_SHOWN] if dist.get_rank() == 0 else ():
            logger.warning(f"skipped bad sample: {message}")
        logger.info(f"bad samples skipped so far: {self.seen} of at most {self._limit}")
