"""Weight gradients of grouped matrix products, added to fp32 sums by the product itself.

``torch.nn.functional.grouped_mm`` returns them in bf16, and adding them to the sum over the micro-batches then takes
longer than the product: of 128 experts' weights, 10 bytes a value where 8 are enough, or 4 for the first micro-batch.

Legend: N tokens sorted by expert, E experts, A and B the two widths of a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

# small tiles, of which three run on a multiprocessor at a time: while one adds its result, the others compute
BLOCK_A, BLOCK_B, BLOCK_K = 128, 128, 32
NUM_WARPS, NUM_STAGES = 4, 4
GROUP = 8  # rows of tiles that run side by side, so that what they read stays in the cache


@triton.jit
def _load(at: tl.tensor, mask: tl.tensor | None) -> tl.tensor:
    if mask is None:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=mask, other=0.0)
    return values


@triton.jit
def _product_of_rows(
    left: tl.tensor, right: tl.tensor, row: tl.tensor, column_a: tl.tensor, column_b: tl.tensor,
    mask_a: tl.tensor | None, mask_b: tl.tensor | None, total: tl.tensor, A: tl.constexpr, B: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``total + left[row]^T @ right[row]`` for the given columns."""
    first = _load(left + (row[:, None] * A + column_a[None, :]), mask_a)
    second = _load(right + (row[:, None] * B + column_b[None, :]), mask_b)
    return tl.dot(tl.trans(first), second, total)


@triton.jit
def _weight_gradient_kernel(
    left: tl.tensor, right: tl.tensor, ends: tl.tensor, result: tl.tensor,
    A: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one expert's gradient; the tiles of an expert follow each other."""
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    tiles_a: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    tiles_b: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    width: tl.constexpr = GROUP * tiles_b
    program = tl.program_id(0)
    first_a = program // width * GROUP
    group = tl.minimum(tiles_a - first_a, GROUP)
    column_a = (first_a + program % width % group) * BLOCK_A + tl.arange(0, BLOCK_A)
    column_b = program % width // group * BLOCK_B + tl.arange(0, BLOCK_B)
    in_a, in_b = column_a < A, column_b < B
    at = result + expert.to(tl.int64) * (A * B) + (column_a[:, None] * B + column_b[None, :])
    inside = None if A % BLOCK_A == 0 and B % BLOCK_B == 0 else in_a[:, None] & in_b[None, :]
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    mask_a = None if A % BLOCK_A == 0 else in_a[None, :]
    mask_b = None if B % BLOCK_B == 0 else in_b[None, :]
    # offsets from the expert's first row fit 32 bits, those from the first row of all may not
    left += start.to(tl.int64) * A
    right += start.to(tl.int64) * B
    count = end - start
    rows = tl.arange(0, BLOCK_K)
    whole = count // BLOCK_K * BLOCK_K
    for row in range(0, whole, BLOCK_K):
        total = _product_of_rows(left, right, row + rows, column_a, column_b, mask_a, mask_b, total, A, B)
    if whole < count:
        rest = (whole + rows)[:, None] < count
        total = _product_of_rows(left, right, whole + rows, column_a, column_b, rest & in_a[None, :],
                                 rest & in_b[None, :], total, A, B)
    if ADD:
        # Left to the memory, which takes less time than to read, add and write. Nothing else adds to these
        # elements in this launch, so no order is random.
        tl.atomic_add(at, total, mask=inside, sem="relaxed")
    else:
        tl.store(at, total, mask=inside, eviction_policy="evict_first")


def add_weight_gradient(left: Tensor, right: Tensor, ends: Tensor, result: Tensor, *, add: bool) -> None:
    """``result[e] = left[rows of e]^T @ right[rows of e]``, added to what ``result`` holds if ``add``.

    Args:
        left: [N, A] in bf16 or fp16.
        right: [N, B] in the same type.
        ends: int32 [E], where each expert's rows end.
        result: fp32 [E, A, B], contiguous.
        add: whether to add; else ``result`` is overwritten.
    """
    assert result.is_contiguous() and result.dtype == torch.float32
    left, right = left.contiguous(), right.contiguous()
    experts, a, b = result.shape
    block_a, block_b = (min(block, max(16, triton.next_power_of_2(width)))
                        for block, width in ((BLOCK_A, a), (BLOCK_B, b)))
    with on_device_of(result):
        _weight_gradient_kernel[(triton.cdiv(a, block_a) * triton.cdiv(b, block_b), experts)](
            left, right, ends, result, A=a, B=b, ADD=add, BLOCK_A=block_a, BLOCK_B=block_b,
            BLOCK_K=BLOCK_K, GROUP=GROUP, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
