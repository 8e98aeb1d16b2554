"""Triton kernel of the cross-entropy and its gradient, which replaces the logits.

It is bound by memory: a row of a real vocabulary is larger than the registers and the shared memory of a
multiprocessor, so it is read twice and written once. The arithmetic is fp32, and results are rounded once. It is for a
function with a hand-written backward pass and has no autograd of its own.

Legend: S target positions, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

# A program has one row. These numbers leave 32 registers to a thread, with which a multiprocessor of 64k registers is
# full of threads.
NUM_WARPS = 16
# A thread has VECTOR_BYTES of consecutive columns at a time, as far as the alignment of the rows allows, and loads
# UNROLL such vectors before it uses any: bytes in flight against registers.
VECTOR_BYTES = 16
UNROLL = 2


@triton.jit
def _exp(value: tl.tensor) -> tl.tensor:
    """exp; unlike ``tl.exp`` it spends no instructions on subnormal results, which become 0."""
    return tl.exp2(value * 1.4426950408889634)


@triton.jit
def _load_vectors(
    row: tl.tensor, first: tl.tensor, offset: tl.tensor,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr, EVICTION: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """UNROLL blocks of the shape of ``offset``, from column ``first`` on; -inf where there is none."""
    BLOCK: tl.constexpr = offset.shape[0] * offset.shape[1]
    vectors = ()
    for step in tl.static_range(UNROLL):
        column = first + step * BLOCK + offset
        vector = tl.load(row + column, mask=column < WIDTH, other=-float("inf"), eviction_policy=EVICTION)
        vectors = vectors + (vector,)
    return vectors


@triton.jit
def _cross_entropy_kernel(
    logits: tl.tensor, labels: tl.tensor, loss_weight: tl.tensor, losses: tl.tensor,
    WIDTH: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
) -> None:  # fmt: skip
    """One row of :func:`cross_entropy_in_place` per program; WIDTH is V."""
    STRIDE: tl.constexpr = THREADS * VECTOR * UNROLL
    LAST: tl.constexpr = (WIDTH - 1) // STRIDE * STRIDE
    LOWEST: tl.constexpr = -3.4028234663852886e38
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * WIDTH
    label = tl.load(labels + index)
    target = tl.load(row + label).to(tl.float32)  # every thread has it before the barriers that precede stores
    if WITH_GRADIENT:
        weight = tl.load(loss_weight + index)
    offset = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    # Each thread has a maximum and a sum of its own, so that no turn waits for other threads. The maximum starts at
    # the lowest finite number, not at -inf, with which -inf logits would make a NaN.
    maximum = tl.full([THREADS], LOWEST, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    for first in range(0, WIDTH, STRIDE):
        vectors = _load_vectors(row, first, offset, WIDTH, UNROLL, "")
        highest = vectors[0].to(tl.float32)
        for step in tl.static_range(1, UNROLL):
            highest = tl.maximum(highest, vectors[step].to(tl.float32))
        updated = tl.maximum(maximum, tl.max(highest, axis=1))
        sums = tl.zeros([THREADS, VECTOR], tl.float32)
        for step in tl.static_range(UNROLL):
            sums += _exp(vectors[step].to(tl.float32) - updated[:, None])
        total = total * _exp(maximum - updated) + tl.sum(sums, axis=1)
        maximum = updated
    row_maximum = tl.max(maximum, axis=0)
    row_total = tl.sum(total * _exp(maximum - row_maximum), axis=0)
    tl.store(losses + index, row_maximum - target + tl.log(row_total))

    if WITH_GRADIENT:
        scale = weight / row_total
        # the label's column, from the first one of the thread's vector on
        label_column = label.to(tl.int32) - tl.arange(0, THREADS)[:, None] * VECTOR
        # backwards, because what the first pass read last is the likeliest to be in the cache still
        for back in range(0, WIDTH, STRIDE):
            first = LAST - back
            vectors = _load_vectors(row, first, offset, WIDTH, UNROLL, "evict_first")
            for step in tl.static_range(UNROLL):
                start = first + step * THREADS * VECTOR
                grad = _exp(vectors[step].to(tl.float32) - row_maximum) * scale
                grad = tl.where(tl.arange(0, VECTOR)[None, :] == label_column - start, grad - weight, grad)
                at = start + offset
                tl.store(row + at, grad.to(logits.dtype.element_ty), mask=at < WIDTH)


def cross_entropy_in_place(logits: Tensor, labels: Tensor, loss_weight: Tensor, *, with_gradient: bool) -> Tensor:
    """``logsumexp(logits) - logits[label]`` of each row, and the gradient in place of the logits.

    The gradient is that of ``sum(loss_weight * losses)``: ``loss_weight * (softmax(logits) - one_hot(label))``.

    Args:
        logits: [S, V] in fp32, bf16 or fp16, contiguous.
        labels: int64 [S], each in [0, V), which is not checked.
        loss_weight: fp32 [S], used for the gradient only.
        with_gradient: whether to overwrite ``logits`` with their gradient; otherwise they are left alone.

    Returns:
        fp32 [S], the losses without their weights.

    Raises:
        ValueError: ``logits`` are not contiguous, so that they cannot be overwritten row by row.
    """
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous; their strides are {logits.stride()}")
    labels, loss_weight = labels.contiguous(), loss_weight.contiguous()
    count, width = logits.shape
    losses = loss_weight.new_empty(count)
    if count == 0:
        return losses
    with on_device_of(logits):
        _cross_entropy_kernel[(count,)](
            logits, labels, loss_weight, losses,
            WIDTH=width, THREADS=NUM_WARPS * 32, VECTOR=VECTOR_BYTES // logits.dtype.itemsize, UNROLL=UNROLL,
            WITH_GRADIENT=with_gradient, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, loss_weight: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """A :class:`~mindspeed_mm.backend.kernels.cross_entropy.CrossEntropyKernel` that overwrites the logits."""
    losses = cross_entropy_in_place(logits, labels, loss_weight, with_gradient=with_gradient)
    return losses, logits if with_gradient else None
