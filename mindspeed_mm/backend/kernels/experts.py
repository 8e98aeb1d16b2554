"""Expert feed-forward networks (SwiGLU) over tokens sorted by expert: reference loop, grouped, padded buckets.

Legend: N permuted tokens (sorted by expert), E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels.elementwise import EAGER_SWIGLU, SwigluKernel, torch_swiglu


class ExpertAdapters(NamedTuple):
    """LoRA factors of all experts, and the factor on their products: ``W + scale * A B^T`` for each expert.

    Attributes:
        gate_up_a: [E, H, r].
        gate_up_b: [E, 2I, r].
        down_a: [E, I, r].
        down_b: [E, H, r].
        scale: factor.
    """

    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    def padded(self, multiple: int) -> ExpertAdapters:
        """The same products with a rank that is a multiple of ``multiple``: columns of zeros are appended."""
        missing = -self.gate_up_a.shape[-1] % multiple
        if not missing:
            return self
        factors = (F.pad(factor, (0, missing)) for factor in self[:-1])
        return ExpertAdapters(*factors, self.scale)


class ExpertKernel(Protocol):
    """permuted [N, H], gate_up [E, H, 2I], down [E, I, H], tokens_per_expert int [E] on the device -> [N, H].

    A kernel that weighs rows takes ``weights`` [N] too, and returns each row times its weight. With ``adapters`` the
    products of their factors are added to those of the weights, which then do not train.
    """

    def __call__(
        self, permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *,
        adapters: ExpertAdapters | None = None,
    ) -> Tensor:
        """``(silu(x @ gate) * (x @ up)) @ down`` with each token's own expert."""


def reference_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """The reference: a loop over the experts that have tokens. Synchronises with the device to read the counts."""
    # unbind, since indexing would make backward fill a zero tensor of all experts for each of them
    tensors = [gate_up, down] if adapters is None else [gate_up, down, *adapters[:-1]]
    parts = zip(permuted.split(tokens_per_expert.tolist()), *(tensor.unbind(0) for tensor in tensors), strict=True)
    outputs = [_one_expert(*part, adapters=adapters) for part in parts if part[0].shape[0] > 0]
    if outputs:
        return torch.cat(outputs)
    # A rank may get no token at all; its experts still take part in backward, with zero gradients.
    return permuted + sum(tensor.sum() for tensor in tensors) * 0


def _one_expert(
    rows: Tensor, gate_up: Tensor, down: Tensor, *factors: Tensor, adapters: ExpertAdapters | None
) -> Tensor:
    if adapters is None:
        return torch_swiglu(rows @ gate_up) @ down
    first_a, first_b, second_a, second_b = factors
    inner = torch_swiglu(rows @ gate_up + adapters.scale * (rows @ first_a) @ first_b.t())
    return inner @ down + adapters.scale * (inner @ second_a) @ second_b.t()


