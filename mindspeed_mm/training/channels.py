"""Loss of each channel: of each data set of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.training.metrics import StepMetrics

_SUM = "cross_entropy/"  # of a channel's target tokens; a step's record has the mean instead


class ChannelLosses:
    """Sums the cross-entropy of each channel's target tokens, on the device."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """Start at 0.

        Args:
            names: of the channels that ``Batch.sample_channel`` counts; none if nothing is to be summed.
            device: of the sums.
        """
        self.names = tuple(names)
        self._numbers = torch.arange(len(names), device=device)[:, None]
        self.sums = torch.zeros(2, len(names), device=device)
        """fp32 [2, channels]: cross-entropy and number of the target tokens of this rank."""

    def add(self, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, or this rank's part of one.

        Args:
            batch: on the device.
            token_losses: fp32 [S], cross-entropy of its target tokens.
        """
        if not self.names or batch.sample_channel is None:  # None: stand-ins alone, without a target token
            return
        mine = batch.sample_channel.index_select(0, batch.label_sample) == self._numbers  # [channels, S]
        losses = torch.where(mine, token_losses.detach(), 0.0).sum(dim=1)
        self.sums += torch.stack([losses, mine.sum(dim=1).float()])

    def add_to(self, metrics: StepMetrics) -> None:
        """Add the sums to a step's metrics; :func:`with_means` makes means of them."""
        for name, loss, count in zip(self.names, *self.sums.unbind(), strict=True):
            metrics.add(_SUM + name, loss)
            metrics.add(f"target_tokens/{name}", count)


def with_means(metrics: dict[str, float], names: Sequence[str]) -> None:
    """Replace the sums in a step's metrics by ``loss/<name>``, for channels of which the step has target tokens."""
    for name in names:
        total, count = metrics.pop(_SUM + name), metrics[f"target_tokens/{name}"]
        if count:
            metrics[f"loss/{name}"] = total / count
