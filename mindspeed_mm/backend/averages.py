"""Averages of gradients on a collective library that can only add."""

from __future__ import annotations

import inspect
from typing import Any


def add_then_divide() -> None:
    """Let FSDP2 add gradients and divide the sums, instead of asking the collective library for averages.

    FSDP2 of torch 2.7 asks for averages in fp32 and bf16. gloo has none: its reduce-scatter adds instead, without a
    word, and its all-reduce raises. Later versions of torch see to it themselves and are left alone. Calling it again
    is harmless.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    original = getattr(collectives, "_get_gradient_divide_factors", None)
    if original is None or list(inspect.signature(original).parameters) != [
        "reduce_scatter_group", "all_reduce_group", "reduce_dtype", "device_type"
    ]:
        return

    def factors(
        reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: Any, device_type: str = ""
    ) -> tuple[float, float]:
        """(divisor before the sum, divisor after it)."""
        size = reduce_scatter_group.size() * (1 if all_reduce_group is None else all_reduce_group.size())
        return 1.0, float(size)

    collectives._get_gradient_divide_factors = factors
