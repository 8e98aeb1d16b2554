"""Loss weights of the target tokens of one optimizer step.

The model sums ``loss_weight * cross_entropy`` over its target tokens. A loss mode is a choice of weights, made once per
step over all micro-batches of all ranks, so that no split of the batch changes the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.backend.transfer import copy_to_device
from mindspeed_mm.config.model_options import LossMode
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.parallel.mesh import Layout


def step_loss_weights(
    batches: Sequence[Batch], *, mode: LossMode, layout: Layout, device: torch.device
) -> list[Tensor]:
    """fp32 [S] for each micro-batch of this rank's step.

    ``n`` below is the number of target tokens of the token's own sample.

    - ``per_token``: 1 / (target tokens of the step): the mean over tokens.
    - ``per_sample``: 1 / n / (samples of the step with target tokens): the mean over samples of their token means.
    - ``square``: 1 / sqrt(n), divided by the sum of these over the step.
    - ``default``: the token mean of each micro-batch, then the mean over micro-batches and ranks. The only mode
      that depends on the split.

    Args:
        batches: the micro-batches of one optimizer step on this rank.
        mode: which mean.
        layout: ranks that share a micro-batch each have the counts of all its samples, and their own part's tokens.
        device: of the results. The sum over ranks stays there: no host-device synchronisation.
    """
    weights = [_unnormalized_weights(batch.target_tokens_per_sample, mode) for batch in batches]
    if mode == "default":
        total = torch.full((), float(len(batches) * layout.dp_size), device=device)
    else:
        local = sum(
            count * weight
            for batch, own in zip(batches, weights, strict=True)
            for count, weight in zip(batch.target_tokens_per_sample, own, strict=True)
        )
        total = torch.full((), float(local), dtype=torch.float32, device=device)
        dist.all_reduce(total)
        total /= layout.context_size
    total.clamp_(min=torch.finfo(torch.float32).tiny)  # a step without target tokens has a loss of 0, not NaN
    return [
        copy_to_device(own, device).index_select(0, batch.label_sample) / total
        for batch, own in zip(batches, weights, strict=True)
    ]


def _unnormalized_weights(target_tokens: Sequence[int], mode: LossMode) -> list[float]:
    """Loss weight of a token of each sample, before the division by the step's total."""
    if mode == "per_token":
        return [1.0] * len(target_tokens)
    if mode == "per_sample":
        return [1.0 / count if count else 0.0 for count in target_tokens]
    if mode == "square":
        return [1.0 / math.sqrt(count) if count else 0.0 for count in target_tokens]
    return [1.0 / max(1, sum(target_tokens))] * len(target_tokens)
