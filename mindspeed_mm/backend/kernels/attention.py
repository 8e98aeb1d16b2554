"""Attention over packed sequences: every kernel takes [tokens, heads, width] and never looks across a boundary."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels import pick
from mindspeed_mm.backend.kernels.math_attention import LONGEST, short_attention
from mindspeed_mm.backend.kernels.segments import AttentionKernel, Segments
from mindspeed_mm.backend.kernels.varlen_attention import find_varlen


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """The definition, written out, with the softmax in fp32: slow, and the reference for the others."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(tensor.split(segments.lengths) for tensor in (query, key, value)), strict=True):
        q = q.transpose(0, 1)
        k = k.transpose(0, 1).repeat_interleave(groups, dim=0)
        v = v.transpose(0, 1).repeat_interleave(groups, dim=0)
        scores = torch.matmul(q, k.transpose(1, 2)) * scale
        if causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        outputs.append(torch.matmul(weights, v).transpose(0, 1))
    return torch.cat(outputs)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """``scaled_dot_product_attention``: one call where all segments are equally long, else one per segment."""
    lengths = segments.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        q, k, v = (tensor.view(*shape, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value))
        return _sdpa(q, k, v, causal=causal, scale=scale).transpose(1, 2).reshape(query.shape)
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    return torch.cat([_segment(*part, causal=causal, scale=scale) for part in parts])


def _segment(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """``sdpa`` of one segment, [L, heads, D]."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    return _sdpa(q, k, v, causal=causal, scale=scale).squeeze(0).transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """[B, Hq, L, D] with [B, Hkv, L, D]."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """``sdpa``, but for short segments in bf16, where a CPU's fused backward is slow and plain products are faster."""
    if query.dtype != torch.bfloat16:
        return sdpa_attention(query, key, value, segments=segments, causal=causal, scale=scale)
    parts = zip(*(tensor.split(segments.lengths) for tensor in (query, key, value)), strict=True)
    return torch.cat([
        (short_attention if len(part[0]) <= LONGEST else _segment)(*part, causal=causal, scale=scale) for part in parts
    ])


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """``torch.nn.attention.varlen``: one call for all segments; in fp32, which it does not take, ``sdpa``."""
    kernel = find_varlen(query.device.type)
    if query.dtype == torch.float32 or kernel is None:
        return sdpa_attention(query, key, value, segments=segments, causal=causal, scale=scale)
    return kernel(query, key, value, segments.offsets, segments.max_length, causal=causal, scale=scale)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """The flash-attn package's variable-length kernel."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=segments.offsets,
        cu_seqlens_k=segments.offsets,
        max_seqlen_q=segments.max_length,
        max_seqlen_k=segments.max_length,
        softmax_scale=scale,
        causal=causal,
    )


def attention_kernel(name: str | None, *, device: str) -> AttentionKernel:
    """The attention called ``name``; None picks the device's best.

    All devices have ``eager`` and ``sdpa``; a CPU ``products``; CUDA ``flash_attention_2`` where the flash-attn package
    is installed, and ``varlen`` where torch's own kernel for packed sequences works; an NPU ``npu_fusion_attention``,
    for which the recipe's files also say ``flash_attention_2``.

    Raises:
        UserError: if the device does not have it.
    """
    table: dict[str, AttentionKernel] = {"eager": eager_attention, "sdpa": sdpa_attention}
    if device == "cpu":
        table["products"] = math_attention
    if device == "cuda" and find_varlen(device) is not None:
        table["varlen"] = varlen_attention
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        table["flash_attention_2"] = flash_attention
    if device == "npu":
        from mindspeed_mm.backend.kernels.npu_attention import fusion_attention

        table["npu_fusion_attention"] = table["flash_attention_2"] = fusion_attention
    if name is None:
        name = next(best for best in ("flash_attention_2", "varlen", "products", "sdpa") if best in table)
    return pick("attn_implementation", name, table, device=device)
