"""Norm, rotary positions and SwiGLU with backward passes written out: few passes over memory, little kept for backward.

They are made of torch's operators and serve any device that has no fused ones of its own; in bf16 the arithmetic is
fp32 wherever the operators promote.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per row; composed of single operators it keeps several copies of the input."""

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
            by_row = scale.view(-1, 1)
            grad_hidden = torch.mul(grad.reshape(-1, width), weight.to(product.dtype))
            grad_hidden.addcmul_(normed, along, value=-1.0 / width).mul_(by_row)
            grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
        return grad_hidden, grad_weight, None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rms_norm`."""
    return _RMSNorm.apply(hidden, weight, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(tensor, cos, sin, backwards=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, backwards=True), None, None


def _turn(tensor: Tensor, cos: Tensor, sin: Tensor, *, backwards: bool) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), halves of the last axis; ``backwards``: the transpose of that."""
    dtype = torch.promote_types(tensor.dtype, cos.dtype)
    values, cos, sin = (one.to(dtype) for one in (tensor, cos, sin))
    turned = values * cos
    (first, second), (sin_first, sin_second) = values.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    to_first, to_second = turned.chunk(2, dim=-1)
    if backwards:
        to_first.addcmul_(second, sin_second)
        to_second.addcmul_(first, sin_first, value=-1)
    else:
        to_first.addcmul_(second, sin_first, value=-1)
        to_second.addcmul_(first, sin_second)
    return turned.to(tensor.dtype)


def rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rotary`."""
    return _Rotary.apply(tensor, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2I] (gate columns, then up columns) -> silu(gate) * up [N, I]; no autograd of its own."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_again(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """For backward: (the result of :func:`swiglu` once more [N, I], the gradient of ``gate_up`` [N, 2I])."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    active = F.silu(gate)
    torch.mul(grad, active, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return active.mul_(up), grad_gate_up
