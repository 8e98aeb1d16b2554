"""Triton kernels between the joint projection and attention: split, RMSNorm of each head, rotary embedding.

They are bound by memory: one pass forward and one backward, each of which reads its inputs once and writes its results
once. The arithmetic is fp32, and results are rounded once, at the end. The gradients of the norms' weights are summed
without atomic additions, so that their order never changes.

Legend: T tokens, G groups of Q query heads that share one key and one value head, D width of a head. A group has Q + 2
slots of D columns in the joint projection: its query heads, then its key head, then its value head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

NUM_WARPS = 4
# A thread has VECTOR_BYTES of consecutive columns of each half of a head, or as many as divide the half; a program has
# as many tokens as its threads can hold in this way, and goes through their heads.
VECTOR_BYTES = 16
# How many heads a thread loads before it stores anything: bytes in flight against registers. Forward and, with a norm,
# backward take 128 registers of a thread at D = 128, so that a multiprocessor of an H100 has 4 programs at once.
FORWARD_UNROLL = 4
BACKWARD_UNROLL = 4
NORM_BACKWARD_UNROLL = 1


class Heads(NamedTuple):
    """Layout of the joint projection.

    Attributes:
        groups: G.
        queries: Q.
        width: D, which is even.
    """

    groups: int
    queries: int
    width: int



@triton.jit
def _load_halves(at: tl.tensor, mask: tl.tensor, HALF: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)


@triton.jit
def _store_halves(
    at: tl.tensor, first: tl.tensor, second: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> None:  # fmt: skip
    tl.store(at, first.to(at.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _tokens(
    num_tokens: int, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Tokens [TOKENS, 1] of this program, columns [1, BLOCK] of half a head, and the mask of what exists."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (token < num_tokens) & (column < HALF)
    return token.to(tl.int64), column, mask


@triton.jit
def _load_angles(
    cos: tl.tensor, sin: tl.tensor, offset: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The halves of cosines and of sines, fp32 [TOKENS, BLOCK]."""
    cos_first, cos_second = _load_halves(cos + offset, mask, HALF)
    sin_first, sin_second = _load_halves(sin + offset, mask, HALF)
    return cos_first.to(tl.float32), cos_second.to(tl.float32), sin_first.to(tl.float32), sin_second.to(tl.float32)


@triton.jit
def _inverse_rms(first: tl.tensor, second: tl.tensor, eps: float, WIDTH: tl.constexpr) -> tl.tensor:
    """[TOKENS, 1] of the halves [TOKENS, BLOCK] of a head, which are 0 where masked."""
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1, keep_dims=True) / WIDTH + eps)


