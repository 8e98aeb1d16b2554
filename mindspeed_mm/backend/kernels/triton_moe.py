"""Triton kernels around the experts: SwiGLU with a weight per row, and weighted sums of gathered rows.

They are bound by memory: each input is read once and each output written once, the arithmetic is fp32, and results are
rounded once. They are for functions with a hand-written backward pass and have no autograd of their own. Sums use no
atomic additions, so that their order never changes.

Legend: T tokens, k experts per token, H hidden width, I intermediate width, N = T * k permuted tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

NUM_WARPS = 4
# Kernels over rows: each warp has rows of its own, so that sums over a row need no exchange between warps. It reads
# ROW_BLOCK columns at a time, in bf16 16 bytes per thread; the blocks of a program have TILE values.
ROW_BLOCK = 256
TILE = 1024
# How many blocks of each input a thread may load before it stores anything: bytes in flight against registers.
SWIGLU_UNROLL = 3
GATHER_UNROLL = 4
# sum_rows: the columns of one program, which loads those of k rows without waiting for one another.
SUM_BLOCK = 1024


@triton.jit
def _block(
    first: tl.tensor, in_rows: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Column indices [1, BLOCK] from ``first`` on, and the mask [ROWS, 1 or BLOCK] of what exists."""
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = in_rows[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (column < WIDTH)
    return column, mask


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_kernel(
    gate_up: tl.tensor, weights: tl.tensor | None, result: tl.tensor, num_rows: int,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows of :func:`weighted_swiglu` per program; WIDTH is I."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    scale = tl.full([ROWS], 1.0, tl.float32)
    if weights is not None:
        scale = tl.load(weights + row, mask=in_rows, other=0.0).to(tl.float32)
    scale = scale[:, None]
    row = row.to(tl.int64)[:, None]
    gate_at = gate_up + row * (2 * WIDTH)
    result_at = result + row * WIDTH
    for first in range(0, WIDTH, UNROLL * BLOCK):
        # all loads come before the first store: the compiler may not move a load ahead of a store
        gates, ups = (), ()
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            gates = gates + (tl.load(gate_at + column, mask=mask, other=0.0),)
            ups = ups + (tl.load(gate_at + WIDTH + column, mask=mask, other=0.0),)
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            gate = gates[step].to(tl.float32)
            value = gate * tl.sigmoid(gate) * ups[step].to(tl.float32) * scale
            tl.store(result_at + column, value.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_backward_kernel(
    gate_up: tl.tensor, weights: tl.tensor | None, grad: tl.tensor, result: tl.tensor, grad_gate_up: tl.tensor,
    grad_weights: tl.tensor | None, num_rows: int,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows of :func:`weighted_swiglu_backward` per program; WIDTH is I."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = index < num_rows
    scale = tl.full([ROWS], 1.0, tl.float32)
    if weights is not None:
        scale = tl.load(weights + index, mask=in_rows, other=0.0).to(tl.float32)
    scale = scale[:, None]
    row = index.to(tl.int64)[:, None]
    narrow, wide = row * WIDTH, row * (2 * WIDTH)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, WIDTH, UNROLL * BLOCK):
        # all loads come before the first store: the compiler may not move a load ahead of a store
        gates, ups, grads = (), (), ()
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            gates = gates + (tl.load(gate_up + wide + column, mask=mask, other=0.0),)
            ups = ups + (tl.load(gate_up + wide + WIDTH + column, mask=mask, other=0.0),)
            grads = grads + (tl.load(grad + narrow + column, mask=mask, other=0.0),)
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            gate, up = gates[step].to(tl.float32), ups[step].to(tl.float32)
            incoming = grads[step].to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            active = gate * sigmoid
            inner = active * up
            if weights is not None:
                products += incoming * inner
            incoming *= scale
            grad_gate = incoming * up * (sigmoid + active * (1.0 - sigmoid))
            tl.store(result + narrow + column, (inner * scale).to(result.dtype.element_ty), mask=mask)
            to = grad_gate_up + wide + column
            tl.store(to, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
            tl.store(to + WIDTH, (incoming * active).to(grad_gate_up.dtype.element_ty), mask=mask)
    if weights is not None:
        tl.store(grad_weights + index, tl.sum(products, axis=1), mask=in_rows)


@triton.jit
def _sum_rows_kernel(
    rows: tl.tensor, indices: tl.tensor, weights: tl.tensor | None, result: tl.tensor,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK columns of one token of :func:`sum_rows` per program; WIDTH is H."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = None if WIDTH % BLOCK == 0 else column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(indices + token * TOP_K + choice).to(tl.int64)
        values = tl.load(rows + row * WIDTH + column, mask=mask).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += values
    tl.store(result + token * WIDTH + column, total.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_rows_backward_kernel(
    grad: tl.tensor, rows: tl.tensor, indices: tl.tensor, weights: tl.tensor, grad_rows: tl.tensor,
    grad_weights: tl.tensor, num_rows: int,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS weights and their rows per program; WIDTH is H."""
    weight = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = weight < num_rows
    scale = tl.load(weights + weight, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    row = tl.load(indices + weight, mask=in_rows, other=0)
    grad_at = grad + (weight // TOP_K).to(tl.int64)[:, None] * WIDTH
    at = row.to(tl.int64)[:, None] * WIDTH
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, WIDTH, UNROLL * BLOCK):
        # all loads come before the first store: the compiler may not move a load ahead of a store
        grads, values = (), ()
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            grads = grads + (tl.load(grad_at + column, mask=mask, other=0.0),)
            values = values + (tl.load(rows + at + column, mask=mask, other=0.0),)
        for step in tl.static_range(UNROLL):
            column, mask = _block(first + step * BLOCK, in_rows, WIDTH, BLOCK)
            incoming = grads[step].to(tl.float32)
            products += incoming * values[step].to(tl.float32)
            tl.store(grad_rows + at + column, (incoming * scale).to(grad_rows.dtype.element_ty), mask=mask)
    tl.store(grad_weights + weight, tl.sum(products, axis=1), mask=in_rows)


def _row_blocks(width: int, max_unroll: int) -> dict[str, int]:
    """ROWS, BLOCK and UNROLL for rows of ``width`` columns; UNROLL divides the number of blocks."""
    block = min(triton.next_power_of_2(width), ROW_BLOCK)
    blocks = triton.cdiv(width, block)
    unroll = max(count for count in range(1, max_unroll + 1) if blocks % count == 0)
    return {"WIDTH": width, "ROWS": TILE // block, "BLOCK": block, "UNROLL": unroll}


def weighted_swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """``silu(gate) * up * weight``.

    Args:
        gate_up: [N, 2I], gate columns, then up columns; fp32, bf16 or fp16.
        weights: [N] of any of these types; None for ones.

    Returns:
        [N, I] in the type of ``gate_up``.
    """
    gate_up = gate_up.contiguous()
    weights = None if weights is None else weights.contiguous()
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(count, width)
    if result.numel() == 0:
        return result
    blocks = _row_blocks(width, SWIGLU_UNROLL)
    with on_device_of(gate_up):
        _swiglu_kernel[(triton.cdiv(count, blocks["ROWS"]),)](
            gate_up, weights, result, count, **blocks, num_warps=NUM_WARPS
        )
    return result


def weighted_swiglu_backward(
    gate_up: Tensor, weights: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result of :func:`weighted_swiglu` once more, and its gradients.

    With g the gradient of the result, s = sigmoid(gate) and w the row's weight, the gradient of gate is
    ``w * g * up * (s + gate * s * (1 - s))``, that of up ``w * g * silu(gate)``, and that of w the sum over the row of
    ``g * silu(gate) * up``.

    Args:
        gate_up: [N, 2I], as in :func:`weighted_swiglu`.
        weights: [N] or None, as there.
        grad: [N, I], the gradient of the weighted result.

    Returns:
        The weighted result [N, I] and the gradient of ``gate_up`` [N, 2I], in the type of ``gate_up``; and the gradient
        of ``weights``, fp32 [N], or None without weights.
    """
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    weights = None if weights is None else weights.contiguous()
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    result, grad_gate_up = gate_up.new_empty(count, width), torch.empty_like(gate_up)
    grad_weights = None if weights is None else gate_up.new_empty(count, dtype=torch.float32)
    if result.numel() == 0:
        return result, grad_gate_up, None if grad_weights is None else grad_weights.zero_()
    blocks = _row_blocks(width, SWIGLU_UNROLL)
    with on_device_of(gate_up):
        _swiglu_backward_kernel[(triton.cdiv(count, blocks["ROWS"]),)](
            gate_up, weights, grad, result, grad_gate_up, grad_weights, count, **blocks, num_warps=NUM_WARPS
        )
    return result, grad_gate_up, grad_weights


def sum_rows(rows: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """``result[t] = sum over k of weights[t, k] * rows[indices[t, k]]``, accumulated in fp32 in the order of k.

    Args:
        rows: [N, H] in fp32, bf16 or fp16.
        indices: int64 [T, k] into the rows.
        weights: [T, k] in any of these types; None for ones.

    Returns:
        [T, H] in the type of ``rows``.
    """
    rows, indices = rows.contiguous(), indices.contiguous()
    weights = None if weights is None else weights.contiguous()
    (count, top_k), width = indices.shape, rows.shape[1]
    result = rows.new_empty(count, width)
    if result.numel() == 0:
        return result
    block = min(triton.next_power_of_2(width), SUM_BLOCK)
    with on_device_of(rows):
        _sum_rows_kernel[(count * triton.cdiv(width, block),)](
            rows, indices, weights, result, TOP_K=top_k, WIDTH=width, BLOCK=block, num_warps=NUM_WARPS
        )
    return result


def sum_rows_backward(grad: Tensor, rows: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`sum_rows` where ``indices`` has each row exactly once, as a permutation.

    ``grad_rows[indices[t, k]] = weights[t, k] * grad[t]`` and
    ``grad_weights[t, k] = dot(grad[t], rows[indices[t, k]])``. It goes through the tokens and not through the rows, so
    that ``grad`` comes from memory once and not k times.

    Args:
        grad: [T, H].
        rows: [N, H].
        indices: int64 [T, k] into the rows.
        weights: [T, k].

    Returns:
        The gradient of ``rows`` [N, H] in their type, and that of ``weights`` [T, k] in fp32.
    """
    grad, rows, indices, weights = grad.contiguous(), rows.contiguous(), indices.contiguous(), weights.contiguous()
    count, width = rows.shape
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights, dtype=torch.float32)
    if grad_rows.numel() == 0:
        return grad_rows, grad_weights.zero_()
    blocks = _row_blocks(width, GATHER_UNROLL)
    with on_device_of(rows):
        _sum_rows_backward_kernel[(triton.cdiv(count, blocks["ROWS"]),)](
            grad, rows, indices, weights, grad_rows, grad_weights, count, TOP_K=indices.shape[1], **blocks,
            num_warps=NUM_WARPS,
        )
    return grad_rows, grad_weights
