"""Whether a run can go on from a checkpoint, by its progress. Imports no torch: also checked before any rank starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError

_MOVING = ("num_steps", "wd_incr_steps")  # the position; and the length of a constant weight decay


def check_steps_remain(progress: Progress, args: TrainingArgs) -> None:
    """Refuse a run that has no steps left, which would report success without training.

    A restart by torchrun after the last save is accepted: the run has trained, and ends.

    Raises:
        UserError: if the checkpoint's iteration is not below ``--train-iters``.
    """
    if progress.iteration >= args.train_iters and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raise UserError(
            f"nothing to train: {args.load} has done iteration {progress.iteration}, and --train-iters is "
            f"{args.train_iters}; raise it (TRAIN_ITERS), or start a new stage from these weights with --finetune"
        )


def schedule_settings(args: TrainingArgs) -> dict[str, Any]:
    """What the flags make of Megatron's learning-rate schedule, counted in samples, by the names of its state."""
    assert args.global_batch_size is not None, "load_job_config fills it in"
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": args.warmup_samples,
        "lr_decay_steps": (args.lr_decay_iters or args.train_iters) * args.global_batch_size,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.weight_decay,
        "end_wd": args.weight_decay,
        "wd_incr_steps": args.train_iters * args.global_batch_size,
        "wd_incr_style": "constant",
    }


def check_schedule(args: TrainingArgs, progress: Progress, current: Mapping[str, Any]) -> None:
    """Refuse another learning-rate schedule than the checkpoint's, unless ``--override-opt-param-scheduler`` is given.

    Args:
        args: the flags.
        progress: of the checkpoint.
        current: the new state of the schedule; what it lacks is not compared.

    Raises:
        UserError: naming what differs.
    """
    saved = {"lr_scales": {}, **(progress.schedule or {})}
    differing = [
        f"{key} {value!r} became {current[key]!r}"
        for key, value in saved.items()
        if progress.schedule and key in current and key not in _MOVING and current[key] != value
    ]
    if differing and not args.override_opt_param_scheduler:
        raise UserError(
            f"the learning-rate schedule of {args.load} differs from the flags' ({'; '.join(differing)}; "
            "steps in samples); pass the first run's --lr, --min-lr, --train-iters and so on, or "
            "--override-opt-param-scheduler to continue under the new schedule"
        )
