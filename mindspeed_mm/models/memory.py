"""Terms of the memory estimate: the plan of one rank of a run, and a model as units of parameters and activations.

A family describes its model in these terms (see :meth:`mindspeed_mm.models.spec.ModelSpec.memory_units`); no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mindspeed_mm.models.lora import Adapter
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout

BYTES = {"bf16": 2, "fp32": 4}
MASTER_BYTES = 4
"""Of a trainable parameter and its gradient: fp32 whatever the compute types are."""
SCALAR_BYTES = 4
"""Of a parameter's step count."""


Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class KernelTraits:
    """What implementations keep for backward in addition to what all of them keep.

    Attributes:
        fused_norm: RMSNorm keeps its input; written out it keeps two fp32 tensors of that size.
        fused_swiglu: SwiGLU keeps its input; written out also silu(gate).
        rotary_keeps_input: the rotary embedding keeps its inputs, query and key.
        softmax_bytes: statistics of the softmax per token and head.
        joins_segments: attention runs segment by segment and joins the results, which then exist twice.
        collective_copies: the collective library reduces a copy of its input, and gathers into a copy of its output.
        fp32_weighting: the gradient of the experts' weights is computed from fp32 copies of all permuted tokens.
        inner_again: grouped experts keep what enters SwiGLU, and compute what leaves it again.
    """

    fused_norm: bool
    fused_swiglu: bool
    rotary_keeps_input: bool
    softmax_bytes: int
    joins_segments: bool
    fp32_weighting: bool
    inner_again: bool
    collective_copies: bool


WRITTEN_OUT = KernelTraits(
    fused_norm=True, fused_swiglu=False, rotary_keeps_input=False, softmax_bytes=4, joins_segments=True,
    fp32_weighting=False, inner_again=True, collective_copies=True,
)
"""PyTorch's operations, as on a CPU."""
FUSED = KernelTraits(
    fused_norm=True, fused_swiglu=True, rotary_keeps_input=True, softmax_bytes=64, joins_segments=False,
    fp32_weighting=False, inner_again=False, collective_copies=False,
)
"""An accelerator's own kernels; its attention keeps the softmax's maximum and sum, eight fp32 copies of each."""


