"""Which loss is minimised: what flags and model file say about it together."""

from __future__ import annotations

from typing import Literal

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.errors import UserError

LossMode = Literal["per_token", "per_sample", "square", "default"]

_MODES: dict[str, LossMode] = {
    "default": "default",
    "per_sample_loss": "per_sample",
    "per_token_loss": "per_token",
    "square_loss": "square",
}


def loss_mode(args: TrainingArgs, model: ModelOptions, *, file: str) -> LossMode:
    """Which mean of the token losses: a flag's, else ``loss_cfg.loss_type``, else ``default``.

    Args:
        args: the flags.
        model: the model file's content.
        file: its name, for messages.

    Raises:
        UserError: if both say so and differ.
    """
    by_flag: LossMode | None = None
    if args.calculate_per_token_loss:
        by_flag = "per_token"
    elif args.calculate_per_sample_loss:
        by_flag = "per_sample"
    loss_type = model.loss_cfg.loss_type
    if loss_type is None:
        return by_flag or "default"
    if by_flag not in (None, _MODES[loss_type]):
        raise UserError(
            f"{file}: loss_cfg.loss_type {loss_type} contradicts --calculate-{by_flag.replace('_', '-')}-loss; "
            "keep one of the two"
        )
    return _MODES[loss_type]


def router_aux_loss_coef(args: TrainingArgs, model: ModelOptions, *, file: str) -> float:
    """Share of the routers' load-balancing loss: the flag's, else the model file's, else 0.

    The value of the same name in the Hugging Face config is the one the model was trained with, and is not taken.

    Raises:
        UserError: if both say so and differ.
    """
    by_flag, by_file = args.moe_aux_loss_coeff, model.loss_cfg.router_aux_loss_coef
    if by_flag is not None and by_file is not None and by_flag != by_file:
        raise UserError(
            f"{file}: loss_cfg.router_aux_loss_coef {by_file} contradicts --moe-aux-loss-coeff {by_flag}; "
            "keep one of the two"
        )
    return next((value for value in (by_flag, by_file) if value is not None), 0.0)
