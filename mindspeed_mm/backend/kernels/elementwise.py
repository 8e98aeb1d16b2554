"""Small operations with several implementations: RMSNorm, rotary positions and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels import autograd_functions
from mindspeed_mm.backend.kernels.compiled import compiled as by_compiler

RMSNormKernel = Callable[[Tensor, Tensor, float], Tensor]
RotaryKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class SwigluKernel(NamedTuple):
    """SwiGLU for kernels that have a backward pass of their own; neither has autograd.

    Attributes:
        forward: see :func:`mindspeed_mm.backend.kernels.autograd_functions.swiglu`.
        again: see :func:`mindspeed_mm.backend.kernels.autograd_functions.swiglu_again`.
    """

    forward: Callable[[Tensor], Tensor]
    again: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


EAGER_SWIGLU = SwigluKernel(autograd_functions.swiglu, autograd_functions.swiglu_again)


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


def torch_swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2I] (gate columns, then up columns) -> silu(gate) * up [N, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_swiglu_again(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    share = gate.sigmoid()
    active = gate * share
    grad_gate = grad * up * (share + active * (1.0 - share))
    return (active * up).to(gate_up.dtype), torch.cat((grad_gate, grad * active), dim=-1).to(gate_up.dtype)


def rms_norm_kernel(*, device: str, compiled: bool = False) -> RMSNormKernel:
    """The device's RMSNorm; ``compiled``: the one that torch.compile makes."""
    if compiled:
        return by_compiler(torch_rms_norm)
    if device == "cpu":  # which has no fused one
        return autograd_functions.rms_norm
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_elementwise import npu_rms_norm

        return npu_rms_norm
    return torch_rms_norm


def rotary_kernel(*, device: str, compiled: bool = False) -> RotaryKernel:
    """The device's rotary product; ``compiled``: the one that torch.compile makes."""
    if compiled:
        return by_compiler(torch_rotary)
    if device in ("cpu", "cuda"):
        return autograd_functions.rotary
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_elementwise import npu_rotary

        return npu_rotary
    return torch_rotary


def swiglu_kernel(*, compiled: bool = False) -> SwigluKernel:
    """SwiGLU of a CPU and a GPU; ``compiled``: the one that torch.compile makes, in one pass each way."""
    if compiled:
        return SwigluKernel(by_compiler(torch_swiglu), by_compiler(_torch_swiglu_again))
    return EAGER_SWIGLU
