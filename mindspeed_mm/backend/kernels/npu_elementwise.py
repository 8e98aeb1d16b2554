"""RMSNorm, rotary positions and SwiGLU by torch_npu's fused operators."""

from __future__ import annotations

import torch
from torch import Tensor


def npu_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rms_norm`; both of one type, hidden of 2 to 8 axes."""
    import torch_npu

    return torch_npu.npu_rms_norm(hidden, weight, epsilon=eps)[0]


def npu_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rotary`.

    The operator wants four axes and one type: [1, T, heads, D] with [1, T, 1, D], in the wider of the two types.
    """
    import torch_npu

    dtype = torch.promote_types(tensor.dtype, cos.dtype)
    rotated = torch_npu.npu_rotary_mul(
        tensor.unsqueeze(0).to(dtype), cos.unsqueeze(0).to(dtype), sin.unsqueeze(0).to(dtype)
    )
    return rotated.squeeze(0).to(tensor.dtype)


def npu_swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2I] (gate columns, then up columns) -> silu(gate) * up [..., I]."""
    import torch_npu

    return torch_npu.npu_swiglu(gate_up, dim=-1)