class LowRank(NamedTuple):
    """The adapters of one parameter together.

    Attributes:
        rank: sum of their ranks; 0 without adapters.
        size: numbers in their factors, before sharding.
    """

    rank: int = 0
    size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One rank of a run.

    Attributes:
        model_config: of the model.
        world_size: ranks.
        sharding_size: ranks that share one copy of the parameters.
        expert_size: ranks over which experts are sharded.
        context_size: ranks that share a micro-batch.
        tokens: packed tokens of a micro-batch, vision included, over all ranks that share it.
        patches: vision patches of it.
        target_tokens: target tokens of it.
        micro_batches: per optimizer step.
        compute_bytes: of a number in forward and backward.
        reduce_bytes: of a number in the reduction of gradients.
        reshard_after_forward: whether gathered parameters are freed after forward and gathered again for backward.
        num_to_forward_prefetch: wrap units gathered ahead in forward.
        num_to_backward_prefetch: wrap units gathered ahead in backward.
        align_fsdp_param_groups: whether decoder layers' norms and routers are gathered once per step.
        offload_to_cpu: whether parameters, gradients and optimizer state are in the host's memory.
        frozen: names of the parts of which no weight trains, whether or not they have adapters; see
            :attr:`~mindspeed_mm.models.spec.ModelSpec.parts`.
        frozen_names: names of all parameters that do not train.
        adapters: of a LoRA run.
        frozen_param_bytes: of a number in a parameter that does not train, outside forward and backward.
        optimizer_state: of the parameters that train.
        recompute_granularity: see the flags; None for no recomputation.
        recompute_method: see the flags.
        recompute_num_layers: see the flags.
        activation_offload: whether activations that decoder layers keep are moved to the host.
        loss_chunk_size: target tokens whose logits exist at a time; None for all.
        imbalance: tokens of the busiest rank's experts, relative to the mean.
        kernels: traits of the implementations.
    """

    model_config: Any
    world_size: int
    sharding_size: int
    expert_size: int = 1
    context_size: int = 1
    tokens: int
    patches: int = 0
    target_tokens: int
    micro_batches: int = 1
    compute_bytes: int = 2
    reduce_bytes: int = 4
    reshard_after_forward: bool = True
    num_to_forward_prefetch: int = 1
    num_to_backward_prefetch: int = 1
    align_fsdp_param_groups: bool = False
    offload_to_cpu: bool = False
    frozen: Collection[str] = ()
    frozen_names: Collection[str] = ()
    adapters: Sequence[Adapter] = ()
    frozen_param_bytes: int = MASTER_BYTES
    optimizer_state: OptimizerStateLayout = OptimizerStateLayout()
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    activation_offload: bool = False
    loss_chunk_size: int | None = None
    imbalance: float = 1.0
    kernels: KernelTraits = FUSED

    def trains(self, *parts: str) -> bool:
        """Whether weights of any of these parts of the model train."""
        return any(part not in self.frozen for part in parts)

    def adapts(self, prefix: str) -> bool:
        """Whether a parameter whose name begins so has adapters."""
        return any(base.startswith(prefix) for base in self._low_rank)

    def low_rank(self, base: str) -> LowRank:
        """The adapters of a parameter."""
        return self._low_rank.get(base, LowRank())

    @functools.cached_property
    def _low_rank(self) -> Mapping[str, LowRank]:
        by_base: dict[str, list[Adapter]] = defaultdict(list)
        for adapter in self.adapters:
            by_base[adapter.base].append(adapter)
        return {
            base: LowRank(sum(one.rank for one in found), sum(one.size for one in found))
            for base, found in by_base.items()
        }

    @property
    def local_tokens(self) -> int:
        """Tokens on this rank."""
        return -(-self.tokens // self.context_size)

    @property
    def local_target_tokens(self) -> int:
        """Target tokens on this rank, assumed to be evenly distributed."""
        return -(-self.target_tokens // self.context_size)

    @property
    def is_single_device(self) -> bool:
        """Whether one rank holds all parameters, without FSDP2, with a copy in the compute type."""
        return self.world_size == 1 and not self.offload_to_cpu

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.world_size // self.sharding_size


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one rank that a module keeps for backward, and that it needs while it runs.

    Attributes:
        attention: kept for backward by attention and its norm.
        mlp: kept by the experts or the MLP, and their norm.
        experts: how much of ``mlp`` belongs to the experts or the MLP themselves, which ``selective`` computes again.
        core: how much of ``attention`` belongs to the core attention, which ``selective`` computes again.
        inputs: what ``full`` keeps instead.
        forward: needed in addition while forward runs.
        backward_mlp: needed in addition while backward of the MLP or the experts runs.
        backward_attention: needed in addition while backward of attention runs.
    """

    attention: int = 0
    mlp: int = 0
    experts: int = 0
    core: int = 0
    inputs: int = 0
    forward: int = 0
    backward_mlp: int = 0
    backward_attention: int = 0

    @property
    def kept(self) -> int:
        """All that is kept where nothing is computed again."""
        return self.attention + self.mlp

    @property
    def kept_selectively(self) -> int:
        """What is kept where the core attention and the experts are computed again."""
        return self.kept - self.experts - self.core

    def times(self, count: int) -> Activations:
        """Those of ``count`` tokens or patches, from those of one."""
        return Activations(*(getattr(self, field.name) * count for field in dataclasses.fields(self)))

    def plus(self, **more: int) -> Activations:
        """With more bytes in some attributes."""
        return dataclasses.replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor: its name in the model, its shape before sharding, and whether it trains."""

    name: str
    shape: tuple[int, ...]
    trains: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A wrap unit: parameters that are gathered and freed together, and the module that they belong to.

    Attributes:
        name: for messages.
        kind: ``root``: gathered once per step; ``layer``: one of a stack of layers, to which recomputation applies;
            ``module``: any other; ``embedding``: of tokens; ``experts``: of a layer, under expert parallelism;
            ``head``: loss head, which stays gathered between forward and backward.
        parameters: the tensors, with the shapes that the unit's shards have together.
        shards: ranks that each hold an equal part.
        axis: along which they are sharded.
        index: of a layer in its stack, from 0.
        activations: of the module.
        terms: of the estimate, which the activations of attention and of the MLP belong to.
        runs_backward: whether autograd runs through the module: it trains, or something before it does.
        offloaded: whether kept activations are moved to the host.
        experts: of a ``layer``: the unit of its experts, which is wrapped within it.
    """

    name: str
    kind: Literal["root", "layer", "module", "embedding", "experts", "head"]
    parameters: tuple[Parameter, ...]
    shards: int
    axis: int = 0
    index: int = 0
    activations: Activations = Activations()
    terms: tuple[str, str] = ("text", "experts")
    runs_backward: bool = True
    offloaded: bool = False
    experts: Unit | None = None

    def _part(self, shape: tuple[int, ...]) -> int:
        """Numbers in the largest shard; FSDP2 pads every rank's to that."""
        axis = self.axis if len(shape) > self.axis else 0
        return math.prod(-(-size // self.shards) if at == axis else size for at, size in enumerate(shape))

    @functools.cached_property
    def _shards(self) -> tuple[int, int]:
        """Numbers that a rank holds: all of them, and those that train; an estimate asks often."""
        parts = [(self._part(parameter.shape), parameter.trains) for parameter in self.parameters]
        return sum(size for size, _ in parts), sum(size for size, trains in parts if trains)

    def shard(self, *, training_only: bool = False) -> int:
        """Numbers that a rank holds."""
        return self._shards[training_only]

    def optimizer_bytes(self, layout: OptimizerStateLayout) -> int:
        """Bytes of the optimizer's state that a rank holds, a scalar per parameter included."""
        return sum(
            layout.nbytes(parameter.name, parameter.shape, held=self._part(parameter.shape)) + SCALAR_BYTES
            for parameter in self.parameters if parameter.trains
        )

    def gathered(self, *, training_only: bool = False) -> int:
        """Numbers in the gathered parameters, padding included."""
        return self.shard(training_only=training_only) * self.shards


def parameters(prefix: str, shapes: Shapes, *, trains: bool, expert_size: int = 1) -> tuple[Parameter, ...]:
    """Tensors named ``prefix.name``; of experts, those that one of ``expert_size`` ranks computes with."""
    return tuple(
        Parameter(f"{prefix}.{name}", (shape[0] // expert_size, *shape[1:]), trains) for name, shape in shapes.items()
    )


def others(size: int) -> float:
    """Share of a whole that the other ranks of a group of ``size`` hold."""
    return (size - 1) / size


def passes(*, trains: bool, again: bool) -> int:
    """How often an exchange in a layer happens: forward, backward, and forward run again."""
    return 1 if not trains else 3 if again else 2
