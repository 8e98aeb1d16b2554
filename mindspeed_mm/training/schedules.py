"""Megatron's learning-rate and weight-decay schedule, with decay styles that it does not have."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

_ADDED = ("wsd_decay_steps", "lr_wsd_decay_style", "lr_decay_power", "lr_num_cycles")


class Schedule(OptimizerParamScheduler):
    """Megatron's schedule, and ``polynomial``, ``cosine-with-restarts`` and WSD's ``minus_sqrt``.

    Counted in samples, warm-up included. Only attributes that the decay style reads are set, and are in the state.

    Attributes:
        lr_decay_power: exponent of ``polynomial``.
        lr_num_cycles: cosine cycles of ``cosine-with-restarts``.
    """

    def __init__(
        self, *args: Any, lr_decay_power: float | None = None, lr_num_cycles: int | None = None, **options: Any
    ) -> None:
        self.lr_decay_power, self.lr_num_cycles = lr_decay_power, lr_num_cycles
        super().__init__(*args, **options)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate at the current sample, before a parameter group's factor."""
        style = self.lr_wsd_decay_style if self.lr_decay_style == "WSD" else self.lr_decay_style
        warming_up = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if warming_up or style not in ("polynomial", "cosine-with-restarts", "minus_sqrt"):
            return float(super().get_lr(param_group))
        first = self.lr_decay_steps - self.wsd_decay_steps if style == "minus_sqrt" else self.lr_warmup_steps
        progress = min(max(0.0, (self.num_steps - first) / (self.lr_decay_steps - first)), 1.0)
        if style == "polynomial":
            remaining = (1.0 - progress) ** self.lr_decay_power
        elif style == "minus_sqrt":
            remaining = 1.0 - math.sqrt(progress)
        else:  # the last cycle ends at the minimum instead of restarting
            phase = self.lr_num_cycles * progress % 1.0 if progress < 1.0 else 1.0
            remaining = 0.5 * (1.0 + math.cos(math.pi * phase))
        return float(self.min_lr + remaining * (self.max_lr - self.min_lr))

    def state_dict(self) -> dict[str, Any]:
        """Megatron's state, and the settings that belong to the decay style."""
        added = {name: getattr(self, name) for name in _ADDED}
        return {**super().state_dict(), **{name: value for name, value in added.items() if value is not None}}
