"""Expert products: SwiGLU feed-forward networks, one per group of rows.

Legend: N rows sorted by expert, E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels import pick
from mindspeed_mm.backend.kernels.elementwise import EAGER_SWIGLU, SwigluKernel, swiglu_kernel, torch_swiglu
from mindspeed_mm.backend.kernels.padded_bucket_experts import padded_bucket_experts
from mindspeed_mm.backend.kernels.permutation import TokenPermuter


class ExpertKernel(Protocol):
    """rows [N, H], gate_up [E, H, 2I], down [E, I, H], rows_per_expert int [E] on the device -> [N, H]."""

    def __call__(self, rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor) -> Tensor:
        """``(silu(x @ gate) * (x @ up)) @ down`` with each row's own expert."""


def looped_experts(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor) -> Tensor:
    """One pair of products per expert that has rows: the reference. Reads the row counts on the host."""
    # unbind, since indexing would make backward fill a zero tensor of all experts for each of them
    parts = zip(rows.split(rows_per_expert.tolist()), gate_up.unbind(0), down.unbind(0), strict=True)
    outputs = [torch_swiglu(part @ first) @ second for part, first, second in parts if part.shape[0] > 0]
    if outputs:
        return torch.cat(outputs)
    # A rank may get no row at all; its experts take part in backward nevertheless, with gradients of zero.
    return rows + (gate_up.sum() + down.sum()) * 0


class _GroupedExperts(torch.autograd.Function):
    """All experts' feed-forward networks; every product, of gradients too, is one grouped product.

    Keeps the rows and what the first product makes of them [N, 2I]; SwiGLU runs again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, swiglu: SwigluKernel
    ) -> Tensor:
        hidden = F.grouped_mm(rows, gate_up, offs=ends)
        ctx.save_for_backward(rows, gate_up, down, ends, hidden)
        ctx.swiglu = swiglu
        return F.grouped_mm(swiglu.forward(hidden), down, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, ends, hidden = ctx.saved_tensors
        # grouped_mm refuses strides of zero, which an expanded gradient such as sum()'s has
        grad = grad.contiguous()
        grad_inner = F.grouped_mm(grad, down.transpose(1, 2), offs=ends)
        inner, grad_hidden = ctx.swiglu.again(hidden, grad_inner)
        grad_rows = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = F.grouped_mm(inner.t(), grad, offs=ends)
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad_hidden, gate_up.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_gate_up = F.grouped_mm(rows.t(), grad_hidden, offs=ends)
        return grad_rows, grad_gate_up, grad_down, None, None


def grouped_experts(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, *, swiglu: SwigluKernel = EAGER_SWIGLU
) -> Tensor:
    """``torch.nn.functional.grouped_mm``: the row counts stay on the device."""
    return _GroupedExperts.apply(rows, gate_up, down, rows_per_expert.cumsum(0).to(torch.int32), swiglu)


def expert_kernel_name(
    *, fused: bool, hidden_size: int, intermediate_size: int, device: str, dtype: torch.dtype
) -> str:
    """Which expert kernel serves a model: a grouped one if ``fused`` and there is one, else the reference ``loop``.

    An NPU has ``npu_grouped_matmul``. Elsewhere it is torch's own ``grouped_mm``: torch 2.7 has none, and later ones
    want rows that begin at multiples of 16 bytes, which in bf16 are 8 values: published models have that, toy models
    may not. A CPU in bf16 has ``bucketed``, which is faster there than either (docs/performance.md).

    Args:
        fused: whether a grouped kernel is wanted.
        hidden_size: H.
        intermediate_size: I.
        device: kind of device.
        dtype: what the products are computed in.
    """
    if device == "npu":
        return "npu_grouped_matmul" if fused else "loop"
    if device == "cpu" and dtype == torch.bfloat16:
        return "bucketed" if fused else "loop"
    aligned = hidden_size % 8 == 0 and intermediate_size % 8 == 0
    return "grouped_mm" if fused and aligned and hasattr(F, "grouped_mm") else "loop"


def expert_kernel(name: str, *, device: str, compiled: bool = False) -> ExpertKernel:
    """The expert kernel called ``name``; ``compiled``: with SwiGLU by torch.compile, where a kernel has a choice.

    Raises:
        UserError: if the device or this torch does not have it.
    """
    table: dict[str, ExpertKernel] = {"loop": looped_experts}
    if hasattr(F, "grouped_mm"):
        table["grouped_mm"] = grouped_experts
    if device == "cpu":
        table["bucketed"] = padded_bucket_experts
    if compiled:
        swiglu = swiglu_kernel(compiled=True)
        for grouped in table.keys() - {"loop"}:
            table[grouped] = functools.partial(table[grouped], swiglu=swiglu)
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_experts import npu_grouped_experts

        table = {"loop": looped_experts, "npu_grouped_matmul": npu_grouped_experts}
    return pick("expert kernel", name, table, device=device)


def token_permuter(plain: TokenPermuter, *, fused: bool, device: str) -> TokenPermuter:
    """The device's fused operators if ``fused`` and it has any, else ``plain``."""
    if fused and device == "npu":
        from mindspeed_mm.backend.kernels.npu_experts import NpuTokenPermuter

        return NpuTokenPermuter(plain)
    return plain
