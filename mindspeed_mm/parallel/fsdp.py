"""FSDP2 applied from outside: wrap units, mixed precision and prefetching."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.parallel.mesh import Layout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shard_model(
    model: nn.Module,
    units: Sequence[nn.Module],
    *,
    layout: Layout,
    config: FSDPConfig,
    experts: Sequence[nn.Module] = (),
    root_group: Sequence[nn.Module] = (),
) -> None:
    """Shard ``model`` in place.

    The reduction averages gradients over all ranks; the loss is scaled by the number of ranks, so that they add up.

    Args:
        model: parameters in fp32, possibly on the meta device.
        units: wrap units in the order of forward, the loss head last; each is gathered and freed separately, the head
            after backward only. Parameters outside of them are gathered once per step.
        layout: the device meshes.
        config: the YAML file.
        experts: modules within the units whose experts are expert-parallel: they are sharded over the ranks that hold
            the same experts, along the second axis, so that the number of experts need not divide.
        root_group: modules within the units that are gathered once per step instead of with their unit.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=_compute_dtype(config.param_dtype),
        # named in any case: for None FSDP2 sums in the type of the gradients, which is the compute type
        reduce_dtype=DTYPES[config.reduce_dtype],
        cast_forward_inputs=config.cast_forward_inputs,
    )
    # The root and the loss head take fp32 loss weights, which must not be rounded.
    uncast = dataclasses.replace(policy, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": layout.mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "offload_policy": _offload_policy(config, layout),
    }
    # Backward begins with the head and the root: freed after forward, they would be gathered again at once.
    kept = {**options, "reshard_after_forward": False}
    for module in experts:
        fully_shard(
            module,
            **{**options, "mesh": layout.expert_shard_mesh},
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(1),
        )
    left_to_root = {parameter for module in root_group for parameter in module.parameters()}
    for unit in units[:-1]:
        fully_shard(unit, mp_policy=policy, ignored_params=left_to_root, **options)
    fully_shard(units[-1], mp_policy=uncast, **kept)
    # FSDP2 does not search the units for parameters of its root group; so let it find these modules outside of them
    model.found_by_root = nn.ModuleList(root_group)
    fully_shard(model, mp_policy=uncast, **kept)
    del model.found_by_root
    set_prefetch(
        units, experts, forward=config.num_to_forward_prefetch, backward=config.num_to_backward_prefetch
    )


def _offload_policy(config: FSDPConfig, layout: Layout) -> OffloadPolicy:
    """Shards in host memory, page-locked if there is a device to copy them to."""
    if not config.offload_to_cpu:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=layout.mesh.device_type != "cpu")


def _compute_dtype(name: str) -> torch.dtype | None:
    """FSDP2 takes None for the parameters' own type, which is fp32 here."""
    dtype = DTYPES[name]
    return None if dtype is torch.float32 else dtype


def set_prefetch(
    units: Sequence[nn.Module], experts: Sequence[nn.Module], *, forward: int, backward: int
) -> None:
    """Start to gather each module's parameters while an earlier one computes; 0 leaves the order to FSDP2.

    Args:
        units: sharded modules in the order of forward.
        experts: sharded modules within the units, whose parameters are needed after the unit's own, in either pass.
        forward: units gathered ahead in forward, by a unit that computes before its own experts do.
        backward: modules gathered ahead in backward.
    """
    is_expert = set(experts)

    def with_experts(ordered: Sequence[nn.Module]) -> list[FSDPModule]:
        return [part for unit in ordered for part in (unit, *(m for m in unit.modules() if m in is_expert))]

    # Experts name nothing: when a layer runs forward again in backward, FSDP2 takes theirs for a first forward pass,
    # and would gather the next layer in vain.
    for index, unit in enumerate(units if forward else ()):
        own, following = with_experts([unit])[1:], units[index + 1 : index + 1 + forward]
        if ahead := [*own, *with_experts(following[:-1]), *following[-1:]]:
            unit.set_modules_to_forward_prefetch(ahead)
    # Backward ends at the first unit that trains; frozen units before it would be gathered in vain. The last one names
    # itself, which is gathered already: without a list FSDP2 would prefetch by its own order.
    trains = [any(parameter.requires_grad for parameter in unit.parameters()) for unit in units]
    in_backward = with_experts(units[trains.index(True) :][::-1]) if any(trains) else []
    for index, module in enumerate(in_backward if backward else ()):
        module.set_modules_to_backward_prefetch(in_backward[index + 1 : index + 1 + backward] or [module])


def reshard(model: nn.Module) -> None:
    """Free the parameters of the root group and of the head, which a forward pass without backward leaves gathered.

    Until then these are plain tensors in the compute type without optimizer state, which cannot be saved.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
