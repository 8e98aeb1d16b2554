"""Attention of short segments by plain products, for a CPU in bf16, where these outrun the fused kernel's backward.

There a product is prepared anew for every length, which takes longer than the product itself. So segments are filled
up with zeros to a few lengths; keys that are filling get no weight, and queries that are filling are left out again.

Legend: L tokens of a segment, F the same with filling, Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LONGEST = 512  # beyond, the fused kernel is faster; the probabilities kept for backward grow with the square too
STEP = 32


class _ShortAttention(torch.autograd.Function):
    """query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]; heads that share keys are one matrix product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        length, heads = query.shape[0], key.shape[1]
        filled = math.ceil(length / STEP) * STEP
        query, key, value = (_by_key_head(tensor, heads, filled) for tensor in (query, key, value))
        mask = _mask(length, filled, query, causal=causal)
        weights = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale, beta=0 if mask.numel() == 1 else 1)
        weights = weights.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.length = scale, length
        return _by_token(torch.bmm(weights, value), length, filled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        filled, unused = key.shape[1], key.new_zeros(1, 1, 1)
        grad = _by_key_head(grad, key.shape[0], filled)
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.baddbmm(unused, grad_scores, key, alpha=ctx.scale, beta=0)
        grad_key = torch.baddbmm(unused, grad_scores.transpose(1, 2), query, alpha=ctx.scale, beta=0)
        return *(_by_token(one, ctx.length, filled) for one in (grad_query, grad_key, grad_value)), None, None


def _mask(length: int, filled: int, query: Tensor, *, causal: bool) -> Tensor:
    """What is added to the scores: [Hkv, Hq / Hkv * F, F], or a single zero where all see all.

    Causal queries see no filling, which comes after them; the filling itself sees something, so that nothing is NaN.
    """
    if not causal and length == filled:
        return query.new_zeros(1, 1, 1)
    mask = query.new_zeros(filled, filled)
    if causal:
        mask.fill_(float("-inf")).triu_(1)
    else:
        mask[:, length:] = float("-inf")
    heads, rows, _ = query.shape
    return mask.expand(heads, rows // filled, filled, filled).reshape(heads, rows, filled)


def _by_key_head(tensor: Tensor, key_heads: int, filled: int) -> Tensor:
    """[L, heads, D] -> [Hkv, heads / Hkv * F, D]."""
    length, heads, width = tensor.shape
    if length == filled:
        return tensor.transpose(0, 1).reshape(key_heads, -1, width)
    rows = tensor.new_empty(heads, filled, width)
    rows[:, :length] = tensor.transpose(0, 1)
    rows[:, length:] = 0
    return rows.view(key_heads, -1, width)


def _by_token(tensor: Tensor, length: int, filled: int) -> Tensor:
    """[Hkv, heads / Hkv * F, D] -> [L, heads, D]."""
    return tensor.view(-1, filled, tensor.shape[-1])[:, :length].transpose(0, 1)


def short_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One segment of at most LONGEST tokens: query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]."""
    return _ShortAttention.apply(query, key, value, scale, causal)
