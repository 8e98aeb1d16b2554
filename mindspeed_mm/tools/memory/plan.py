"""The plan of a run: from flags and files to what the estimate takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.models.memory import BYTES, MASTER_BYTES, Plan, Unit
from mindspeed_mm.models.parameter_rules import compile_rules, frozen_parts
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
) -> Plan:
    """The plan of a run that the flags and files describe, already checked against each other."""
    spec = get_spec(model_config.model_type)
    settings = spec.parameter_settings(model_config, compile_rules(args, model, parts=spec.parts))
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
        frozen=frozen_parts(settings),
        frozen_names=frozenset(name for name, setting in settings.items() if not setting.trainable),
        frozen_param_bytes=BYTES[args.frozen_param_dtype],
        recompute_granularity=args.recompute_granularity,  # type: ignore[arg-type]
        recompute_method=args.recompute_method,  # type: ignore[arg-type]
        recompute_num_layers=args.recompute_num_layers,
        activation_offload=model.activation_offload,
        loss_chunk_size=model.loss_chunk_size,
        imbalance=imbalance,
    )


def units_of(plan: Plan) -> list[Unit]:
    """All wrap units in the order in which forward runs them, the root first: it is gathered once per step."""
    units = get_spec(plan.model_config.model_type).memory_units(plan)
    if not plan.frozen_names:
        return units
    frozen = {id(unit): _freeze(unit, plan.frozen_names) for unit in units}
    return [
        frozen[id(unit)] if unit.experts is None
        else dataclasses.replace(frozen[id(unit)], experts=frozen[id(unit.experts)])
        for unit in units
    ]


def _freeze(unit: Unit, names: Collection[str]) -> Unit:
    parameters = (dataclasses.replace(p, trains=p.trains and p.name not in names) for p in unit.parameters)
    return dataclasses.replace(unit, parameters=tuple(parameters))


def checkpoint_bytes(plan: Plan, *, moments: bool, trainable_only: bool = False) -> int:
    """Bytes of a training checkpoint.

    Args:
        plan: of the run.
        moments: AdamW's two as well, of the trainable parameters.
        trainable_only: no frozen parameters (``--save-trainable-only``).
    """
    of_trainable = MASTER_BYTES * (3 if moments else 1)
    of_frozen = 0 if trainable_only else plan.frozen_param_bytes
    unsharded = dataclasses.replace(plan, world_size=1, sharding_size=1, expert_size=1, context_size=1)
    return sum(
        math.prod(parameter.shape) * (of_trainable if parameter.trains else of_frozen)
        for unit in units_of(unsharded)
        for parameter in unit.parameters
    )
