"""Triton kernels of RMSNorm, with autograd.

They are bound by memory: each input is read once and each output written once. The arithmetic is fp32, and results are
rounded once. Backward computes the statistics of a row again, since it has to read the row anyway. The gradient of the
weight is summed without atomic additions, so that the order never changes on one kind of device.

Legend: N rows, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

# Forward: a program has one row, or as many as FORWARD_TILE values hold; wider rows have more warps.
FORWARD_TILE = 2048
FORWARD_WARPS = 4
# Backward: PROGRAMS_PER_MULTIPROCESSOR programs, all resident at once, go through all rows, each with sums of its own
# for the gradient of the weight. A program has BACKWARD_TILE_BYTES of each input at a time, while the next ones are on
# their way to shared memory (BACKWARD_STAGES - 1 tiles of each); it has one tile at a time where rows are so wide that
# a tile has more than MAX_STAGED_BYTES.
BACKWARD_TILE_BYTES = 8192
BACKWARD_WARPS = 8
BACKWARD_STAGES = 3
MAX_STAGED_BYTES = 16384
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_WARPS = 32


@triton.jit
def _rows(
    block: tl.tensor, num_rows: int, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Offsets [ROWS, BLOCK] of a block of rows, and the mask of what exists."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = row < num_rows
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)
    return row.to(tl.int64) * WIDTH + column, mask


@triton.jit
def _load_weight(weight: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """[1, BLOCK] in fp32."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _inverse_rms(hidden: tl.tensor, eps: float, WIDTH: tl.constexpr) -> tl.tensor:
    """[ROWS, 1] of rows [ROWS, BLOCK], which are 0 where masked."""
    return tl.rsqrt(tl.sum(hidden * hidden, axis=1, keep_dims=True) / WIDTH + eps)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    hidden: tl.tensor, weight: tl.tensor, normed: tl.tensor, num_rows: int, eps: float,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows per program; WIDTH is H."""
    offset, mask = _rows(tl.program_id(0), num_rows, WIDTH, ROWS, BLOCK)
    scale = _load_weight(weight, WIDTH, BLOCK)
    values = tl.load(hidden + offset, mask=mask, other=0.0).to(tl.float32)
    values = values * _inverse_rms(values, eps, WIDTH) * scale
    tl.store(normed + offset, values.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad: tl.tensor, hidden: tl.tensor, weight: tl.tensor,
    grad_hidden: tl.tensor | None, partial_sums: tl.tensor | None, num_rows: int, eps: float,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows at a time per program; WIDTH is H.

    Where a gradient to be computed is None it is left out. ``partial_sums`` is fp32 [programs, H].
    """
    program = tl.program_id(0)
    scale = _load_weight(weight, WIDTH, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    # The stages are explicit because the compiler moves plain loads to their use, and then waits for each.
    for block in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        offset, mask = _rows(block, num_rows, WIDTH, ROWS, BLOCK)
        rows = tl.load(hidden + offset, mask=mask, other=0.0)
        incoming = tl.load(grad + offset, mask=mask, other=0.0)
        rows, incoming = rows.to(tl.float32), incoming.to(tl.float32)
        inverse_rms = _inverse_rms(rows, eps, WIDTH)
        if partial_sums is not None:
            sums += tl.sum(incoming * (rows * inverse_rms), axis=0)
        if grad_hidden is not None:
            incoming *= scale
            # of the unscaled rows, so that it needs not wait for the other sum over the row
            along = tl.sum(incoming * rows, axis=1, keep_dims=True) / WIDTH * inverse_rms * inverse_rms
            result = (incoming - rows * along) * inverse_rms
            tl.store(grad_hidden + offset, result.to(grad_hidden.dtype.element_ty), mask=mask)
    if partial_sums is not None:
        column = tl.arange(0, BLOCK)
        tl.store(partial_sums + program * WIDTH + column, sums, mask=column < WIDTH)


def _constants(width: int, tile: int, warps: int) -> dict[str, int]:
    """The constants of a kernel whose programs have ``tile`` values at a time, in rows of ``width`` columns."""
    block = triton.next_power_of_2(width)
    warps = min(max(warps, warps * block // tile), MAX_WARPS)
    return {"WIDTH": width, "ROWS": max(tile // block, 1), "BLOCK": block, "num_warps": warps}


def _forward(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`rms_norm`; inputs are contiguous."""
    normed = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return normed
    count, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    constants = _constants(width, FORWARD_TILE, FORWARD_WARPS)
    with on_device_of(hidden):
        _forward_kernel[(triton.cdiv(count, constants["ROWS"]),)](
            hidden, weight, normed, count, eps, **constants
        )
    return normed


def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, eps: float, *, need_hidden: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``hidden``, which is normed, and of ``weight``.

    With g the gradient of the result, w the weight, x a row and r = 1 / sqrt(mean(x^2) + eps), the gradient of x is
    ``r * (g * w - x * r^2 * mean(g * w * x))``, and that of w the sum over the rows of ``g * x * r``.
    """
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    if hidden.numel() == 0:
        return grad_hidden, torch.zeros_like(weight) if need_weight else None
    count, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    itemsize = hidden.dtype.itemsize
    constants = _constants(width, BACKWARD_TILE_BYTES // itemsize, BACKWARD_WARPS)
    staged = constants["ROWS"] * constants["BLOCK"] * itemsize <= MAX_STAGED_BYTES
    programs = min(triton.cdiv(count, constants["ROWS"]), PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(hidden))
    partial_sums = hidden.new_empty(programs, width, dtype=torch.float32) if need_weight else None
    with on_device_of(hidden):
        _backward_kernel[(programs,)](
            grad.contiguous(), hidden, weight, grad_hidden, partial_sums, count, eps, **constants,
            STAGES=BACKWARD_STAGES if staged else 1,
        )
    return grad_hidden, None if partial_sums is None else partial_sums.sum(dim=0).to(weight.dtype)


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        ctx.save_for_backward(hidden, weight)
        ctx.eps = eps
        return _forward(hidden, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_hidden, need_weight, _ = ctx.needs_input_grad
        grads = _backward(grad, *ctx.saved_tensors, ctx.eps, need_hidden=need_hidden, need_weight=need_weight)
        return (*grads, None)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``hidden / sqrt(mean(hidden^2) + eps) * weight`` over the last axis, with autograd.

    Args:
        hidden: [..., H] in fp32, bf16 or fp16.
        weight: [H] in any of these types.
        eps: added to the mean square.

    Returns:
        [..., H] in the type of ``hidden``.
    """
    return _RMSNorm.apply(hidden, weight, eps)
