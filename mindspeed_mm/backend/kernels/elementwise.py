"""Small operations with device-specific implementations: RMSNorm and rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels import by_hand
from mindspeed_mm.backend.kernels.compiled import compiled as by_compiler

RMSNormKernel = Callable[[Tensor, Tensor, float], Tensor]
RotaryKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (https://arxiv.org/abs/1910.07467), statistics in fp32.

    Args:
        hidden: [..., H].
        weight: [H].
        eps: added to the mean square.
    """
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def rotate_half(tensor: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of the last axis."""
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def torch_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864) in the half-split form.

    Args:
        tensor: [T, heads, D].
        cos: [T, 1, D] of the tensor's own type or fp32, which then is the type of the arithmetic.
        sin: as cos.

    Returns:
        [T, heads, D] in the tensor's type.
    """
    return (tensor * cos + rotate_half(tensor) * sin).to(tensor.dtype)


def rms_norm_kernel(*, device: str, compiled: bool = False) -> RMSNormKernel:
    """The device's RMSNorm; ``compiled``: the one that torch.compile makes."""
    if compiled:
        return by_compiler(torch_rms_norm)
    if device == "cpu":  # which has no fused one
        return by_hand.rms_norm
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_elementwise import npu_rms_norm

        return npu_rms_norm
    return torch_rms_norm


def rotary_kernel(*, device: str, compiled: bool = False) -> RotaryKernel:
    """The device's rotary product; ``compiled``: the one that torch.compile makes."""
    if compiled:
        return by_compiler(torch_rotary)
    if device in ("cpu", "cuda"):
        return by_hand.rotary
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_elementwise import npu_rotary

        return npu_rotary
    return torch_rotary
