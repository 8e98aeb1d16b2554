"""Expert products for a CPU in bf16, one expert after another, in a few sizes only.

There a product is prepared anew for every number of rows, which takes longer than the product itself, in torch's
``grouped_mm`` as in a plain loop. So the rows of an expert are counted up to a bucket: its span begins earlier, among
the rows of the experts before it.

Legend: N rows sorted by expert, E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.elementwise import EAGER_SWIGLU, SwigluKernel

Span = tuple[int, int, int]
"""First row computed, first row of the expert's own, end."""


def bucket(count: int) -> int:
    """``count`` rounded up: to a multiple of 16 below 512, above to one of 16 sizes between powers of 2."""
    step = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _spans(counts: Sequence[int]) -> list[Span]:
    spans, end = [], 0
    for count in counts:
        start, end = end, end + count
        begin = end - bucket(count)
        spans.append((begin if begin >= 0 else start, start, end))  # the first rows of all have none before them
    return spans


def _multiply(rows: Tensor, matrices: Tensor, spans: Sequence[Span]) -> Tensor:
    """rows [N, A], matrices [E, A, B] -> [N, B], each row by its expert's matrix."""
    output = rows.new_empty(rows.shape[0], matrices.shape[2])
    # from the last to the first, so that what a span writes into earlier rows is overwritten by theirs
    for (begin, start, end), matrix in zip(reversed(spans), reversed(matrices.unbind(0)), strict=True):
        if end > start:
            torch.mm(rows[begin:end], matrix, out=output[begin:end])
    return output


def _outer(left: Tensor, right: Tensor, spans: Sequence[Span], *, clear: Tensor) -> Tensor:
    """left [N, A], right [N, B] -> [E, A, B], ``left^T right`` over each expert's rows.

    ``clear`` is one of the two, and loses its values: a span's earlier rows are set to zero, since those have served.
    """
    output = left.new_empty(len(spans), left.shape[1], right.shape[1])
    for (begin, start, end), matrix in zip(spans, output.unbind(0), strict=True):
        if end > start:
            clear[begin:start].zero_()
            torch.mm(left[begin:end].t(), right[begin:end], out=matrix)
        else:
            matrix.zero_()
    return output


class _PaddedBucketExperts(torch.autograd.Function):
    """Keeps what the grouped kernel keeps: the rows and what the first product makes of them [N, 2I]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, swiglu: SwigluKernel
    ) -> Tensor:
        ctx.swiglu = swiglu
        ctx.spans = _spans(rows_per_expert.tolist())
        hidden = _multiply(rows, gate_up, ctx.spans)
        ctx.save_for_backward(rows, gate_up, down, hidden)
        return _multiply(swiglu.forward(hidden), down, ctx.spans)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        spans, grad = ctx.spans, grad.contiguous()
        inner, grad_hidden = ctx.swiglu.again(hidden, _multiply(grad, down.transpose(1, 2), spans))
        grad_rows = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = _outer(inner, grad, spans, clear=inner)
        if ctx.needs_input_grad[0]:
            grad_rows = _multiply(grad_hidden, gate_up.transpose(1, 2), spans)
        if ctx.needs_input_grad[1]:
            grad_gate_up = _outer(rows, grad_hidden, spans, clear=grad_hidden)
        return grad_rows, grad_gate_up, grad_down, None, None


def padded_bucket_experts(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, *, swiglu: SwigluKernel = EAGER_SWIGLU
) -> Tensor:
    """An :class:`~mindspeed_mm.backend.kernels.experts.ExpertKernel`; reads the row counts, which a CPU has at hand."""
    return _PaddedBucketExperts.apply(rows, gate_up, down, rows_per_expert, swiglu)
