"""Token permutation: tokens sorted by expert and back, the interface of every implementation.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k permuted tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CombineKernel = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(permuted [N, H], indices into it int64 [T, k], weights [T, k] or None for ones) -> sums [T, H]; no autograd."""

CombineBackwardKernel = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(gradient of the sums [T, H], permuted [N, H], indices, weights) -> gradients of permuted and, in fp32, weights."""


class TokenPermuter(Protocol):
    """Sorts tokens by expert and restores their order; gradients flow through both."""

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """Tokens per expert: experts int64 [T, k] -> int64 [E], without host-device synchronisation."""

    def permute(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
        """tokens [T, H], experts int64 [T, k] -> (tokens sorted by expert [N, H], routing for :meth:`unpermute`)."""

    def unpermute(self, permuted: Tensor, routing: Any, weights: Tensor | None = None) -> Tensor:
        """permuted [N, H], :meth:`permute`'s routing, weights [T, k] -> each token's weighted sum.

        Returns:
            [T, H]; without weights the plain sum, which for k = 1 is the unpermuted input.
        """


def gather_combine(permuted: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """A :data:`CombineKernel` that gathers the tokens and then sums them."""
    chosen = permuted.index_select(0, indices.flatten()).view(*indices.shape, permuted.shape[-1])
    return chosen.sum(dim=1) if weights is None else torch.einsum("tkh,tk->th", chosen, weights)


def embedding_bag_combine(permuted: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """A :data:`CombineKernel` that reads each permuted token once and stores only the sums."""
    return F.embedding_bag(indices, permuted, mode="sum", per_sample_weights=weights)
