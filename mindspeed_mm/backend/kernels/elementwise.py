"""RMSNorm, rotary embedding and SwiGLU: torch's operators, and custom autograd functions with few passes over memory.

The autograd functions are made of torch's operators, so they run on every device, and keep little for backward. In bf16
the arithmetic is fp32 wherever the operators promote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RMSNormKernel = Callable[[Tensor, Tensor, float], Tensor]
RotaryKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
SplitKernel = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""See :func:`mindspeed_mm.backend.kernels.triton_rotary.norm_rotary_split`."""
RouterKernel = Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]]
"""See :func:`mindspeed_mm.backend.kernels.triton_router.top_k_softmax`."""


class SwigluKernel(NamedTuple):
    """SwiGLU inside kernels that have their own backward pass: two functions without autograd.

    Attributes:
        forward: gate_up [N, 2I] (gate columns, then up columns) -> silu(gate) * up [N, I].
        backward: (gate_up [N, 2I], gradient [N, I]) -> (the result once more [N, I], the gradient of gate_up [N, 2I]).
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def torch_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (https://arxiv.org/abs/1910.07467), statistics in fp32.

    Args:
        hidden: [..., H].
        weight: [H].
        eps: added to the mean square.
    """
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number per token for backward; torch's operators keep several copies of the input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return torch.mul(hidden, scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        width = hidden.shape[-1]
        normed = torch.mul(hidden, scale).view(-1, width)
        product = grad.reshape(-1, width) * normed
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            along = torch.mv(product, weight.to(product.dtype)).unsqueeze(1)
            per_token = scale.view(-1, 1)
            grad_hidden = torch.mul(grad.reshape(-1, width), weight.to(product.dtype))
            grad_hidden.addcmul_(normed, along, value=-1.0 / width).mul_(per_token)
            grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
        return grad_hidden, grad_weight, None


def autograd_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`torch_rms_norm`."""
    return _RMSNorm.apply(hidden, weight, eps)


def rotate_half(tensor: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of the last axis."""
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def torch_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (https://arxiv.org/abs/2104.09864) in the half-split form.

    Args:
        tensor: [T, heads, D].
        cos: [T, 1, D] in the tensor's type, or in fp32, which then is the type of the arithmetic.
        sin: as cos.

    Returns:
        [T, heads, D] in the tensor's type.
    """
    return (tensor * cos + rotate_half(tensor) * sin).to(tensor.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(tensor, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, inverse=True), None, None


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), halves of the last axis; ``inverse`` applies the transpose."""
    dtype = torch.promote_types(tensor.dtype, cos.dtype)
    values, cos, sin = (one.to(dtype) for one in (tensor, cos, sin))
    rotated = values * cos
    (first, second), (sin_first, sin_second) = values.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    to_first, to_second = rotated.chunk(2, dim=-1)
    if inverse:
        to_first.addcmul_(second, sin_second)
        to_second.addcmul_(first, sin_first, value=-1)
    else:
        to_first.addcmul_(second, sin_first, value=-1)
        to_second.addcmul_(first, sin_second)
    return rotated.to(tensor.dtype)


def autograd_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`torch_rotary`."""
    return _Rotary.apply(tensor, cos, sin)


def torch_swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2I] (gate columns, then up columns) -> silu(gate) * up [N, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_swiglu_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`SwigluKernel`; arithmetic in fp32, for torch.compile to fuse."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    active = gate * sigmoid
    grad_gate = grad * up * (sigmoid + active * (1.0 - sigmoid))
    return (active * up).to(gate_up.dtype), torch.cat((grad_gate, grad * active), dim=-1).to(gate_up.dtype)


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2I] (gate columns, then up columns) -> silu(gate) * up [N, I], without autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def eager_swiglu_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(the result of :func:`eager_swiglu` once more [N, I], the gradient of ``gate_up`` [N, 2I])."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    active = F.silu(gate)
    torch.mul(grad, active, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return active.mul_(up), grad_gate_up


EAGER_SWIGLU = SwigluKernel(eager_swiglu, eager_swiglu_backward)
