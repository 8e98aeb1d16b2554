"""Attention of short segments by plain products, for a CPU in bf16, where these outrun the fused kernel's backward.

Legend: L tokens of a segment, Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 512  # the probabilities kept for backward grow with the square of the length


class _ShortAttention(torch.autograd.Function):
    """query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]; heads that share keys are one matrix product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        length, width = query.shape[0], query.shape[-1]
        query, key, value = (_by_key_head(tensor, key.shape[1]) for tensor in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
        if causal:
            above = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu_(1)
            scores.view(-1, length, length).add_(above)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.shape = scale, (length, width)
        return _by_token(torch.bmm(weights, value), length, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        length, width = ctx.shape
        grad = _by_key_head(grad, key.shape[0])
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        grads = torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query), grad_value
        return *(_by_token(one, length, width) for one in grads), None, None


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """[L, heads, D] -> [Hkv, heads / Hkv * L, D]."""
    return tensor.transpose(0, 1).reshape(key_heads, -1, tensor.shape[-1])


def _by_token(tensor: Tensor, length: int, width: int) -> Tensor:
    """[Hkv, heads / Hkv * L, D] -> [L, heads, D]."""
    return tensor.view(-1, length, width).transpose(0, 1)


def short_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One segment of at most LONGEST tokens: query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]."""
    return _ShortAttention.apply(query, key, value, scale, causal)
