"""Expert feed-forward networks (SwiGLU) over tokens sorted by expert: reference loop, grouped, padded buckets.

Legend: N permuted tokens (sorted by expert), E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels.elementwise import EAGER_SWIGLU, SwigluKernel, torch_swiglu


class ExpertKernel(Protocol):
    """permuted [N, H], gate_up [E, H, 2I], down [E, I, H], tokens_per_expert int [E] on the device -> [N, H].

    A kernel that weighs rows takes ``weights`` [N] too, and returns each row times its weight.
    """

    def __call__(self, permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """``(silu(x @ gate) * (x @ up)) @ down`` with each token's own expert."""


def reference_experts(permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The reference: a loop over the experts that have tokens. Synchronises with the device to read the counts."""
    # unbind, since indexing would make backward fill a zero tensor of all experts for each of them
    parts = zip(permuted.split(tokens_per_expert.tolist()), gate_up.unbind(0), down.unbind(0), strict=True)
    outputs = [torch_swiglu(part @ first) @ second for part, first, second in parts if part.shape[0] > 0]
    if outputs:
        return torch.cat(outputs)
    # A rank may get no token at all; its experts still take part in backward, with zero gradients.
    return permuted + (gate_up.sum() + down.sum()) * 0


class _GroupedExperts(torch.autograd.Function):
    """One grouped matrix product for each of the two projections and for each of their gradients.

    Keeps its input and the first projection's output [N, 2I]; SwiGLU is recomputed in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, permuted: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor, swiglu: SwigluKernel
    ) -> Tensor:
        hidden = F.grouped_mm(permuted, gate_up, offs=ends)
        ctx.save_for_backward(permuted, gate_up, down, ends, hidden)
        ctx.swiglu = swiglu
        return F.grouped_mm(swiglu.forward(hidden), down, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permuted, gate_up, down, ends, hidden = ctx.saved_tensors
        # grouped_mm refuses strides of zero, which an expanded gradient such as sum()'s has
        grad = grad.contiguous()
        grad_inner = F.grouped_mm(grad, down.transpose(1, 2), offs=ends)
        inner, grad_hidden = ctx.swiglu.backward(hidden, grad_inner)
        grad_permuted = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = F.grouped_mm(inner.t(), grad, offs=ends)
        if ctx.needs_input_grad[0]:
            grad_permuted = F.grouped_mm(grad_hidden, gate_up.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            grad_gate_up = F.grouped_mm(permuted.t(), grad_hidden, offs=ends)
        return grad_permuted, grad_gate_up, grad_down, None, None


def grouped_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *, swiglu: SwigluKernel = EAGER_SWIGLU
) -> Tensor:
    """``torch.nn.functional.grouped_mm``: the token counts stay on the device."""
    return _GroupedExperts.apply(permuted, gate_up, down, tokens_per_expert.cumsum(0).to(torch.int32), swiglu)


_Span = tuple[int, int, int]
"""Of one expert among the permuted tokens: first token computed, first token of its own, end."""


def _bucket_size(count: int) -> int:
    """``count`` rounded up: to a multiple of 16 below 512, above to one of 16 sizes between powers of 2."""
    step = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _spans(counts: Sequence[int]) -> list[_Span]:
    spans, end = [], 0
    for count in counts:
        start, end = end, end + count
        begin = end - _bucket_size(count)
        spans.append((begin if begin >= 0 else start, start, end))  # the first tokens have none before them
    return spans


def _multiply(permuted: Tensor, matrices: Tensor, spans: Sequence[_Span]) -> Tensor:
    """tokens [N, A], matrices [E, A, B] -> [N, B], each token by its expert's matrix."""
    output = permuted.new_empty(permuted.shape[0], matrices.shape[2])
    # last to first: what a span writes into the tokens before its own is overwritten by their expert's product
    for (begin, start, end), matrix in zip(reversed(spans), reversed(matrices.unbind(0)), strict=True):
        if end > start:
            torch.mm(permuted[begin:end], matrix, out=output[begin:end])
    return output


def _outer(left: Tensor, right: Tensor, spans: Sequence[_Span], *, clear: Tensor) -> Tensor:
    """left [N, A], right [N, B] -> [E, A, B], ``left^T right`` over each expert's tokens.

    ``clear`` is one of the two and is overwritten: the tokens before an expert's own are set to zero.
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
    """One expert after another, in few product sizes; keeps the same tensors as :class:`_GroupedExperts`.

    On a CPU in bf16, oneDNN prepares a product anew for every number of tokens, which takes longer than the product
    itself, in ``grouped_mm`` as in a plain loop. So an expert's token count is rounded up to a bucket size: its span
    begins among the tokens of the experts before it.
    """

    @staticmethod
    def forward(
        ctx: Any, permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, swiglu: SwigluKernel
    ) -> Tensor:
        ctx.swiglu = swiglu
        ctx.spans = _spans(tokens_per_expert.tolist())
        hidden = _multiply(permuted, gate_up, ctx.spans)
        ctx.save_for_backward(permuted, gate_up, down, hidden)
        return _multiply(swiglu.forward(hidden), down, ctx.spans)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permuted, gate_up, down, hidden = ctx.saved_tensors
        spans, grad = ctx.spans, grad.contiguous()
        inner, grad_hidden = ctx.swiglu.backward(hidden, _multiply(grad, down.transpose(1, 2), spans))
        grad_permuted = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = _outer(inner, grad, spans, clear=inner)
        if ctx.needs_input_grad[0]:
            grad_permuted = _multiply(grad_hidden, gate_up.transpose(1, 2), spans)
        if ctx.needs_input_grad[1]:
            grad_gate_up = _outer(permuted, grad_hidden, spans, clear=grad_hidden)
        return grad_permuted, grad_gate_up, grad_down, None, None


def padded_bucket_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *, swiglu: SwigluKernel = EAGER_SWIGLU
) -> Tensor:
    """An :class:`ExpertKernel` for the CPU, where reading the token counts is not a synchronisation."""
    return _PaddedBucketExperts.apply(permuted, gate_up, down, tokens_per_expert, swiglu)
