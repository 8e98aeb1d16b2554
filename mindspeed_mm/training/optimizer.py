"""The optimizer that the flags select, and Megatron's learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.models.parameter_rules import ParameterSettings, Settings
from mindspeed_mm.training.gradients import by_mesh
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.base import ShardedOptimizer
from mindspeed_mm.training.optimizers.low_precision import LowPrecisionAdamW
from mindspeed_mm.training.optimizers.muon import Muon
from mindspeed_mm.training.resume_checks import names_of_scales, schedule_settings

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mindspeed_mm.config.flags import TrainingArgs


def build_optimizer(model: nn.Module, args: TrainingArgs, settings: Settings) -> ShardedOptimizer:
    """The optimizer of the trainable parameters, in groups of equal learning rate and weight decay."""
    trainable = {p: settings[name] for name, p in model.named_parameters() if p.requires_grad}
    layout = OptimizerStateLayout.of(args, settings)
    matrices = {p: setting.matrices for p, setting in trainable.items() if setting.matrices is not None}
    optimizer: ShardedOptimizer | None = None
    if groups := _groups({p: setting for p, setting in trainable.items() if p not in matrices}, trainable.values()):
        optimizer = (AdamW if layout.moment_dtype == "fp32" else LowPrecisionAdamW)(
            groups,
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
            triton=not args.no_triton_kernels,
        )
    if matrices:
        optimizer = Muon(
            _groups({p: trainable[p] for p in matrices}, trainable.values()),
            matrices=matrices,
            adamw=optimizer,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.muon_momentum,
            steps=args.muon_ns_steps,
            adjust_lr=args.muon_adjust_lr,
        )
    assert optimizer is not None, "parameter rules refuse a model of which nothing trains"
    optimizer.layout = layout
    optimizer.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return optimizer


def _groups(
    trainable: Mapping[nn.Parameter, ParameterSettings], everything: Iterable[ParameterSettings]
) -> list[dict[str, Any]]:
    """Groups of equal learning rate and weight decay, named after all parameters with that learning rate."""
    names = names_of_scales(everything)
    groups: list[dict[str, Any]] = []
    for same_mesh in by_mesh(trainable):  # one fused step must not mix meshes
        by_factors: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for parameter in same_mesh:
            by_factors[trainable[parameter].lr_scale, trainable[parameter].decay_scale].append(parameter)
        groups += [
            {"params": parameters, "lr_mult": lr_scale, "wd_mult": decay_scale, "name": names[lr_scale]}
            for (lr_scale, decay_scale), parameters in by_factors.items()
        ]
    return groups


def learning_rates(optimizer: torch.optim.Optimizer, schedule: OptimizerParamScheduler) -> dict[str, float]:
    """``learning_rate`` of the next step, and ``learning_rate/<parts>`` of parameters whose rate is scaled."""
    scaled = {f"learning_rate/{g['name']}": g["lr"] for g in optimizer.param_groups if g["lr_mult"] != 1.0}
    return {"learning_rate": schedule.get_lr({}), **scaled}


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainingArgs) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples: iteration 1 runs at ``--lr-warmup-init``, 0 by default."""
    from mindspeed_mm.training.schedules import Schedule  # imports megatron-core

    return Schedule(optimizer, init_lr=args.lr_warmup_init, **schedule_settings(args))


def schedule_state(schedule: OptimizerParamScheduler) -> dict[str, Any]:
    """Megatron's state of the schedule, and ``lr_scales``: group -> factor on its learning rate, unless that is 1."""
    scales = {group["name"]: group["lr_mult"] for group in schedule.optimizer.param_groups if group["lr_mult"] != 1.0}
    return {**schedule.state_dict(), "lr_scales": scales}
