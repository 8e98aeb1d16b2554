"""Experts by torch_npu's grouped operators: token permutation, grouped products, SwiGLU.

Legend: T tokens, N rows sorted by expert, E experts, k experts per token, H hidden and I intermediate width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.npu_elementwise import npu_swiglu
from mindspeed_mm.backend.kernels.permutation import TokenPermuter

MOST_EXPERTS = 1024  # groups of one grouped product
_ONE_TENSOR = 3  # split_item: one result
_ALONG_ROWS, _ALONG_INNER = 0, 2  # group_type: which axis of x @ w the groups divide
_CUMULATIVE = 0  # group_list_type: where each group ends; the only one that may hold a single group


def _grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, *, group_type: int) -> Tensor:
    import torch_npu

    return torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=ends, split_item=_ONE_TENSOR, group_type=group_type, group_list_type=_CUMULATIVE
    )[0]


class _GroupedProduct(torch.autograd.Function):
    """rows [N, K] @ weight [E, K, M] by group; torch_npu has no derivative of it, so both gradients are made here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return _grouped_matmul(rows, weight, ends, group_type=_ALONG_ROWS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = _grouped_matmul(grad, weight.transpose(1, 2), ends, group_type=_ALONG_ROWS)
        if ctx.needs_input_grad[1]:
            # one [K, M] matrix for each group of the rows that are summed over
            grad_weight = _grouped_matmul(rows.t(), grad, ends, group_type=_ALONG_INNER)
        return grad_rows, grad_weight, None


def npu_grouped_experts(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor) -> Tensor:
    """See :class:`mindspeed_mm.backend.kernels.experts.ExpertKernel`; the row counts stay on the device."""
    if rows.shape[0] == 0:
        # The operators want rows. The experts take part in backward nevertheless, with gradients of zero.
        return rows + (gate_up[:0].sum() + down[:0].sum()).to(rows.dtype)
    ends = rows_per_expert.cumsum(0)
    inner = npu_swiglu(_GroupedProduct.apply(rows, gate_up, ends))
    return _GroupedProduct.apply(inner, down, ends)


class _Permuted(NamedTuple):
    """What brings permuted rows back: int32 [N], the row of each of the T * k choices."""

    sorted_indices: Tensor


class NpuTokenPermuter:
    """A ``TokenPermuter`` by ``npu_moe_token_permute`` and ``npu_moe_token_unpermute``.

    Both are documented for bfloat16 and for at least one row; anything else goes the plain way.
    """

    def __init__(self, plain: TokenPermuter) -> None:
        self._plain = plain

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """int64 [E]."""
        if experts.numel() == 0:
            return self._plain.count(experts, num_experts)
        return torch.histc(experts.flatten(), bins=num_experts, min=0, max=num_experts).to(torch.int64)

    def permute(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
        """[T, H] -> [N, H]."""
        if tokens.dtype is not torch.bfloat16 or experts.numel() == 0:
            return self._plain.permute(tokens, experts)
        import torch_npu

        rows, sorted_indices = torch_npu.npu_moe_token_permute(tokens, experts)
        return rows, _Permuted(sorted_indices)

    def unpermute(self, rows: Tensor, places: Any, weights: Tensor | None = None) -> Tensor:
        """[N, H] -> [T, H]."""
        if not isinstance(places, _Permuted):
            return self._plain.unpermute(rows, places, weights)
        import torch_npu

        return torch_npu.npu_moe_token_unpermute(rows, places.sorted_indices, probs=weights)