class ExpertProducts(abc.ABC):
    """Matrix products with each token's own expert, without autograd."""

    @abc.abstractmethod
    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """rows [N, A], matrices [E, A, B] -> [N, B]."""

    @abc.abstractmethod
    def outer(self, left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor:
        """left [N, A], right [N, B] -> [E, A, B], ``left^T right``; ``scratch``, one of the two, may be overwritten."""

    def weight_gradient(self, index: int, left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor | None:
        """:meth:`outer`, the gradient of gate_up (``index`` 0) or down (1); None if it is accumulated elsewhere."""
        del index
        return self.outer(left, right, scratch=scratch)


class RowSwiglu(NamedTuple):
    """As :class:`~mindspeed_mm.backend.kernels.elementwise.SwigluKernel`, with an optional weight of each row.

    Attributes:
        forward: (gate_up [N, 2I], weights [N] or None) -> [N, I].
        backward: (gate_up, weights, gradient [N, I]) -> (the result once more, the gradient of gate_up, that of the
            weights or None).
    """

    forward: Callable[[Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor | None]]

    @classmethod
    def of(cls, swiglu: SwigluKernel) -> RowSwiglu:
        """Without weights."""
        return cls(
            lambda gate_up, weights: swiglu.forward(gate_up),
            lambda gate_up, weights, grad: (*swiglu.backward(gate_up, grad), None),
        )


class Experts(torch.autograd.Function):
    """Both projections and their gradients by an :class:`ExpertProducts`.

    Keeps its input and the first projection's output [N, 2I]; SwiGLU is recomputed in backward. With adapters it also
    keeps ``u = scale * x A`` [N, r] of each projection, and no gradient of the weights is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, products: ExpertProducts, swiglu: RowSwiglu, permuted: Tensor, gate_up: Tensor, down: Tensor,
        weights: Tensor | None, scale: float, *factors: Tensor,
    ) -> Tensor:
        ctx.products, ctx.swiglu, ctx.scale = products, swiglu, scale
        hidden = products.multiply(permuted, gate_up)
        if not factors:
            ctx.save_for_backward(permuted, gate_up, down, weights, hidden)
            return products.multiply(swiglu.forward(hidden, weights), down)
        first_a, first_b, second_a, second_b = factors
        first_u = products.multiply(permuted, first_a).mul_(scale)
        hidden.add_(products.multiply(first_u, first_b.transpose(1, 2)))
        inner = swiglu.forward(hidden, weights)
        second_u = products.multiply(inner, second_a).mul_(scale)
        ctx.save_for_backward(permuted, gate_up, down, weights, hidden, *factors, first_u, second_u)
        return products.multiply(inner, down).add_(products.multiply(second_u, second_b.transpose(1, 2)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        permuted, gate_up, down, weights, hidden, *of_adapters = ctx.saved_tensors
        products, grad = ctx.products, grad.contiguous()  # grouped_mm refuses the zero strides of an expanded gradient
        grad_inner = products.multiply(grad, down.transpose(1, 2))
        if of_adapters:
            first_a, first_b, second_a, second_b, first_u, second_u = of_adapters
            grad_u = products.multiply(grad, second_b).mul_(ctx.scale)
            grad_inner.add_(products.multiply(grad_u, second_a.transpose(1, 2)))
        inner, grad_hidden, grad_weights = ctx.swiglu.backward(hidden, weights, grad_inner)
        grad_permuted = grad_gate_up = grad_down = None
        grad_factors: tuple[Tensor, ...] = ()
        if of_adapters:
            grad_second = _thin(products, inner, grad_u), _thin(products, grad, second_u)
            grad_u = products.multiply(grad_hidden, first_b).mul_(ctx.scale)
            grad_factors = (_thin(products, permuted, grad_u), _thin(products, grad_hidden, first_u), *grad_second)
        if ctx.needs_input_grad[4]:
            grad_down = products.weight_gradient(1, inner, grad, scratch=inner)
        if ctx.needs_input_grad[2]:
            grad_permuted = products.multiply(grad_hidden, gate_up.transpose(1, 2))
            if of_adapters:
                grad_permuted.add_(products.multiply(grad_u, first_a.transpose(1, 2)))
        if ctx.needs_input_grad[3]:
            grad_gate_up = products.weight_gradient(0, permuted, grad_hidden, scratch=grad_hidden)
        grad_weights = None if grad_weights is None else grad_weights.to(weights.dtype)
        return None, None, grad_permuted, grad_gate_up, grad_down, grad_weights, None, *grad_factors


def _thin(products: ExpertProducts, left: Tensor, right: Tensor) -> Tensor:
    """left [N, A], right [N, r] -> [E, A, r]; a copy of ``right`` is small, and both are needed again."""
    right = right.clone()
    return products.outer(left, right, scratch=right)


@dataclasses.dataclass(frozen=True)
class GroupedProducts(ExpertProducts):
    """``torch.nn.functional.grouped_mm``; ``ends``: int32 [E], where each expert's tokens end."""

    ends: Tensor

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """See :class:`ExpertProducts`."""
        return F.grouped_mm(rows, matrices, offs=self.ends)

    def outer(self, left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor:
        """See :class:`ExpertProducts`."""
        return F.grouped_mm(left.t(), right, offs=self.ends)


def grouped_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *,
    swiglu: SwigluKernel = EAGER_SWIGLU, adapters: ExpertAdapters | None = None,
) -> Tensor:
    """``torch.nn.functional.grouped_mm``: the token counts stay on the device."""
    products = GroupedProducts(tokens_per_expert.cumsum(0).to(torch.int32))
    return run_experts(products, RowSwiglu.of(swiglu), permuted, gate_up, down, None, adapters)


def run_experts(
    products: ExpertProducts, swiglu: RowSwiglu, permuted: Tensor, gate_up: Tensor, down: Tensor,
    weights: Tensor | None, adapters: ExpertAdapters | None,
) -> Tensor:
    """Experts by ``products``, whose rows must be aligned to 16 bytes; see :class:`ExpertKernel`."""
    if adapters is None:
        return Experts.apply(products, swiglu, permuted, gate_up, down, weights, 1.0)
    factors = adapters.padded(16 // permuted.itemsize)
    return Experts.apply(products, swiglu, permuted, gate_up, down, weights, factors.scale, *factors[:-1])


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


@dataclasses.dataclass(frozen=True)
class PaddedBuckets(ExpertProducts):
    """One expert after another, in few product sizes.

    On a CPU in bf16, oneDNN prepares a product anew for every number of tokens, which takes longer than the product
    itself, in ``grouped_mm`` as in a plain loop. So an expert's token count is rounded up to a bucket size: its span
    begins among the tokens of the experts before it.
    """

    spans: list[_Span]

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """See :class:`ExpertProducts`."""
        output = rows.new_empty(rows.shape[0], matrices.shape[2])
        # last to first: what a span writes into the tokens before its own is overwritten by their expert's product
        for (begin, start, end), matrix in zip(reversed(self.spans), reversed(matrices.unbind(0)), strict=True):
            if end > start:
                torch.mm(rows[begin:end], matrix, out=output[begin:end])
        return output

    def outer(self, left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor:
        """See :class:`ExpertProducts`; in ``scratch`` the tokens before an expert's own are set to zero."""
        output = left.new_empty(len(self.spans), left.shape[1], right.shape[1])
        for (begin, start, end), matrix in zip(self.spans, output.unbind(0), strict=True):
            if end > start:
                scratch[begin:start].zero_()
                torch.mm(left[begin:end].t(), right[begin:end], out=matrix)
            else:
                matrix.zero_()
        return output


def padded_bucket_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *,
    swiglu: SwigluKernel = EAGER_SWIGLU, adapters: ExpertAdapters | None = None,
) -> Tensor:
    """An :class:`ExpertKernel` for the CPU, where reading the token counts is not a synchronisation."""
    products = PaddedBuckets(_spans(tokens_per_expert.tolist()))
    return run_experts(products, RowSwiglu.of(swiglu), permuted, gate_up, down, None, adapters)
