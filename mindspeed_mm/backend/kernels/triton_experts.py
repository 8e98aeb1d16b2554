"""Expert feed-forward networks on a CUDA GPU: torch's grouped products with Triton kernels around them.

Legend: N permuted tokens (sorted by expert), E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels.experts import ExpertAdapters, GroupedProducts, RowSwiglu, run_experts
from mindspeed_mm.backend.kernels.triton_grouped import add_weight_gradient
from mindspeed_mm.backend.kernels.triton_moe import weighted_swiglu, weighted_swiglu_backward

_SWIGLU = RowSwiglu(weighted_swiglu, weighted_swiglu_backward)


class _WeightedExperts(torch.autograd.Function):
    """Grouped products with Triton kernels around them, and with each token's routing weight inside SwiGLU.

    Since ``w * (h @ W) = (w * h) @ W``, the gradient of the weight is a sum over I columns of what SwiGLU's backward
    pass reads anyway, and the experts' results need not be kept. ``sums`` are where the gradients of the two weights
    are accumulated in fp32, or None where they are returned; see :func:`weighted_experts`.
    """

    @staticmethod
    def forward(
        ctx: Any, permuted: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, weights: Tensor | None, sums: Any
    ) -> Tensor:
        hidden = F.grouped_mm(permuted, gate_up, offs=ends)
        ctx.save_for_backward(permuted, gate_up, down, ends, hidden, weights)
        ctx.sums = sums
        return F.grouped_mm(weighted_swiglu(hidden, weights), down, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permuted, gate_up, down, ends, hidden, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_inner = F.grouped_mm(grad, down.transpose(1, 2), offs=ends)
        inner, grad_hidden, grad_weights = weighted_swiglu_backward(hidden, weights, grad_inner)
        grad_permuted = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = _grouped_weight_gradient(inner, grad, ends, ctx.sums[1])
        if ctx.needs_input_grad[0]:
            grad_permuted = F.grouped_mm(grad_hidden, gate_up.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_gate_up = _grouped_weight_gradient(permuted, grad_hidden, ends, ctx.sums[0])
        grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
        return grad_permuted, grad_gate_up, grad_down, None, grad_weights, None


def _grouped_weight_gradient(left: Tensor, right: Tensor, ends: Tensor, gradient_sum: Any) -> Tensor | None:
    """``left^T right`` over each expert's tokens [E, A, B]; None if it was added to ``gradient_sum``."""
    if gradient_sum is None:
        return F.grouped_mm(left.t(), right, offs=ends)
    total, add = gradient_sum()
    add_weight_gradient(left, right, ends, total, add=add)
    return None


def weighted_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, weights: Tensor | None = None, *,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """An :class:`~mindspeed_mm.backend.kernels.experts.ExpertKernel` that weighs rows.

    A weight may have an attribute ``gradient_sum``, a function that returns an fp32 tensor of its shape for its
    gradient, and whether to add to what is there. The gradient then goes there and not through autograd.
    """
    if permuted.shape[0] == 0:
        # The experts of a rank without tokens take part in backward all the same, with zero gradients.
        return permuted + sum(tensor.sum() for tensor in (gate_up, down, *(adapters or ())[:-1])) * 0
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    if adapters is not None:
        return run_experts(GroupedProducts(ends), _SWIGLU, permuted, gate_up, down, weights, adapters)
    sums = tuple(getattr(weight, "gradient_sum", None) for weight in (gate_up, down))
    return _WeightedExperts.apply(permuted, gate_up, down, ends, weights, sums)
