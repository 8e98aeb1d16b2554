"""What FSDP2 of torch 2.7 must be told before it runs on a CPU with gloo; later versions see to it themselves."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def mend_fsdp() -> None:
    """Make gradients averages and HSDP possible. Changes nothing in later versions; calling it again is harmless."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    original = getattr(collectives, "_get_gradient_divide_factors", None)
    if original is None or list(inspect.signature(original).parameters) != [
        "reduce_scatter_group", "all_reduce_group", "reduce_dtype", "device_type"
    ]:
        return
    collectives._get_gradient_divide_factors = _add_then_divide
    torch.cpu.Stream.record_event = _record_event


def _add_then_divide(
    reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: Any, device_type: str = ""
) -> tuple[float, float]:
    """(divisor before the sum, divisor after it).

    The original asks for averages in fp32 and bf16. gloo has none: its reduce-scatter adds instead, without a word, and
    its all-reduce raises.
    """
    size = reduce_scatter_group.size() * (1 if all_reduce_group is None else all_reduce_group.size())
    return 1.0, float(size)


def _record_event(stream: torch.cpu.Stream) -> torch.cpu.Event:
    """An event, on which waiting does nothing. The original's is None, and HSDP's all-reduce asserts that it is not."""
    return torch.cpu.Event()
