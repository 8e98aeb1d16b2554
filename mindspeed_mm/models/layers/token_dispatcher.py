"""The way of tokens to their experts and back, on one process.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.permutation import CombineKernel, TokenPermuter, gather_combine

ExpertFunction = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, H] sorted by expert, rows per expert [E]) -> [N, H]."""

Dispatcher = Callable[[Tensor, Tensor, Tensor, ExpertFunction, int], Tensor]
"""(tokens [T, H], weights [T, k], expert indices [T, k], experts, E) -> weighted sums of their results [T, H]."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Rows sorted by expert: row r is choice ``order[r]`` of the T * k choices, of token ``order[r] // k``.

    Attributes:
        order: int64 [N].
        inverse: int64 [N], the row of each choice.
        top_k: k.
    """

    order: Tensor
    inverse: Tensor
    top_k: int

    @classmethod
    def from_experts(cls, experts: Tensor) -> Routing:
        """Sort the choices ``experts`` [T, k]; nothing is read back to the host."""
        order = experts.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, inverse, top_k=experts.shape[-1])

    @property
    def rows_of_tokens(self) -> Tensor:
        """int64 [T, k], the rows of each token."""
        return self.inverse.view(-1, self.top_k)

    @property
    def token_of_row(self) -> Tensor:
        """int64 [N]."""
        return self.order // self.top_k


class _Permute(torch.autograd.Function):
    """rows [N, H] -> rows[order]; gathers both ways, so that no atomic addition decides an order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    """tokens [T, H] -> rows [N, H], each token once for each of its k experts."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routing: Routing, combine: CombineKernel) -> Tensor:
        ctx.routing, ctx.combine = routing, combine
        return tokens.index_select(0, routing.token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.combine(grad, ctx.routing.rows_of_tokens, None), None, None


class _Gather(torch.autograd.Function):
    """rows [N, H], weights [T, k] -> the weighted sum of each token's rows [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routing: Routing, combine: CombineKernel) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.routing = routing
        return combine(rows, routing.rows_of_tokens, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights = ctx.saved_tensors
        routing = ctx.routing
        grad_by_row = grad.index_select(0, routing.token_of_row)
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = torch.linalg.vecdot(grad_by_row, rows)[routing.inverse].view_as(weights).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            grad_rows = grad_by_row.mul_(weights.flatten()[routing.order].unsqueeze(-1))
        return grad_rows, grad_weights, None, None


class IndexPermuter:
    """A ``TokenPermuter`` made of index operations, for any device and dtype."""

    def __init__(self, combine: CombineKernel = gather_combine) -> None:
        self._combine = combine

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

    def unpermute(self, rows: Tensor, places: Routing, weights: Tensor | None = None) -> Tensor:
        """[N, H] -> [T, H]."""
        if weights is None:
            return _Permute.apply(rows, places.inverse, places.order)
        return _Gather.apply(rows, weights, places, self._combine)


@dataclasses.dataclass(frozen=True)
class LocalDispatcher:
    """All experts are here."""

    permuter: TokenPermuter

    def __call__(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, function: ExpertFunction, num_experts: int
    ) -> Tensor:
        """See :data:`Dispatcher`."""
        rows, places = self.permuter.permute(tokens, experts)
        return self.permuter.unpermute(function(rows, self.permuter.count(experts, num_experts)), places, weights)
