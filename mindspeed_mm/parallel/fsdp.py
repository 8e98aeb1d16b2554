"""FSDP2 applied from outside: which modules form a unit, in which precision, and in which order they are fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from mindspeed_mm.arguments.fsdp_config import FSDPConfig
from mindspeed_mm.parallel.mesh import Layout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shard_model(
    model: nn.Module,
    units: Sequence[nn.Module],
    *,
    layout: Layout,
    config: FSDPConfig,
    experts: Sequence[nn.Module] = (),
) -> None:
    """Shard ``model`` in place.

    Gradients are averaged over all processes by the reduction; the loss is scaled by their number in return, so that
    they add up.

    Args:
        model: parameters in fp32, possibly on the meta device.
        units: submodules in the order in which forward runs them, the loss head last; each is gathered and freed by
            itself. What belongs to none of them is gathered once per step.
        layout: where the parameters go.
        config: the YAML file.
        experts: modules within the units whose experts are spread over processes: they are sharded over the processes
            that hold the same experts, along the second axis, so that the number of experts need not divide.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=_compute_dtype(config.param_dtype),
        reduce_dtype=_compute_dtype(config.reduce_dtype),
        cast_forward_inputs=config.cast_forward_inputs,
    )
    # The root and the loss head receive fp32 token weights, whose bits the loss needs.
    uncast = dataclasses.replace(policy, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": layout.mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "offload_policy": _offload_policy(config, layout),
    }
    for module in experts:
        fully_shard(
            module,
            **{**options, "mesh": layout.expert_shard_mesh},
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(1),
        )
    for unit in units[:-1]:
        fully_shard(unit, mp_policy=policy, **options)
    fully_shard(units[-1], mp_policy=uncast, **options)
    fully_shard(model, mp_policy=uncast, **{**options, "reshard_after_forward": False})
    _set_prefetch(
        _with_experts(units, experts),
        forward=config.num_to_forward_prefetch,
        backward=config.num_to_backward_prefetch,
    )


def _offload_policy(config: FSDPConfig, layout: Layout) -> OffloadPolicy:
    """Shards in host memory, page-locked where there is a device to copy them to."""
    if not config.offload_to_cpu:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=layout.mesh.device_type != "cpu")


def _compute_dtype(name: str) -> torch.dtype | None:
    """FSDP2 takes None for the parameters' own type, which is fp32 here."""
    dtype = DTYPES[name]
    return None if dtype is torch.float32 else dtype


def _with_experts(units: Sequence[nn.Module], experts: Sequence[nn.Module]) -> list[FSDPModule]:
    """All sharded modules in the order of forward: a layer's experts come after the layer itself."""
    wanted = set(experts)
    ordered = []
    for unit in units:
        ordered.append(unit)
        ordered += [module for module in unit.modules() if module in wanted]
    return ordered  # type: ignore[return-value]


def _set_prefetch(units: Sequence[FSDPModule], *, forward: int, backward: int) -> None:
    """Each unit's gathering is started while an earlier one computes; 0 leaves the order to FSDP2."""
    for index, unit in enumerate(units):
        following, preceding = units[index + 1 : index + 1 + forward], units[max(0, index - backward) : index]
        if following:
            unit.set_modules_to_forward_prefetch(list(following))
        if preceding:
            unit.set_modules_to_backward_prefetch(list(preceding[::-1]))
