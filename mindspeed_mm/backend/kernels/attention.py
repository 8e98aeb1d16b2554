"""Attention over packed sequences: every kernel takes [T, heads, D] and never looks across a sequence boundary.

Legend: T tokens of B sequences, L tokens of one, P padded length, Hq query heads, Hkv key/value heads, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Boundaries of the sequences in a packed batch.

    Attributes:
        cu_seqlens: int32 [B + 1] on the device, from 0 to T.
        cu_seqlens_host: the same numbers on the host, so that kernels need no host-device synchronisation.
        max_seqlen: length of the longest sequence.
    """

    cu_seqlens: Tensor
    cu_seqlens_host: list[int]
    max_seqlen: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in itertools.pairwise(self.cu_seqlens_host)]


class AttentionKernel(Protocol):
    """``query`` [T, Hq, D], ``key`` and ``value`` [T, Hkv, D] with Hq a multiple of Hkv -> [T, Hq, D]."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
    ) -> Tensor:
        """Softmax(scale * query @ key^T) @ value within each sequence."""


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """The reference: matrix products per sequence, with the softmax in fp32. Slow."""
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
    """``scaled_dot_product_attention``: one call if all sequences have one length, else one per sequence."""
    lengths = segments.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        q, k, v = (tensor.view(*shape, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value))
        return _sdpa(q, k, v, causal=causal, scale=scale).transpose(1, 2).reshape(query.shape)
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    return torch.cat([_sdpa_sequence(*part, causal=causal, scale=scale) for part in parts])


def _sdpa_sequence(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """``sdpa`` of one sequence, [L, heads, D]."""
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
    """Matrix products for short bf16 sequences, where a CPU's fused backward is slow; ``sdpa`` for the rest."""
    if query.dtype != torch.bfloat16:
        return sdpa_attention(query, key, value, segments=segments, causal=causal, scale=scale)
    parts = zip(*(tensor.split(segments.lengths) for tensor in (query, key, value)), strict=True)
    outputs = []
    for part in parts:
        kernel = math_attention_sequence if len(part[0]) <= MATH_MAX_SEQLEN else _sdpa_sequence
        outputs.append(kernel(*part, causal=causal, scale=scale))
    return torch.cat(outputs)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """``torch.nn.attention.varlen``: one call for all sequences; ``sdpa`` for fp32, which it does not support."""
    kernel = find_varlen(query.device.type)
    if query.dtype == torch.float32 or kernel is None:
        return sdpa_attention(query, key, value, segments=segments, causal=causal, scale=scale)
    return kernel(query, key, value, segments.cu_seqlens, segments.max_seqlen, causal=causal, scale=scale)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """The flash-attn package's variable-length kernel."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        softmax_scale=scale,
        causal=causal,
    )


MATH_MAX_SEQLEN = 512  # beyond it sdpa is faster, and the probabilities kept for backward grow quadratically
_PADDING_MULTIPLE = 32


class _MathAttention(torch.autograd.Function):
    """query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]; query heads that share keys are one matrix product.

    oneDNN prepares a bf16 product anew for every shape, which takes longer than the product itself. So sequences are
    padded to few lengths; padded keys are masked, and padded queries are cut off.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        length, heads = query.shape[0], key.shape[1]
        padded = math.ceil(length / _PADDING_MULTIPLE) * _PADDING_MULTIPLE
        query, key, value = (_group_by_key_head(tensor, heads, padded) for tensor in (query, key, value))
        mask = _mask(length, padded, query, causal=causal)
        weights = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale, beta=0 if mask.numel() == 1 else 1)
        weights = weights.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.length = scale, length
        return _split_by_token(torch.bmm(weights, value), length, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        padded, unused = key.shape[1], key.new_zeros(1, 1, 1)
        grad = _group_by_key_head(grad, key.shape[0], padded)
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.baddbmm(unused, grad_scores, key, alpha=ctx.scale, beta=0)
        grad_key = torch.baddbmm(unused, grad_scores.transpose(1, 2), query, alpha=ctx.scale, beta=0)
        return *(_split_by_token(one, ctx.length, padded) for one in (grad_query, grad_key, grad_value)), None, None


def _mask(length: int, padded: int, query: Tensor, *, causal: bool) -> Tensor:
    """Additive mask of the scores: [Hkv, Hq / Hkv * P, P], or a single zero where nothing is masked.

    Causal queries never see the padding, which comes after them; padded queries see some keys, which avoids NaN.
    """
    if not causal and length == padded:
        return query.new_zeros(1, 1, 1)
    mask = query.new_zeros(padded, padded)
    if causal:
        mask.fill_(float("-inf")).triu_(1)
    else:
        mask[:, length:] = float("-inf")
    heads, queries, _ = query.shape
    return mask.expand(heads, queries // padded, padded, padded).reshape(heads, queries, padded)


def _group_by_key_head(tensor: Tensor, key_heads: int, padded: int) -> Tensor:
    """[L, heads, D] -> [Hkv, heads / Hkv * P, D]."""
    length, heads, width = tensor.shape
    if length == padded:
        return tensor.transpose(0, 1).reshape(key_heads, -1, width)
    result = tensor.new_empty(heads, padded, width)
    result[:, :length] = tensor.transpose(0, 1)
    result[:, length:] = 0
    return result.view(key_heads, -1, width)


def _split_by_token(tensor: Tensor, length: int, padded: int) -> Tensor:
    """[Hkv, heads / Hkv * P, D] -> [L, heads, D]."""
    return tensor.view(-1, padded, tensor.shape[-1])[:, :length].transpose(0, 1)


def math_attention_sequence(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One sequence of at most MATH_MAX_SEQLEN tokens: query [L, Hq, D], key and value [L, Hkv, D] -> [L, Hq, D]."""
    return _MathAttention.apply(query, key, value, scale, causal)


@dataclasses.dataclass(frozen=True)
class VarlenKernel:
    """``torch.nn.attention.varlen``, called with the arguments that the installed version of torch takes.

    Attributes:
        function: ``varlen_attn``.
        accepts: names of its parameters.
        repeat_heads: whether keys and values must be repeated for each query head.
    """

    function: Callable[..., Any]
    accepts: frozenset[str]
    repeat_heads: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] in bf16 or fp16, cu_seqlens int32 [B + 1] -> [T, Hq, D]."""
        groups = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {}
        if "scale" in self.accepts:
            options["scale"] = scale
        elif not math.isclose(scale, query.shape[-1] ** -0.5):
            query = query * (scale * query.shape[-1] ** 0.5)
        if causal:
            options.update({"window_size": (-1, 0)} if "window_size" in self.accepts else {"is_causal": True})
        if groups > 1 and self.repeat_heads:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        elif groups > 1 and "enable_gqa" in self.accepts:
            options["enable_gqa"] = True
        return self.function(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


@functools.cache
def find_varlen(device: str) -> VarlenKernel | None:
    """The kernel in a form that works on ``device``, or None: torch below 2.10 or an unsupported GPU.

    Its signature changed between versions, and not every GPU is supported, so it is tried once on small inputs.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepts = frozenset(inspect.signature(varlen_attn).parameters)
    if not accepts & {"window_size", "is_causal"}:
        return None
    for repeat_heads in (False, True):
        kernel = VarlenKernel(varlen_attn, accepts, repeat_heads)
        if _matches_reference(kernel, device):
            return kernel
    return None


def _matches_reference(kernel: VarlenKernel, device: str) -> bool:
    """Whether values and gradients match plain arithmetic, on two sequences with shared key heads."""
    generator = torch.Generator().manual_seed(0)
    # explicit device: the caller may run under torch.device("meta")
    inputs = [torch.randn(24, heads, 64, generator=generator, device="cpu").to(device, torch.bfloat16)
              for heads in (4, 2, 2)]
    results = []
    for function in (kernel, _varlen_reference):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        try:
            with torch.enable_grad():
                output = function(*own, torch.tensor([0, 7, 24], dtype=torch.int32, device=device), 17,
                                  causal=True, scale=0.125)
                output.float().square().sum().backward()
        except (RuntimeError, TypeError, ValueError):  # unsupported hardware or arguments
            return False
        results.append([output, *(tensor.grad for tensor in own)])
    pairs = zip(*results, strict=True)
    return all(float((one - other).float().norm()) < 0.05 * float(other.float().norm()) for one, other in pairs)


def _varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool, scale: float
) -> Tensor:
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1).float() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(k), dim=0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        scores += torch.full_like(scores[0], float("-inf")).triu(1)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)
