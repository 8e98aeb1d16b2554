"""What FSDP2 must be told of a collective library other than NCCL."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_OF_TORCH_2_7 = ["reduce_scatter_group", "all_reduce_group", "reduce_dtype", "device_type"]


def mend_fsdp(communication: str) -> None:
    """Let FSDP2 add gradients and divide the sums where ``communication`` has no averages; HSDP on the host under 2.7.

    FSDP2 asks for averages in fp32 and bf16. HCCL refuses them. gloo under torch 2.7 adds instead, without a word, and
    its all-reduce raises; later versions know gloo's limits. Calling it again is harmless.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    original = getattr(collectives, "_get_gradient_divide_factors", None)
    parameters = [] if original is None else list(inspect.signature(original).parameters)
    if parameters == _OF_TORCH_2_7 and communication != "nccl":
        collectives._get_gradient_divide_factors = _add_then_divide
        torch.cpu.Stream.record_event = _record_event
        group = _fsdp_param_group.FSDPParamGroup
        if communication == "gloo" and not hasattr(group.finalize_backward, "__wrapped__"):
            group.finalize_backward = _without_event(group.finalize_backward)
    elif "force_sum_reduction_for_comms" in parameters and communication == "hccl":
        collectives._get_gradient_divide_factors = _forcing_sums(original)


def _add_then_divide(
    reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: Any, device_type: str = ""
) -> tuple[float, float]:
    """(divisor before the sum, divisor after it)."""
    size = reduce_scatter_group.size() * (1 if all_reduce_group is None else all_reduce_group.size())
    return 1.0, float(size)


def _forcing_sums(original: Callable[..., Any]) -> Callable[..., Any]:
    """What ``FSDPModule.set_force_sum_reduction_for_comms`` asks of one module, for all of them."""

    @functools.wraps(original)
    def factors(*arguments: Any, **keywords: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **keywords)
        bound.arguments["force_sum_reduction_for_comms"] = True
        return original(*bound.args, **bound.kwargs)

    return factors


def _record_event(stream: torch.cpu.Stream) -> torch.cpu.Event:
    """An event, on which waiting does nothing. The original's is None, and HSDP's all-reduce asserts that it is not."""
    return torch.cpu.Event()


def _without_event(finalize: Callable[[Any], None]) -> Callable[[Any], None]:
    """What was gathered in vain is dropped at the end of backward; the original waits by asking for an accelerator."""

    @functools.wraps(finalize)
    def finalize_backward(group: Any) -> None:
        if group._all_gather_result is not None:
            group._all_gather_result = group._all_gather_result._replace(all_gather_event=None)
        finalize(group)

    return finalize_backward
