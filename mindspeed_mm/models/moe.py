"""Sparse feed-forward layer: router, experts, and the way of the tokens to them and back.

Legend: T tokens, E experts, k experts per token, H hidden width, I intermediate width, N = T * k rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.experts import ExpertKernel
from mindspeed_mm.models.geometry import TextGeometry


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, the k largest, renormalised to sum 1."""

    def __init__(self, config: TransformerConfig, *, geometry: TextGeometry) -> None:
        super().__init__()
        self.top_k = geometry.num_experts_per_token
        self.weight = nn.Parameter(
            torch.empty(geometry.num_experts, geometry.hidden_size, dtype=config.params_dtype)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> (weights [T, k] in the tokens' type, expert indices int64 [T, k])."""
        probabilities = F.linear(tokens, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), experts


class Experts(nn.Module):
    """All experts in two tensors, stored as products want them: x @ W."""

    def __init__(self, config: TransformerConfig, *, geometry: TextGeometry, kernel: ExpertKernel) -> None:
        super().__init__()
        experts, hidden, inner = geometry.num_experts, geometry.hidden_size, geometry.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner, dtype=config.params_dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden, dtype=config.params_dtype))
        self.kernel = kernel

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows [N, H] sorted by expert, rows_per_expert int64 [E] -> [N, H]."""
        return self.kernel(rows, self.gate_up_proj, self.down_proj, rows_per_expert)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Rows sorted by expert: row r is choice ``order[r]`` of the T * k choices, of token ``order[r] // k``.

    Attributes:
        order: int64 [N].
        inverse: int64 [N], the row of each choice.
        rows_per_expert: int64 [E].
        top_k: k.
    """

    order: Tensor
    inverse: Tensor
    rows_per_expert: Tensor
    top_k: int

    @classmethod
    def from_experts(cls, experts: Tensor, num_experts: int) -> Routing:
        """Sort the choices ``experts`` [T, k]; nothing is read back to the host."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        rows_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
        rows_per_expert.scatter_add_(0, flat, torch.ones_like(flat))
        return cls(order=order, inverse=inverse, rows_per_expert=rows_per_expert, top_k=experts.shape[-1])


class _Dispatch(torch.autograd.Function):
    """tokens [T, H] -> rows [N, H]. Both directions are gathers, so that no atomic addition decides the order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return tokens.index_select(0, routing.order // routing.top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        routing = ctx.routing
        choices = grad.index_select(0, routing.inverse)
        return choices.view(-1, routing.top_k, grad.shape[-1]).sum(dim=1), None


class _Combine(torch.autograd.Function):
    """rows [N, H], weights [T, k] -> the weighted sum of each token's rows [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.routing = routing
        choices = rows.index_select(0, routing.inverse).view(*weights.shape, -1)
        return torch.einsum("tkh,tk->th", choices, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        routing = ctx.routing
        grad_by_row = grad.index_select(0, routing.order // routing.top_k)
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = grad_by_row * weights.flatten()[routing.order].unsqueeze(-1)
        if ctx.needs_input_grad[1]:
            products = (grad_by_row.float() * rows.float()).sum(dim=-1)
            grad_weights = products[routing.inverse].view_as(weights).to(weights.dtype)
        return grad_rows, grad_weights, None


@dataclasses.dataclass
class MoESubmodules:
    """Parts of :class:`MoELayer`."""

    router: ModuleSpec | type
    experts: ModuleSpec | type


class MoELayer(nn.Module):
    """The MLP slot of a sparse layer. No token is dropped and none is padded."""

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules) -> None:
        super().__init__()
        self.router = build_module(submodules.router, config=config)
        self.experts = build_module(submodules.experts, config=config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], None)."""
        tokens = hidden_states.flatten(0, 1)
        weights, experts = self.router(tokens)
        routing = Routing.from_experts(experts, self.router.weight.shape[0])
        rows = _Dispatch.apply(tokens, routing)
        output = _Combine.apply(self.experts(rows, routing.rows_per_expert), weights, routing)
        return output.view_as(hidden_states), None
