"""FSDP2 applied from outside: which modules form a unit, in which precision, and in which order they are fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from mindspeed_mm.arguments.fsdp_config import FSDPConfig
from mindspeed_mm.parallel.mesh import Layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shard_model(model: nn.Module, units: Sequence[nn.Module], *, layout: Layout, config: FSDPConfig) -> None:
    """Shard ``model`` in place.

    Gradients are averaged over all processes by the reduction; the loss is scaled by their number in return, so that
    they add up.

    Args:
        model: parameters in fp32, possibly on the meta device.
        units: submodules in the order in which forward runs them; each is gathered and freed by itself. What belongs
            to none of them is gathered once per step.
        layout: where the parameters go.
        config: the YAML file.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=_compute_dtype(config.param_dtype),
        reduce_dtype=_compute_dtype(config.reduce_dtype),
        cast_forward_inputs=config.cast_forward_inputs,
    )
    # The root and the loss head receive fp32 token weights, whose bits the loss needs.
    uncast = dataclasses.replace(policy, cast_forward_inputs=False)
    options = {
        "mesh": layout.mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if config.offload_to_cpu else OffloadPolicy(),
    }
    for unit in units[:-1]:
        fully_shard(unit, mp_policy=policy, **options)
    fully_shard(units[-1], mp_policy=uncast, **options)
    fully_shard(model, mp_policy=uncast, **{**options, "reshard_after_forward": False})
    _set_prefetch(units, forward=config.num_to_forward_prefetch, backward=config.num_to_backward_prefetch)


def _compute_dtype(name: str | None) -> torch.dtype | None:
    """FSDP2 takes None for parameters' own type, which is fp32 here."""
    dtype = DTYPES[name] if name is not None else torch.float32
    return None if dtype is torch.float32 else dtype


def _set_prefetch(units: Sequence[nn.Module], *, forward: int, backward: int) -> None:
    """Each unit's gathering is started while an earlier one computes; 0 leaves it to FSDP2."""
    sharded = [unit for unit in units if isinstance(unit, FSDPModule)]
    for index, unit in enumerate(sharded):
        following, preceding = sharded[index + 1 : index + 1 + forward], sharded[max(0, index - backward) : index]
        if following:
            unit.set_modules_to_forward_prefetch(following)
        if preceding:
            unit.set_modules_to_backward_prefetch(preceding[::-1])
