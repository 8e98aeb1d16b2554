"""The plan of a run: from flags and files to what the estimate takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mindspeed_mm.config.checks import (
    ModelFacts,
    check_flags,
    check_frozen_dtype,
    check_model,
    check_muon,
    check_parallel,
)
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.models.lora import Adapter, LoraOptions
from mindspeed_mm.models.memory import BYTES, MASTER_BYTES, Parameter, Plan, Unit
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.models.parameter_rules import Settings, compile_rules, frozen_parts
from mindspeed_mm.models.spec import ModelConfig, get_spec


@dataclasses.dataclass(frozen=True)
class Load:
    """A micro-batch as large as it can become; see the fields of :class:`~mindspeed_mm.models.memory.Plan`."""

    tokens: int
    patches: int
    target_tokens: int

    @classmethod
    def largest(cls, args: TrainingArgs, model_config: ModelConfig, *, pixels: int) -> Load:
        """Samples of the full sequence length with one image of ``pixels`` each, and the rest an answer."""
        spec = get_spec(model_config.model_type)
        tokens, unit = args.micro_batch_size * args.seq_length, spec.merge_unit(model_config)
        most = spec.image_patches(args.micro_batch_size * pixels, model_config)
        merged = min(most // unit, tokens // 2)
        return cls(tokens, merged * unit, tokens - merged)


def plan_run(
    args: TrainingArgs,
    model: ModelOptions,
    fsdp: FSDPConfig,
    *,
    model_config: ModelConfig,
    world_size: int,
    load: Load,
    imbalance: float = 1.0,
    trained: Trained | None = None,
) -> Plan:
    """The plan of a run that the flags and files describe, already checked against each other.

    ``trained`` is what :func:`trained_by` finds for the flags and the model file, where it is known.
    """
    trained = trained_by(args, model, model_config) if trained is None else trained
    samples_at_once = args.micro_batch_size * (world_size // args.context_parallel_size)
    return Plan(
        model_config=model_config,
        world_size=world_size,
        sharding_size=world_size if fsdp.sharding_size == "auto" else int(fsdp.sharding_size),
        expert_size=args.expert_model_parallel_size,
        context_size=args.context_parallel_size,
        tokens=load.tokens,
        patches=load.patches,
        target_tokens=load.target_tokens,
        micro_batches=(args.global_batch_size or samples_at_once) // samples_at_once,
        compute_bytes=BYTES[fsdp.param_dtype],
        reduce_bytes=BYTES[fsdp.reduce_dtype],
        reshard_after_forward=fsdp.reshard_after_forward,
        num_to_forward_prefetch=fsdp.num_to_forward_prefetch,
        num_to_backward_prefetch=fsdp.num_to_backward_prefetch,
        align_fsdp_param_groups=fsdp.align_fsdp_param_groups,
        offload_to_cpu=fsdp.offload_to_cpu,
        frozen=frozen_parts(trained.weights),
        frozen_names=frozenset(name for name, setting in trained.weights.items() if not setting.trainable),
        adapters=trained.adapters,
        frozen_param_bytes=BYTES[args.frozen_param_dtype],
        optimizer_state=OptimizerStateLayout.of(args, trained.weights),
        recompute_granularity=args.recompute_granularity,  # type: ignore[arg-type]
        recompute_method=args.recompute_method,  # type: ignore[arg-type]
        recompute_num_layers=args.recompute_num_layers,
        activation_offload=model.activation_offload,
        loss_chunk_size=model.loss_chunk_size,
        imbalance=imbalance,
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run trains.

    Attributes:
        weights: settings of the model's parameters, without adapters.
        adapters: of a LoRA run.
    """

    weights: Settings
    adapters: Sequence[Adapter]


