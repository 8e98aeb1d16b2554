"""Token dispatch on one rank: tokens to their experts and back.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k permuted tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.permutation import (
    CombineBackwardKernel,
    CombineKernel,
    TokenPermuter,
    gather_combine,
)

ExpertFunction = Callable[..., Tensor]
"""(permuted tokens [N, H] sorted by expert, tokens per expert [E]) -> [N, H]; experts that weigh rows take each row's
weight [N] as a third argument."""

Dispatcher = Callable[[Tensor, Tensor, Tensor, ExpertFunction, Tensor], Tensor]
"""(tokens [T, H], weights [T, k], expert indices [T, k], experts, tokens per expert int64 [E]) -> weighted sums of
their results [T, H]."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """The order by expert: permuted token n is choice ``order[n]`` of the T * k choices, of token ``order[n] // k``.

    Attributes:
        order: int64 [N].
        inverse: int64 [N], the index of each choice among the permuted tokens.
        top_k: k.
    """

    order: Tensor
    inverse: Tensor
    top_k: int

    @classmethod
    def from_experts(cls, experts: Tensor) -> Routing:
        """Sort the choices ``experts`` [T, k], without host-device synchronisation."""
        # a radix sort goes over the keys byte by byte, and no model has 32768 experts
        order = experts.flatten().to(torch.int16).argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, inverse, top_k=experts.shape[-1])

    @property
    def permuted_of_token(self) -> Tensor:
        """int64 [T, k], the indices of each token among the permuted ones."""
        return self.inverse.view(-1, self.top_k)

    @property
    def token_of_permuted(self) -> Tensor:
        """int64 [N]."""
        return self.order // self.top_k


class _Permute(torch.autograd.Function):
    """tokens [N, H] -> tokens[order]; gathers both ways, so that no atomic addition makes the order of sums random."""

    @staticmethod
    def forward(ctx: Any, permuted: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return permuted.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    """tokens [T, H] -> permuted [N, H], each token once for each of its k experts."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routing: Routing, combine: CombineKernel) -> Tensor:
        ctx.routing, ctx.combine = routing, combine
        return tokens.index_select(0, routing.token_of_permuted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.combine(grad, ctx.routing.permuted_of_token, None), None, None


class _Sum(torch.autograd.Function):
    """permuted [N, H] -> the sum of each token's results [T, H]."""

    @staticmethod
    def forward(ctx: Any, permuted: Tensor, routing: Routing, combine: CombineKernel) -> Tensor:
        ctx.routing = routing
        return combine(permuted, routing.permuted_of_token, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.routing.token_of_permuted), None, None


class _Gather(torch.autograd.Function):
    """permuted [N, H], weights [T, k] -> the weighted sum of each token's results [T, H]."""

    @staticmethod
    def forward(
        ctx: Any, permuted: Tensor, weights: Tensor, routing: Routing, combine: CombineKernel,
        combine_backward: CombineBackwardKernel | None,
    ) -> Tensor:
        ctx.save_for_backward(permuted, weights)
        ctx.routing, ctx.combine_backward = routing, combine_backward
        return combine(permuted, routing.permuted_of_token, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permuted, weights = ctx.saved_tensors
        routing = ctx.routing
        if ctx.combine_backward is not None:
            grad_permuted, grad_weights = ctx.combine_backward(grad, permuted, routing.permuted_of_token, weights)
            return grad_permuted, grad_weights.to(weights.dtype), None, None, None
        grad_by_permuted = grad.index_select(0, routing.token_of_permuted)
        grad_permuted = grad_weights = None
        if ctx.needs_input_grad[1]:
            by_permuted = torch.linalg.vecdot(grad_by_permuted, permuted)
            grad_weights = by_permuted[routing.inverse].view_as(weights).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            grad_permuted = grad_by_permuted.mul_(weights.flatten()[routing.order].unsqueeze(-1))
        return grad_permuted, grad_weights, None, None, None


class IndexPermuter:
    """A ``TokenPermuter`` made of index operations, for any device and dtype."""

    def __init__(
        self, combine: CombineKernel = gather_combine, combine_backward: CombineBackwardKernel | None = None
    ) -> None:
        """``combine_backward``: the gradients of a weighted ``combine``; None for torch's operators."""
        self._combine = combine
        self._combine_backward = combine_backward

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """int64 [E]."""
        flat = experts.flatten()
        return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
            0, flat, torch.ones_like(flat)
        )

    def permute(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Routing]:
        """[T, H] -> [N, H]."""
        routing = Routing.from_experts(experts)
        return _Scatter.apply(tokens, routing, self._combine), routing

    def unpermute(self, permuted: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
        """[N, H] -> [T, H]."""
        if weights is None and routing.top_k == 1:
            return _Permute.apply(permuted, routing.inverse, routing.order)
        if weights is None:
            return _Sum.apply(permuted, routing, self._combine)
        return _Gather.apply(permuted, weights, routing, self._combine, self._combine_backward)


@dataclasses.dataclass(frozen=True)
class LocalDispatcher:
    """Dispatch where one rank holds all experts.

    Attributes:
        permuter: sorts tokens by expert and restores their order.
        experts_weigh: whether the experts multiply each row by its weight; it needs :class:`IndexPermuter`.
    """

    permuter: TokenPermuter
    experts_weigh: bool = False

    def __call__(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, function: ExpertFunction, tokens_per_expert: Tensor
    ) -> Tensor:
        """See :data:`Dispatcher`."""
        permuted, routing = self.permuter.permute(tokens, experts)
        if not self.experts_weigh:
            return self.permuter.unpermute(function(permuted, tokens_per_expert), routing, weights)
        of_permuted = _Permute.apply(weights.flatten(), routing.order, routing.inverse)
        return self.permuter.unpermute(function(permuted, tokens_per_expert, of_permuted), routing)
