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
    """Load of the experts in L sparse layers.

    Attributes:
        choices: int64 [L, E], how often each expert was chosen; T * k in all for one layer.
        probabilities: fp32 [E], sum over layers and tokens of each expert's probability, with gradient; L * T in all.
            None where it is not kept.
    """

    choices: Tensor
    probabilities: Tensor | None


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, the k largest, renormalised to sum 1.

    Attributes:
        choose: does in one what follows the projection, where no probabilities are kept.
        keeps_probabilities: whether each forward pass keeps them for :meth:`take_probabilities`.
    """

    def __init__(
        self, config: TransformerConfig, *, num_experts: int, top_k: int, choose: RouterKernel | None = None
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.choose = choose
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=config.params_dtype))
        self.keeps_probabilities = False
        self._probabilities: Tensor | None = None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> (weights [T, k] in the tokens' type, expert indices int64 [T, k])."""
        logits = F.linear(tokens, self.weight)
        if self.choose is not None and not self.keeps_probabilities:
            return self.choose(logits, self.top_k, tokens.dtype)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.keeps_probabilities:
            self._probabilities = probabilities
        return weights.to(tokens.dtype), experts

    def take_probabilities(self, counted: int) -> Tensor | None:
        """Sum over the first ``counted`` tokens of the last forward pass, fp32 [E]; None if they were not kept.

        To be called once after each pass, for what is kept is a part of that pass's graph.
        """
        probabilities, self._probabilities = self._probabilities, None
        return None if probabilities is None else probabilities[:counted].sum(dim=0)


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
        self._choices: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], None)."""
        tokens = hidden_states.flatten(0, 1)
        weights, experts = self.router(tokens)
        tokens_per_expert = self.permuter.count(experts, self.router.weight.shape[0])
        self._choices = experts, tokens_per_expert
        output = self.dispatch(tokens, weights, experts, self.experts, tokens_per_expert)
        return output.view_as(hidden_states), None

    def take_load(self, counted: int) -> tuple[Tensor, ...]:
        """The load of the first ``counted`` tokens of the last forward pass; empty if that did not come to the router.

        Returns:
            (choices int64 [E],), and the router's probabilities, fp32 [E], where it keeps them.
        """
        choices, self._choices = self._choices, None
        probabilities = self.router.take_probabilities(counted)
        if choices is None:
            return ()
        experts, tokens_per_expert = choices
        if counted < len(experts):
            tokens_per_expert = tokens_per_expert - self.permuter.count(experts[counted:], len(tokens_per_expert))
        return (tokens_per_expert,) if probabilities is None else (tokens_per_expert, probabilities)
