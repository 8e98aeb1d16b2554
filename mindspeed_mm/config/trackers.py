"""Which experiment trackers a run reports to (``--report-to``), and whether their packages are there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from mindspeed_mm.config.flags import TrainingArgs, option_name
from mindspeed_mm.config.schema import split_words
from mindspeed_mm.errors import UserError

TRACKERS = {
    "tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab", "mlflow": "mlflow-skinny",
    "trackio": "trackio",
}
"""Name of a tracker, and of the module it is imported from -> what pip installs."""
_NONE = "none"
_OF_WANDB = ("wandb_project", "wandb_exp_name", "wandb_save_dir")


def trackers_of(args: TrainingArgs) -> tuple[str, ...]:
    """Names of the run's trackers.

    Without ``--report-to``: TensorBoard, if ``--save`` or ``--tensorboard-dir`` says where to write and the package is
    installed; and W&B if ``--wandb-project`` is given, as in Megatron.
    """
    if args.report_to is not None:
        return tuple(name for name in split_words(args.report_to) if name != _NONE)
    names = []
    if tensorboard_directory(args) is not None and (is_installed("tensorboard") or args.tensorboard_dir is not None):
        names.append("tensorboard")
    if args.wandb_project is not None:
        names.append("wandb")
    return tuple(names)


def tensorboard_directory(args: TrainingArgs) -> Path | None:
    """Where event files go: ``--tensorboard-dir``, else ``tensorboard`` in ``--save``; None without both."""
    if args.tensorboard_dir is not None:
        return Path(args.tensorboard_dir)
    return None if args.save is None else Path(args.save) / "tensorboard"


def is_installed(name: str) -> bool:
    """Whether a tracker's module can be found. A directory of its name, as W&B makes them, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def check_tracker_flags(args: TrainingArgs) -> None:
    """Rules among the flags of trackers.

    Raises:
        UserError: naming the flag and what to do.
    """
    words = split_words(args.report_to)
    for word in words:
        if word not in TRACKERS and word != _NONE:
            raise UserError(f"--report-to {word} is unknown; choose from {', '.join(TRACKERS)}, or {_NONE}")
    if args.report_to is not None and not words:
        raise UserError(f"--report-to is empty; choose from {', '.join(TRACKERS)}, or {_NONE}")
    if _NONE in words and len(words) > 1:
        raise UserError(f"--report-to {args.report_to}: {_NONE} excludes the others; keep one")
    names = trackers_of(args)
    if "tensorboard" in words and tensorboard_directory(args) is None:
        raise UserError("--report-to tensorboard has nowhere to write; add --tensorboard-dir DIR, or --save DIR")
    if args.tensorboard_dir is not None and "tensorboard" not in names:
        raise UserError(f"--tensorboard-dir {args.tensorboard_dir} has no effect with --report-to {args.report_to}; "
                        "add tensorboard to that, or leave it out")
    for name in _OF_WANDB:
        if getattr(args, name) is not None and "wandb" not in names:
            raise UserError(f"{option_name(name)} {getattr(args, name)} has no effect without --report-to wandb; add "
                            "that, or leave it out")
    for name in ("project_name", "run_name"):
        if getattr(args, name) is not None and not {*names} - {"tensorboard"}:
            raise UserError(f"{option_name(name)} {getattr(args, name)} has no effect without a tracker that has such "
                            "names, which TensorBoard has not; add --report-to, for example wandb, or leave it out")


def check_tracker_packages(args: TrainingArgs) -> str | None:
    """Check that the trackers that were asked for are installed.

    Returns:
        A line if TensorBoard, which nobody asked for, is not.

    Raises:
        UserError: naming the tracker and pip's command.
    """
    for name in trackers_of(args):
        if not is_installed(name):
            flag = f"--report-to {args.report_to}" if args.report_to is not None else (
                f"--wandb-project {args.wandb_project}" if name == "wandb"
                else f"--tensorboard-dir {args.tensorboard_dir}"
            )
            raise UserError(f"{flag}: the package {name} is not installed; pip install {TRACKERS[name]}, or leave it "
                            "out")
    if args.report_to is None and args.save is not None and not is_installed("tensorboard"):
        return "tensorboard is not installed, so that there will be no event files; pip install tensorboard"
    return None


def wandb_directory(args: TrainingArgs) -> str | None:
    """Directory in which W&B makes its own; None for what WANDB_DIR says, or W&B's default."""
    if args.wandb_save_dir is not None:
        return args.wandb_save_dir
    return None if os.environ.get("WANDB_DIR") else args.save