def trained_by(args: TrainingArgs, model: ModelOptions, model_config: ModelConfig) -> Trained:
    """What trains by the flags and the model file."""
    spec, lora = get_spec(model_config.model_type), LoraOptions.from_args(args)
    rules = compile_rules(args, model, parts=spec.parts)
    settings = spec.parameter_settings(model_config, rules, lora=lora, muon=args.muon)
    adapters = () if lora is None else spec.adapters(model_config, lora, rules)
    factors = {name for adapter in adapters for name in adapter.names}
    return Trained({name: setting for name, setting in settings.items() if name not in factors}, adapters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as flags and files describe it, checked against each other, from which changed runs are made.

    Attributes:
        args: the flags, with the global batch size and the FSDP2 file's expert-parallel size.
        model: the model file.
        fsdp: the FSDP2 file.
        model_config: of the model.
        world_size: ranks.
        pixels: of the image in a sample of the full length.
        sizes: of a micro-batch, fields of :class:`Load` that are known; the others are the largest possible.
        overrides: fields of the plan that have other values than flags and files give.
        known: what trains with and without LoRA, shared with changed runs: finding it takes longer than an estimate.
    """

    args: TrainingArgs
    model: ModelOptions
    fsdp: FSDPConfig
    model_config: ModelConfig
    world_size: int
    pixels: int
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known: dict[LoraOptions | None, Trained] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """What the rules between options and model read."""
        return get_spec(self.model_config.model_type).facts(self.model_config)

    @property
    def trained(self) -> Trained:
        """What trains."""
        lora = LoraOptions.from_args(self.args)
        if lora not in self.known:
            self.known[lora] = trained_by(self.args, self.model, self.model_config)
        return self.known[lora]

    @property
    def load(self) -> Load:
        """Sizes of a micro-batch; target tokens that are not known are all tokens that are not vision."""
        load = dataclasses.replace(Load.largest(self.args, self.model_config, pixels=self.pixels), **self.sizes)
        if "target_tokens" in self.sizes:
            return load
        merged = load.patches // get_spec(self.model_config.model_type).merge_unit(self.model_config)
        return dataclasses.replace(load, target_tokens=max(1, load.tokens - merged))

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the run."""
        plan = plan_run(
            self.args, self.model, self.fsdp, model_config=self.model_config, world_size=self.world_size,
            load=self.load, trained=self.trained,
        )
        return dataclasses.replace(plan, **self.overrides)

    def changed(
        self, *, args: Mapping[str, Any], fsdp: Mapping[str, Any], overrides: Mapping[str, Any], world_size: int,
        samples: int,
    ) -> Run:
        """The run with some options changed, of which none but LoRA's decide what trains.

        Args:
            args: fields of the flags.
            fsdp: fields of the FSDP2 file.
            overrides: fields of the plan that depend on the model file.
            world_size: ranks.
            samples: per optimizer step; a multiple of those that all ranks take at once is made of it.

        Raises:
            UserError: if the options do not go together, or do not fit the model or the number of ranks.
        """
        changed_args, changed_fsdp = self.args.replace(**args), self.fsdp.replace(**fsdp)
        at_once = changed_args.micro_batch_size * (world_size // changed_args.context_parallel_size)
        changed_args = changed_args.replace(global_batch_size=max(1, samples // at_once) * at_once)
        check_flags(changed_args)
        check_frozen_dtype(changed_args, changed_fsdp)
        check_muon(changed_args, changed_fsdp)
        check_parallel(changed_args, changed_fsdp, world_size=world_size)
        check_model(changed_args, changed_fsdp, self.model, self.facts, world_size=world_size)
        run = dataclasses.replace(
            self, args=changed_args, fsdp=changed_fsdp, world_size=world_size,
            overrides={**self.overrides, **overrides},
        )
        vars(run).update(facts=self.facts)
        _ = run.trained  # raises here what does not fit the model
        return run


def units_of(plan: Plan) -> list[Unit]:
    """All wrap units in the order in which forward runs them, the root first: it is gathered once per step."""
    units = get_spec(plan.model_config.model_type).memory_units(plan)
    if not plan.frozen_names and not plan.adapters:
        return units
    changed = {id(unit): _freeze(unit, plan.frozen_names) for unit in units}
    if plan.adapters:
        changed = _adapt(changed, plan.adapters)
    return [
        changed[id(unit)] if unit.experts is None or changed[id(unit.experts)] is unit.experts
        else dataclasses.replace(changed[id(unit)], experts=changed[id(unit.experts)])
        for unit in units
    ]


def _adapt(units: Mapping[int, Unit], adapters: Sequence[Adapter]) -> dict[int, Unit]:
    """Units with the adapters of their parameters. Backward runs through what has some, and what comes after it."""
    by_base: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_base[adapter.base].append(adapter)

    def learns(unit: Unit) -> bool:
        return any(base.trains or base.name in by_base for base in unit.parameters)

    adapted, reached = {}, False
    for key, unit in units.items():
        if unit.kind in ("root", "embedding"):  # the root has parameters of modules that run last
            reached |= unit.runs_backward
        else:
            reached |= learns(unit) or (unit.experts is not None and learns(unit.experts))
            unit = dataclasses.replace(unit, runs_backward=reached)
        factors = tuple(
            # of experts, those that a rank computes with, as of their weights
            Parameter(name, (base.shape[0], *shape[1:]) if adapter.is_experts else shape, trains=True)
            for base in unit.parameters for adapter in by_base.get(base.name, ())
            for name, shape in adapter.shapes.items()
        )
        adapted[key] = dataclasses.replace(unit, parameters=unit.parameters + factors)
    return adapted


def _freeze(unit: Unit, names: Collection[str]) -> Unit:
    frozen = {parameter for parameter in unit.parameters if parameter.trains and parameter.name in names}
    if not frozen:  # most are, since whole parts are frozen when the units are made
        return unit
    parameters = (dataclasses.replace(p, trains=False) if p in frozen else p for p in unit.parameters)
    return dataclasses.replace(unit, parameters=tuple(parameters))


def checkpoint_bytes(plan: Plan, *, moments: bool, trainable_only: bool = False) -> int:
    """Bytes of a training checkpoint.

    Args:
        plan: of the run.
        moments: the optimizer's state as well.
        trainable_only: no frozen parameters (``--save-trainable-only``).

    Checkpoints of a LoRA run also hold the adapters as a PEFT directory, in fp32.
    """
    of_frozen = 0 if trainable_only else plan.frozen_param_bytes
    unsharded = dataclasses.replace(plan, world_size=1, sharding_size=1, expert_size=1, context_size=1)
    total = BYTES["fp32"] * sum(adapter.size for adapter in plan.adapters)
    for unit in units_of(unsharded):
        for parameter in unit.parameters:
            total += math.prod(parameter.shape) * (MASTER_BYTES if parameter.trains else of_frozen)
            if moments and parameter.trains:
                total += plan.optimizer_state.nbytes(parameter.name, parameter.shape)
    return total
