"""Samples that cannot be used: stop at the first, or skip up to a limit; all ranks decide together."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.metrics import StepRecord

logger = logging.getLogger(__name__)

_SHOWN = 5


class SkippedSamples(Callback):
    """Counts skipped samples over the run.

    Attributes:
        seen: so far, on all ranks.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: one more than this stops the run; 0 stops at the first."""
        self._limit = limit
        self.seen = 0

    def on_step_end(self, record: StepRecord) -> None:
        """Count a step's."""
        self.check(round(record.metrics["skipped_unusable"]), record.details.skipped_messages)

    def check(self, count: int, messages: Sequence[str]) -> None:
        """Count skipped samples. Called by all ranks together, with the same ``count``.

        Args:
            count: over all ranks.
            messages: file, sample and reason of each that this rank met.

        Raises:
            UserError: on all ranks, with the first sample's message, if there are more than the limit.
        """
        if not count:
            return
        gathered: list[Sequence[str]] = [()] * dist.get_world_size()
        dist.all_gather_object(gathered, list(messages))
        # ranks of a context-parallel group meet the same samples
        everything = list(dict.fromkeys(message for own in gathered for message in own))
        self.seen += count
        if self.seen > self._limit:
            more = f" (and {len(everything) - 1} more in this step)" if len(everything) > 1 else ""
            remedy = (
                f"; these make {self.seen} bad samples, more than dataloader_param.max_bad_samples {self._limit}"
                if self._limit
                else '; or skip such samples with dataloader_param.on_bad_sample "skip"'
            )
            raise UserError(f"{everything[0]}{more}{remedy}")
        for message in everything[:_SHOWN] if dist.get_rank() == 0 else ():
            logger.warning(f"skipped bad sample: {message}")
        logger.info(f"bad samples skipped so far: {self.seen} of at most {self._limit}")
