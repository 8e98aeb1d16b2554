"""The way of tokens to rows sorted by expert and back: what every implementation does.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k rows.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class RowMover(Protocol):
    """Sorts tokens by expert and brings results back; gradients flow through both."""

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """How often each expert was chosen: experts int64 [T, k] -> int64 [E]; nothing is read back to the host."""

    def to_rows(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
        """tokens [T, H], experts int64 [T, k] -> (rows [N, H] sorted by expert, what brings them back)."""

    def to_tokens(self, rows: Tensor, places: Any, weights: Tensor | None = None) -> Tensor:
        """rows [N, H], what ``to_rows`` returned with them, weights [T, k] -> the weighted sum of each token's rows.

        Returns:
            [T, H]; without weights k must be 1, and the rows come back as they are.
        """


def row_mover(plain: RowMover, *, fused: bool, device: str) -> RowMover:
    """The device's fused operators if ``fused`` and it has any, else ``plain``."""
    if fused and device == "npu":
        from mindspeed_mm.backend.kernels.npu_experts import PermutedRows

        return PermutedRows(plain)
    return plain
