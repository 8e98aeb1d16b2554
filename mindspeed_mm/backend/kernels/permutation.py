"""The way of tokens to rows sorted by expert and back: what every implementation does.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

RowSum = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(rows [N, H], which of them int64 [T, k], weights [T, k] or None for ones) -> their sums [T, H]; no autograd."""


class TokenPermuter(Protocol):
    """Sorts tokens by expert and brings results back; gradients flow through both."""

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """How often each expert was chosen: experts int64 [T, k] -> int64 [E]; nothing is read back to the host."""

    def permute(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
        """tokens [T, H], experts int64 [T, k] -> (rows [N, H] sorted by expert, what brings them back)."""

    def unpermute(self, rows: Tensor, places: Any, weights: Tensor | None = None) -> Tensor:
        """rows [N, H], what ``to_rows`` returned with them, weights [T, k] -> the weighted sum of each token's rows.

        Returns:
            [T, H]; without weights k must be 1, and the rows come back as they are.
        """


def gathered_sum(rows: Tensor, which: Tensor, weights: Tensor | None) -> Tensor:
    """A :data:`RowSum` of a copy of the rows in the order of the tokens."""
    chosen = rows.index_select(0, which.flatten()).view(*which.shape, rows.shape[-1])
    return chosen.sum(dim=1) if weights is None else torch.einsum("tkh,tk->th", chosen, weights)


def bag_sum(rows: Tensor, which: Tensor, weights: Tensor | None) -> Tensor:
    """A :data:`RowSum` that reads each row once and writes nothing but the sums."""
    return F.embedding_bag(which, rows, mode="sum", per_sample_weights=weights)


def row_sum(*, device: str) -> RowSum:
    """The device's best."""
    return bag_sum if device in ("cpu", "cuda") else gathered_sum
