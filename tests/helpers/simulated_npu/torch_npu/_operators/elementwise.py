"""npu_rms_norm, npu_rotary_mul and npu_swiglu."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_npu._operators.checks import FLOATS, demand, demand_same_type, demand_type


def rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    demand_type("self", self, FLOATS)
    demand_same_type(self=self, gamma=gamma)
    demand(2 <= self.dim() <= 8, f"self has {self.dim()} axes; 2 to 8 are supported")
    demand(self.shape[-gamma.dim():] == gamma.shape, f"gamma {gamma.shape} is not the end of self {self.shape}")
    axes = tuple(range(-gamma.dim(), 0))
    wide = self.float()
    rstd = wide.square().mean(axes, keepdim=True).add(epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(self.dtype), rstd


def rms_norm_backward(dy: Tensor, self: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    demand_same_type(dy=dy, self=self)
    axes = tuple(range(-gamma.dim(), 0))
    normalised, grad = self.float() * rstd, dy.float()
    scaled = grad * gamma.float()
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(axes, keepdim=True))
    leading = tuple(range(self.dim() - gamma.dim()))
    return dx.to(self.dtype), (grad * normalised).sum(leading).to(gamma.dtype)


def rotary_mul(
    self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    _check_rotary(self, r1, r2, rotary_mode)
    demand(rotate is None, "the simulated npu_rotary_mul takes no rotate matrix")
    return (self.float() * r1.float() + _rotated(self.float(), rotary_mode) * r2.float()).to(self.dtype)


def rotary_mul_backward(
    grad: Tensor, self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rotary(self, r1, r2, rotary_mode, with_gradient=True)
    wide, turned = grad.float(), grad.float() * r2.float()
    # the transpose of the rotation
    dx = wide * r1.float() - _rotated(turned, rotary_mode)
    axes = [axis for axis in range(4) if r1.shape[axis] == 1 and self.shape[axis] != 1]
    dr1 = (wide * self.float()).sum(axes, keepdim=True) if axes else wide * self.float()
    dr2 = wide * _rotated(self.float(), rotary_mode)
    return dx.to(self.dtype), dr1.to(r1.dtype), (dr2.sum(axes, keepdim=True) if axes else dr2).to(r2.dtype)


def _rotated(tensor: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = tensor.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    first, second = tensor[..., ::2], tensor[..., 1::2]
    return torch.stack((-second, first), dim=-1).flatten(-2)


def _check_rotary(self: Tensor, r1: Tensor, r2: Tensor, mode: str, *, with_gradient: bool = False) -> None:
    demand(mode in ("half", "interleave"), f"rotary_mode only support half or interleave, got {mode}")
    for name, tensor in (("input", self), ("r1", r1), ("r2", r2)):
        demand_type(name, tensor, FLOATS)
        demand(tensor.dim() == 4, f"{name} has {tensor.dim()} axes, not 4")
    # the documentation does not say so, but CANN's own of RotaryPositionEmbedding does
    demand_same_type(input=self, r1=r1, r2=r2)
    demand(r1.shape == r2.shape, f"r1 {r1.shape} and r2 {r2.shape} differ")
    width = self.shape[3]
    demand(width < 896 and width % 2 == 0, f"D is {width}; it must be even and less than 896")
    # half takes r1 with the batch or the heads broadcast or whole; interleave with both broadcast
    fitting = []
    for batch, heads, length in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):  # BNSD, BSND, SBND
        demand(min(self.shape[batch], self.shape[heads]) > 0, "empty input")
        both = {batch: 1, heads: 1}
        one = {heads: 1}
        for broadcast in (both, one, {}) if mode == "half" else (both,):
            shape = tuple(broadcast.get(axis, size) for axis, size in enumerate(self.shape))
            if tuple(r1.shape) != shape:
                continue
            small = self.shape[batch] < 1000 and self.shape[heads] < 1000
            if with_gradient:
                small = small and self.shape[batch] * self.shape[heads] <= 1024
            if mode == "interleave":
                small = self.shape[batch] * self.shape[heads] < 1000
            if small:
                fitting.append(length)
    demand(bool(fitting), f"r1 {tuple(r1.shape)} does not fit input {tuple(self.shape)} in any supported layout")


def swiglu(self: Tensor, dim: int = -1) -> Tensor:
    demand_type("self", self, FLOATS)
    demand(1 <= self.dim() <= 8, f"self has {self.dim()} axes; 1 to 8 are supported")
    demand(self.shape[dim] % 2 == 0, f"axis {dim} of {tuple(self.shape)} cannot be halved")
    gate, up = self.float().chunk(2, dim=dim)
    return (F.silu(gate) * up).to(self.dtype)


def swiglu_backward(grad_output: Tensor, self: Tensor, dim: int = -1) -> Tensor:
    demand_same_type(grad_output=grad_output, self=self)
    grad = grad_output.float()
    gate, up = self.float().chunk(2, dim=dim)
    sigmoid = gate.sigmoid()
    return torch.cat(
        (grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), grad * gate * sigmoid), dim=dim
    ).to(self.dtype)


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norm_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.npu.npu_rms_norm_backward(grad, *ctx.saved_tensors), None)


def _keep_rotary(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.mode, ctx.further = inputs[3], len(inputs) - 3


def _rotary_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    self, r1, r2 = ctx.saved_tensors
    gradients = torch.ops.npu.npu_rotary_mul_backward(grad, self, r1, r2, ctx.mode)
    return (*gradients, *[None] * ctx.further)


def _keep_swiglu(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dim = inputs[1]


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.npu.npu_swiglu_backward(grad, ctx.saved_tensors[0], ctx.dim), None


IMPLEMENTATIONS = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
}
DERIVATIVES = {
    "npu_rms_norm": (_norm_gradient, _keep_norm),
    "npu_rotary_mul": (_rotary_gradient, _keep_rotary),
    "npu_swiglu": (_swiglu_gradient, _keep_swiglu),
}
