"""The load-balancing loss of the routers, over a whole optimizer step.

With E experts, N routed tokens (each token once per sparse layer), c_e choices of expert e and p_e the sum of its
probabilities, all of them over every sparse layer, micro-batch and rank of the step:

    loss = E * sum over e of (c_e / N) * (p_e / N)

This is what Hugging Face's ``load_balancing_loss_func`` gives for the whole step in one batch. Counts have no gradient,
so once c and N are known, every micro-batch of every rank adds its own probabilities to the loss, those of expert e
times the weight ``coefficient * E * c_e / N^2``. c must be known before the first backward pass: it is summed over the
ranks, and over the micro-batches by an additional forward pass of the later ones, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.models.layers.moe import RouterLoad


class LoadBalancingLoss:
    """The load-balancing loss of each step."""

    def __init__(self, coefficient: float, *, top_k: int) -> None:
        """``coefficient`` multiplies the auxiliary loss; ``top_k`` experts are chosen per token."""
        self.coefficient = coefficient
        self.top_k = top_k
        self._later: Tensor | None = None
        self._weights: Tensor | None = None

    def start_step(self, later: Iterable[RouterLoad]) -> None:
        """Begin an optimizer step.

        Args:
            later: router loads of all micro-batches of this rank but the first.
        """
        self._weights = None
        self._later = None
        for load in later:
            choices = load.choices.sum(dim=0)
            self._later = choices if self._later is None else self._later + choices

    def loss(self, load: RouterLoad) -> Tensor:
        """This micro-batch's part of the step's auxiliary loss, times the coefficient.

        Call it for each micro-batch, in their order, on all ranks: the first call sums the counts over ranks.

        Args:
            load: of the micro-batch.

        Returns:
            fp32 scalar with gradient. Their sum over micro-batches and ranks is ``coefficient * loss`` as above.
        """
        if self._weights is None:
            choices = load.choices.sum(dim=0)
            if self._later is not None:
                choices = choices + self._later
            dist.all_reduce(choices)
            tokens = choices.sum() / self.top_k
            self._weights = self.coefficient * len(choices) * (choices / tokens / tokens).float()
        return (self._weights * load.probabilities).sum()


def max_load(choices: Tensor) -> Tensor:
    """Tokens of the busiest expert over the mean of its layer's experts, in the layer where that is most.

    Args:
        choices: [L, E], how often each expert was chosen.

    Returns:
        fp32 scalar between 1 (balanced) and E; without a token 0.
    """
    choices = choices.float()
    return (choices / choices.mean(dim=-1, keepdim=True).clamp(min=1.0 / choices.shape[-1])).max()
