"""Triton kernels of the router: the k largest of a softmax, renormalised to sum 1, in one pass each way.

The denominator of the softmax over all experts cancels, so the weights are the softmax over the k largest logits:
with w the weights, the gradient of a chosen logit is ``w * (g - sum(w * g))``, and that of the others is 0.

Legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

LOWEST = -3e38
ROWS = 4
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    logits: tl.tensor, weights: tl.tensor, rounded: tl.tensor, experts: tl.tensor, num_tokens: int,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    LOWEST: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS tokens per program; WIDTH is E."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    column = tl.arange(0, BLOCK)[None, :]
    at = logits + token[:, None].to(tl.int64) * WIDTH + column
    values = tl.load(at, mask=exists[:, None] & (column < WIDTH), other=0.0).to(tl.float32)
    # chosen by numbers that are all comparable, so that no index is taken twice or lies beyond the last expert
    keys = tl.where(values > LOWEST, values, LOWEST)
    free = column < WIDTH
    chosen = ()
    for rank in tl.static_range(TOP_K):
        index = tl.argmax(tl.where(free, keys, float("-inf")), axis=1)
        chosen = chosen + (tl.sum(tl.where(column == index[:, None], values, 0.0), axis=1),)
        tl.store(experts + token.to(tl.int64) * TOP_K + rank, index.to(tl.int64), mask=exists)
        free = free & (column != index[:, None])
    total = tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(TOP_K):
        total += tl.exp(chosen[rank] - chosen[0])
    for rank in tl.static_range(TOP_K):
        weight = tl.exp(chosen[rank] - chosen[0]) / total
        tl.store(weights + token.to(tl.int64) * TOP_K + rank, weight, mask=exists)
        tl.store(rounded + token.to(tl.int64) * TOP_K + rank, weight.to(rounded.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad: tl.tensor, weights: tl.tensor, experts: tl.tensor, grad_logits: tl.tensor, num_tokens: int,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS tokens per program."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < num_tokens
    column = tl.arange(0, BLOCK)[None, :]
    along = tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(TOP_K):
        at = token.to(tl.int64) * TOP_K + rank
        weight = tl.load(weights + at, mask=exists, other=0.0)
        along += weight * tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    result = tl.zeros([ROWS, BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        at = token.to(tl.int64) * TOP_K + rank
        weight = tl.load(weights + at, mask=exists, other=0.0)
        value = weight * (tl.load(grad + at, mask=exists, other=0.0).to(tl.float32) - along)
        index = tl.load(experts + at, mask=exists, other=0)
        result = tl.where(column == index[:, None], value[:, None], result)
    to = grad_logits + token[:, None].to(tl.int64) * WIDTH + column
    tl.store(to, result.to(grad_logits.dtype.element_ty), mask=exists[:, None] & (column < WIDTH))


class _TopKSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        count, width = logits.shape
        weights = logits.new_empty(count, top_k, dtype=torch.float32)
        rounded = weights if dtype == torch.float32 else torch.empty_like(weights, dtype=dtype)
        experts = torch.empty_like(weights, dtype=torch.int64)
        if count:
            with on_device_of(logits):
                _forward_kernel[(triton.cdiv(count, ROWS),)](
                    logits, weights, rounded, experts, count, WIDTH=width, BLOCK=triton.next_power_of_2(width),
                    TOP_K=top_k, ROWS=ROWS, LOWEST=LOWEST, num_warps=NUM_WARPS)
        ctx.save_for_backward(weights, experts)
        ctx.width, ctx.dtype = width, logits.dtype
        ctx.mark_non_differentiable(experts)
        return rounded.clone() if rounded is weights else rounded, experts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        weights, experts = ctx.saved_tensors
        count, top_k = weights.shape
        grad_logits = weights.new_empty(count, ctx.width, dtype=ctx.dtype)
        if count:
            with on_device_of(grad):
                _backward_kernel[(triton.cdiv(count, ROWS),)](
                    grad.contiguous(), weights, experts, grad_logits, count, WIDTH=ctx.width,
                    BLOCK=triton.next_power_of_2(ctx.width), TOP_K=top_k, ROWS=ROWS, num_warps=NUM_WARPS)
        return grad_logits, None, None


def top_k_softmax(logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest probabilities of each token's softmax, renormalised to sum 1; of equals the first.

    Args:
        logits: [T, E] in fp32, bf16 or fp16.
        top_k: k, at most E.
        dtype: of the weights; the arithmetic is fp32.

    Returns:
        (weights [T, k], falling, with a gradient for ``logits``; experts int64 [T, k]).
    """
    return _TopKSoftmax.apply(logits, top_k, dtype)
