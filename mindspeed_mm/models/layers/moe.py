"""Sparse feed-forward layer: router and experts.

Legend: T tokens, E experts, k experts per token, H hidden width, I intermediate width, N permuted tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.elementwise import RouterKernel
from mindspeed_mm.backend.kernels.experts import ExpertAdapters, ExpertKernel
from mindspeed_mm.backend.kernels.permutation import TokenPermuter
from mindspeed_mm.models.layers.token_dispatcher import Dispatcher, LocalDispatcher
from mindspeed_mm.models.lora import FACTORS, Adapter


class RouterLoad(NamedTuple):
    """Load of the experts, summed over tokens and, where said, over layers.

    Attributes:
        choices: int64 [E], how often each expert was chosen; T * k in all for one layer.
        probabilities: fp32 [E], sum over the tokens of each expert's probability, with gradient; T in all for one
            layer.
    """

    choices: Tensor
    probabilities: Tensor


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, the k largest, renormalised to sum 1.

    Attributes:
        choose: does in one what follows the projection, where no load is kept.
        keeps_routing: whether each forward pass keeps its choices for :meth:`take_load`.
    """

    def __init__(
        self, config: TransformerConfig, *, num_experts: int, top_k: int, choose: RouterKernel | None = None
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.choose = choose
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=config.params_dtype))
        self.keeps_routing = False
        self._routing: tuple[Tensor, Tensor] | None = None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> (weights [T, k] in the tokens' type, expert indices int64 [T, k])."""
        logits = F.linear(tokens, self.weight)
        if self.choose is not None and not self.keeps_routing:
            return self.choose(logits, self.top_k, tokens.dtype)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.keeps_routing:
            self._routing = probabilities, experts
        return weights.to(tokens.dtype), experts

    def take_load(self, counted: int) -> RouterLoad | None:
        """The load of the first ``counted`` tokens of the last forward pass, or None if it was not kept.

        To be called once after each pass, for what is kept is a part of that pass's graph.
        """
        routing, self._routing = self._routing, None
        if routing is None:
            return None
        probabilities, experts = routing
        chosen = experts[:counted].flatten()
        choices = torch.zeros(probabilities.shape[-1], dtype=torch.int64, device=chosen.device)
        choices.scatter_add_(0, chosen, torch.ones_like(chosen))
        return RouterLoad(choices, probabilities[:counted].sum(dim=0))


class Experts(nn.Module):
    """All experts in two tensors, stored for the products x @ W.

    Attributes:
        as_local: turns a parameter into the tensor to compute with; the identity unless experts are sharded over
            ranks.
        adapter_scale: factor on the products of the adapters; None without adapters.
    """

    adapter_scale: float | None = None

    def __init__(
        self, config: TransformerConfig, *, num_experts: int, intermediate_size: int, kernel: ExpertKernel
    ) -> None:
        super().__init__()
        experts, hidden, inner = num_experts, config.hidden_size, intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner, dtype=config.params_dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden, dtype=config.params_dtype))
        self.kernel = kernel
        self.as_local: Callable[[Tensor], Tensor] = _identity

    def forward(self, permuted: Tensor, tokens_per_expert: Tensor, *weights: Tensor) -> Tensor:
        """permuted [N, H] sorted by expert, tokens_per_expert int64 [local E] -> [N, H].

        ``weights``: nothing, or for a kernel that weighs rows the factor of each, [N].
        """
        gate_up, down = self.as_local(self.gate_up_proj), self.as_local(self.down_proj)
        if self.adapter_scale is None:
            return self.kernel(permuted, gate_up, down, tokens_per_expert, *weights)
        factors = (self.as_local(getattr(self, name)) for name in _FACTORS)
        adapters = ExpertAdapters(*factors, self.adapter_scale)
        return self.kernel(permuted, gate_up, down, tokens_per_expert, *weights, adapters=adapters)

    def add_adapter(self, adapter: Adapter) -> None:
        """Add the factors of one of the two weights, uninitialised; both need one before the next forward pass."""
        device = self.gate_up_proj.device
        for name, shape in adapter.shapes.items():
            factor = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
            self.register_parameter(name.rpartition(".")[2], factor)
        self.adapter_scale = adapter.scale


_FACTORS = tuple(f"{weight}_{factor}" for weight in ("gate_up_proj", "down_proj") for factor in FACTORS)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclasses.dataclass
class MoESubmodules:
    """Parts of :class:`MoELayer`."""

    router: ModuleSpec | type
    experts: ModuleSpec | type


class MoELayer(nn.Module):
    """The MLP slot of a sparse layer. No token is dropped and none is padded.

    Attributes:
        permuter: sorts tokens by expert and restores their order.
        dispatch: sends tokens to their experts and combines the results; expert parallelism replaces it.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MoESubmodules, *, permuter: TokenPermuter,
        experts_weigh: bool = False,
    ) -> None:
        super().__init__()
        self.router = build_module(submodules.router, config=config)
        self.experts = build_module(submodules.experts, config=config)
        self.permuter = permuter
        self.dispatch: Dispatcher = LocalDispatcher(permuter, experts_weigh)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], None)."""
        tokens = hidden_states.flatten(0, 1)
        weights, experts = self.router(tokens)
        output = self.dispatch(tokens, weights, experts, self.experts, self.router.weight.shape[0])
        return output.view_as(hidden_states), None