@triton.jit
def _load_weight(weight: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The halves [1, BLOCK] of a norm's weight, fp32."""
    column = tl.arange(0, BLOCK)[None, :]
    first, second = _load_halves(weight + column, column < WIDTH // 2, WIDTH // 2)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _slot(head: tl.tensor, per_group: tl.constexpr, slots: tl.constexpr) -> tl.tensor:
    """The slot of a head, one of ``per_group`` in each group, from the first group's first such head on."""
    return head // per_group * slots + head % per_group


@triton.jit
def _forward_heads(
    mixed_at: tl.tensor, weight: tl.tensor | None, angles: tl.tuple | None, result_at: tl.tensor, mask: tl.tensor,
    first_head: tl.tensor, eps: float,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """HEADS heads of one kind; without a weight no norm, without angles a copy.

    Pointers [TOKENS, BLOCK] are to the first half of the first group's first head of the kind.
    """
    HALF: tl.constexpr = WIDTH // 2
    if weight is not None:
        weight_first, weight_second = _load_weight(weight, WIDTH, mixed_at.shape[1])
    for start in range(first_head, first_head + HEADS, UNROLL):
        # all loads come before the first store, across which the compiler cannot move them
        heads = ()
        for step in tl.static_range(UNROLL):
            at = mixed_at + _slot(start + step, PER_GROUP, SLOTS) * WIDTH
            heads = heads + (_load_halves(at, mask, HALF),)
        for step in tl.static_range(UNROLL):
            first, second = heads[step]
            if angles is not None:
                cos_first, cos_second, sin_first, sin_second = angles
                from_first, from_second = first.to(tl.float32), second.to(tl.float32)
                if weight is not None:
                    scale = _inverse_rms(from_first, from_second, eps, WIDTH)
                    from_first, from_second = from_first * scale * weight_first, from_second * scale * weight_second
                first = from_first * cos_first - from_second * sin_first
                second = from_second * cos_second + from_first * sin_second
            _store_halves(result_at + (start + step) * WIDTH, first, second, mask, HALF)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    mixed: tl.tensor, query_weight: tl.tensor | None, key_weight: tl.tensor | None, cos: tl.tensor, sin: tl.tensor,
    query: tl.tensor, key: tl.tensor, value: tl.tensor | None, num_tokens: int, eps: float,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, QUERY_UNROLL: tl.constexpr, KEY_UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """TOKENS tokens per program; without ``value`` that slot is left alone.

    It goes through CHUNK groups at a time: where a head's end is inside a line of memory, the next head follows
    while the line is in the cache.
    """
    SLOTS: tl.constexpr = QUERIES + 2
    token, column, mask = _tokens(num_tokens, WIDTH // 2, TOKENS, BLOCK)
    mixed_at = mixed + token * (GROUPS * SLOTS * WIDTH) + column
    query_at = query + token * (GROUPS * QUERIES * WIDTH) + column
    key_offset = token * (GROUPS * WIDTH) + column
    angles = _load_angles(cos, sin, token * WIDTH + column, mask, WIDTH // 2)
    for group in range(0, GROUPS, CHUNK):
        _forward_heads(
            mixed_at, query_weight, angles, query_at, mask, group * QUERIES, eps,
            CHUNK * QUERIES, QUERIES, SLOTS, WIDTH, QUERY_UNROLL,
        )  # fmt: skip
        _forward_heads(
            mixed_at + QUERIES * WIDTH, key_weight, angles, key + key_offset, mask, group, eps,
            CHUNK, 1, SLOTS, WIDTH, KEY_UNROLL,
        )  # fmt: skip
        if value is not None:
            _forward_heads(
                mixed_at + (QUERIES + 1) * WIDTH, None, None, value + key_offset, mask, group, eps,
                CHUNK, 1, SLOTS, WIDTH, KEY_UNROLL,
            )  # fmt: skip


@triton.jit
def _backward_heads(
    grad: tl.tensor | None, grad_offset: tl.tensor, mixed: tl.tensor | None, mixed_offset: tl.tensor,
    weight: tl.tensor | None, angles: tl.tuple | None, grad_mixed: tl.tensor | None, sums: tl.tensor | None,
    sums_offset: tl.tensor, mask: tl.tensor, first_head: tl.tensor, eps: float,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """As :func:`_forward_heads`; ``sums`` is set to the gradient of the weight from these tokens and heads."""
    HALF: tl.constexpr = WIDTH // 2
    zeros = tl.zeros(mask.shape, tl.float32)
    sum_first, sum_second = zeros, zeros
    if weight is not None:
        weight_first, weight_second = _load_weight(weight, WIDTH, mask.shape[1])
    for start in range(first_head, first_head + HEADS, UNROLL):
        # all loads come before the first store, across which the compiler cannot move them
        grads, heads = (), ()
        for step in tl.static_range(UNROLL):
            if grad is None:
                grads = grads + ((zeros, zeros),)
            else:
                grads = grads + (_load_halves(grad + grad_offset + (start + step) * WIDTH, mask, HALF),)
            if weight is not None:
                at = mixed + mixed_offset + _slot(start + step, PER_GROUP, SLOTS) * WIDTH
                heads = heads + (_load_halves(at, mask, HALF),)
        for step in tl.static_range(UNROLL):
            first, second = grads[step]
            if angles is not None:
                cos_first, cos_second, sin_first, sin_second = angles
                from_first, from_second = first.to(tl.float32), second.to(tl.float32)
                first = from_first * cos_first + from_second * sin_second
                second = from_second * cos_second - from_first * sin_first
            if weight is not None:
                head_first, head_second = heads[step]
                head_first, head_second = head_first.to(tl.float32), head_second.to(tl.float32)
                scale = _inverse_rms(head_first, head_second, eps, WIDTH)
                head_first *= scale
                head_second *= scale
                if sums is not None:
                    sum_first += first * head_first
                    sum_second += second * head_second
                first *= weight_first
                second *= weight_second
                along = tl.sum(first * head_first + second * head_second, axis=1, keep_dims=True) / WIDTH
                first, second = scale * (first - head_first * along), scale * (second - head_second * along)
            if grad_mixed is not None:
                at = grad_mixed + mixed_offset + _slot(start + step, PER_GROUP, SLOTS) * WIDTH
                _store_halves(at, first, second, mask, HALF)
    if sums is not None:
        in_half = tl.arange(0, mask.shape[1]) < HALF
        _store_halves(sums + sums_offset, tl.sum(sum_first, axis=0), tl.sum(sum_second, axis=0), in_half, HALF)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_query: tl.tensor | None, grad_key: tl.tensor | None, grad_value: tl.tensor | None,
    mixed: tl.tensor | None, query_weight: tl.tensor | None, key_weight: tl.tensor | None,
    cos: tl.tensor, sin: tl.tensor, grad_mixed: tl.tensor | None, partial_sums: tl.tensor | None,
    num_tokens: int, eps: float,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, QUERY_UNROLL: tl.constexpr, KEY_UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """TOKENS tokens per program, each with a row of ``partial_sums``, for which CHUNK must be GROUPS.

    Where a gradient of a result is None it is 0; where a gradient to be computed is None it is left out.
    ``partial_sums`` is fp32 [programs, 2, D]: the sums for the weight of queries, and those for that of keys.
    """
    SLOTS: tl.constexpr = QUERIES + 2
    token, column, mask = _tokens(num_tokens, WIDTH // 2, TOKENS, BLOCK)
    query_offset = token * (GROUPS * QUERIES * WIDTH) + column
    key_offset = token * (GROUPS * WIDTH) + column
    mixed_offset = token * (GROUPS * SLOTS * WIDTH) + column
    KEY: tl.constexpr = QUERIES * WIDTH
    VALUE: tl.constexpr = KEY + WIDTH
    sums_offset = tl.program_id(0) * (2 * WIDTH) + tl.arange(0, BLOCK)
    angles = _load_angles(cos, sin, token * WIDTH + column, mask, WIDTH // 2)
    for group in range(0, GROUPS, CHUNK):
        _backward_heads(
            grad_query, query_offset, mixed, mixed_offset, query_weight, angles, grad_mixed, partial_sums,
            sums_offset, mask, group * QUERIES, eps, CHUNK * QUERIES, QUERIES, SLOTS, WIDTH, QUERY_UNROLL,
        )  # fmt: skip
        _backward_heads(
            grad_key, key_offset, mixed, mixed_offset + KEY, key_weight, angles, grad_mixed, partial_sums,
            sums_offset + WIDTH, mask, group, eps, CHUNK, 1, SLOTS, WIDTH, KEY_UNROLL,
        )  # fmt: skip
        _backward_heads(
            grad_value, key_offset, None, mixed_offset + VALUE, None, None, grad_mixed, None,
            sums_offset, mask, group, eps, CHUNK, 1, SLOTS, WIDTH, KEY_UNROLL,
        )  # fmt: skip


class _NormRotarySplit(torch.autograd.Function):
    """Keeps the joint projection for backward, which computes the norm again; without a norm only cosines and sines."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor, sin: Tensor,
        eps: float, heads: Heads,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        norm = query_weight is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mixed if norm else None, query_weight, key_weight, cos, sin)
        ctx.eps, ctx.heads, ctx.dtype = eps, heads, mixed.dtype
        # where mixed is kept anyway, the value may be a part of it
        return _launch_forward(mixed, query_weight, key_weight, cos, sin, eps, heads, copy_value=not norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for_mixed, *for_weights = ctx.needs_input_grad[:3]
        saved = ctx.saved_tensors  # only once: activation checkpointing may forget them then
        grad_mixed, sums = _launch_backward(
            grads, saved, ctx.eps, ctx.heads, ctx.dtype, for_mixed=for_mixed, for_weights=any(for_weights)
        )
        grad_weights = [
            total.to(weight.dtype) if needed else None
            for total, weight, needed in zip(sums, saved[1:3], for_weights, strict=True)
        ]
        return grad_mixed, *grad_weights, None, None, None, None


def norm_rotary_split(
    mixed: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    num_query_groups: int,
    queries_per_group: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of the joint projection, queries and keys normed and rotated.

    For each head x of the queries or the keys, with the halves (a, b) of its columns:
    ``(a, b) = weight * x * rsqrt(mean(x^2) + eps)``, and the result is ``(a cos - b sin, b cos + a sin)``.

    Args:
        mixed: [T, G * (Q + 2) * D] in fp32, bf16 or fp16: for each group its query heads, its key head, its value head.
        query_weight: [D], of the RMSNorm of each query; None, for both weights, for no norm.
        key_weight: [D], of that of each key.
        cos: [T, 1, D] of any of these types; its halves multiply the halves of a head.
        sin: as cos.
        eps: added to the mean square.
        num_query_groups: G.
        queries_per_group: Q.
        head_dim: D, an even number.

    Returns:
        The query [T, G * Q, D], with the heads in the order of ``mixed``; the key [T, G, D]; the value [T, G, D]. They
        have the type of ``mixed``, and all but the value are contiguous: it is a view of ``mixed`` unless that would
        keep memory which autograd can do without, and must not be written to.
    """
    if (query_weight is None) != (key_weight is None):
        raise ValueError("queries and keys have a norm each, or neither has")
    mixed, cos, sin = mixed.contiguous(), cos.contiguous(), sin.contiguous()
    if query_weight is not None:
        query_weight, key_weight = query_weight.contiguous(), key_weight.contiguous()
    heads = Heads(num_query_groups, queries_per_group, head_dim)
    learned = (mixed, query_weight, key_weight)
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in learned):
        return _launch_forward(mixed, query_weight, key_weight, cos, sin, eps, heads, copy_value=False)
    return _NormRotarySplit.apply(mixed, query_weight, key_weight, cos, sin, eps, heads)


def _launch_forward(
    mixed: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    heads: Heads, *, copy_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`norm_rotary_split`; the value is contiguous if ``copy_value``, else a view of ``mixed``."""
    count, (groups, queries, width) = mixed.shape[0], heads
    query, key = mixed.new_empty(count, groups * queries, width), mixed.new_empty(count, groups, width)
    value = torch.empty_like(key) if copy_value else mixed.view(count, groups, queries + 2, width)[:, :, -1]
    if query.numel() == 0:
        return query, key, value
    constants = _constants(heads, mixed.dtype, FORWARD_UNROLL, norm=query_weight is not None)
    with on_device_of(mixed):
        _forward_kernel[(triton.cdiv(count, constants["TOKENS"]),)](
            mixed, query_weight, key_weight, cos, sin, query, key, value if copy_value else None, count, eps,
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip
    return query, key, value


def _launch_backward(
    grads: tuple[Tensor | None, ...], saved: tuple[Tensor | None, ...], eps: float, heads: Heads,
    dtype: torch.dtype, *, for_mixed: bool, for_weights: bool,
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | tuple[None, None]]:  # fmt: skip
    """The gradient of ``mixed``, and in fp32 those of the weights of queries and of keys, as far as needed.

    Args:
        grads: of query, key and value, each [T, heads, D] or None.
        saved: mixed, query_weight, key_weight, all of which are None without norms; cos and sin.
        eps: added to the mean square.
        heads: layout of ``mixed``.
        dtype: type of ``mixed``.
        for_mixed: whether its gradient is needed.
        for_weights: whether those of the weights are.
    """
    mixed, query_weight, key_weight, cos, sin = saved
    grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
    count, (groups, queries, width) = cos.shape[0], heads
    norm = mixed is not None
    constants = _constants(heads, dtype, NORM_BACKWARD_UNROLL if norm else BACKWARD_UNROLL, norm=norm)
    programs = triton.cdiv(count, constants["TOKENS"])
    grad_mixed = partial_sums = None
    if for_mixed:
        grad_mixed = cos.new_empty(count, groups * (queries + 2) * width, dtype=dtype)
    if for_weights:
        partial_sums = cos.new_empty(programs, 2, width, dtype=torch.float32)
    if programs > 0:
        with on_device_of(cos):
            _backward_kernel[(programs,)](
                *grads, mixed, query_weight, key_weight, cos, sin, grad_mixed, partial_sums, count, eps,
                **constants, num_warps=NUM_WARPS,
            )  # fmt: skip
    return grad_mixed, (None, None) if partial_sums is None else partial_sums.sum(dim=0).unbind()


def _divisor(number: int, limit: int) -> int:
    """The greatest divisor of ``number`` up to ``limit``."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _constants(heads: Heads, dtype: torch.dtype, unroll: int, *, norm: bool) -> dict[str, int]:
    """The constants of a kernel, from the width of the vectors that half a head's columns allow."""
    half = heads.width // 2
    block = triton.next_power_of_2(half)
    vector = min(VECTOR_BYTES // dtype.itemsize, half & -half)
    chunk = heads.groups if norm else _divisor(heads.groups, unroll)
    return {
        "GROUPS": heads.groups, "QUERIES": heads.queries, "WIDTH": heads.width,
        "TOKENS": max(NUM_WARPS * 32 * vector // block, 1), "BLOCK": block,
        "CHUNK": chunk, "QUERY_UNROLL": _divisor(chunk * heads.queries, unroll), "KEY_UNROLL": _divisor(chunk, unroll),
    }  # fmt: skip
