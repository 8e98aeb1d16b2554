"""Samples that cannot be used: stop at the first, or leave out so many; all processes decide together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist

from mindspeed_mm.errors import UserError

_SHOWN = 5


@dataclasses.dataclass
class BadSamples:
    """Counts bad samples over the run.

    Attributes:
        limit: so many are left out; one more stops the run. 0 stops at the first.
        seen: so far, on all ranks.
    """

    limit: int
    seen: int = 0

    def check(self, count: int, messages: Sequence[str]) -> None:
        """Take note of the bad samples of a step. Called by all ranks together, with the same ``count``.

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
        # processes of a context-parallel group meet the same samples
        everything = list(dict.fromkeys(message for own in gathered for message in own))
        self.seen += count
        if self.seen > self.limit:
            more = f" (and {len(everything) - 1} more in this step)" if len(everything) > 1 else ""
            remedy = (
                f"; these make {self.seen} bad samples, more than dataloader_param.max_bad_samples {self.limit}"
                if self.limit
                else '; or leave such samples out with dataloader_param.on_bad_sample "skip"'
            )
            raise UserError(f"{everything[0]}{more}{remedy}")
        if dist.get_rank() == 0:
            for message in everything[:_SHOWN]:
                print(f" left out bad sample: {message}", flush=True)
            print(f" bad samples left out so far: {self.seen} of at most {self.limit}", flush=True)
