"""The auxiliary loss that balances experts, over a whole optimizer step.

With E experts, N routed tokens (each token once per sparse layer), c_e choices of expert e and p_e the sum of its
probabilities, all of them over every sparse layer, micro-batch and process of the step:

    loss = E * sum over e of (c_e / N) * (p_e / N)

This is what Hugging Face's ``load_balancing_loss_func`` gives for the whole step in one batch. Counts have no gradient,
so once c and N are known, expert e has a price, ``coefficient * E * c_e / N^2``, at which every micro-batch of every
process adds its own probabilities to the loss. c has to be known before the first backward pass: it is summed over the
processes, and over the micro-batches by running the later ones forward once more, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.models.layers.moe import RouterLoad


class LoadBalancingLoss:
    """The balancing loss of one step after another."""

    def __init__(self, coefficient: float, *, top_k: int) -> None:
        """``coefficient`` is the share of the auxiliary loss in the whole; ``top_k`` experts are chosen per token."""
        self.coefficient = coefficient
        self.top_k = top_k
        self._later: Tensor | None = None
        self._price: Tensor | None = None

    def start_step(self, later: Iterable[RouterLoad]) -> None:
        """Begin an optimizer step.

        Args:
            later: loads of all micro-batches of this process but the first.
        """
        self._price = None
        self._later = None
        for load in later:
            self._later = load.choices if self._later is None else self._later + load.choices

    def loss(self, load: RouterLoad) -> Tensor:
        """This process's share in the step's auxiliary loss, times the coefficient, of one more micro-batch.

        To be called for each micro-batch, in their order, on all processes: the first call sums the counts over them.

        Args:
            load: of the micro-batch.

        Returns:
            fp32 scalar with gradient. Their sum over micro-batches and processes is ``coefficient * loss`` as above.
        """
        if self._price is None:
            choices = load.choices if self._later is None else load.choices + self._later
            choices = choices.clone()
            dist.all_reduce(choices)
            rows = choices.sum() / self.top_k
            self._price = self.coefficient * len(choices) * (choices / rows / rows).float()
        return (self._price * load.probabilities).sum()
