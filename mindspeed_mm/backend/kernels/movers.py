"""Which implementation moves tokens to rows and back."""

from __future__ import annotations

from mindspeed_mm.backend.kernels.npu_experts import PermutedRows
from mindspeed_mm.backend.kernels.rows import RowMover


def row_mover(plain: RowMover, *, fused: bool, device: str) -> RowMover:
    """The device's fused operators if ``fused`` and it has any, else ``plain``."""
    return PermutedRows(plain) if fused and device == "npu" else plain
