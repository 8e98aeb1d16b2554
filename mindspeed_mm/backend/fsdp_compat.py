"""Patches of FSDP2 for collective libraries other than NCCL."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_TORCH_2_7_PARAMETERS = ["reduce_scatter_group", "all_reduce_group", "reduce_dtype", "device_type"]


def patch_fsdp(communication: str) -> None:
    """Make FSDP2 sum gradients and then divide if ``communication`` lacks averaging; fix what torch 2.7 lacks.

    FSDP2 averages fp32 and bf16 gradients in the collective. HCCL refuses that. gloo under torch 2.7 silently sums
    instead, and its all-reduce raises; later versions handle gloo. torch 2.7 refuses wrap units whose frozen parameters
    have another dtype than the trainable ones; later versions compare the trainable ones only. Idempotent.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    original = getattr(collectives, "_get_gradient_divide_factors", None)
    parameters = [] if original is None else list(inspect.signature(original).parameters)
    group = _fsdp_param_group.FSDPParamGroup
    if parameters == _TORCH_2_7_PARAMETERS and not hasattr(group._init_mp_dtypes, "__wrapped__"):
        group._init_mp_dtypes = _of_trainable(group._init_mp_dtypes)
    if parameters == _TORCH_2_7_PARAMETERS and communication != "nccl":
        collectives._get_gradient_divide_factors = _add_then_divide
        torch.cpu.Stream.record_event = _record_event
        if communication == "gloo" and not hasattr(group.finalize_backward, "__wrapped__"):
            group.finalize_backward = _without_event(group.finalize_backward)
    elif "force_sum_reduction_for_comms" in parameters and communication == "hccl":
        collectives._get_gradient_divide_factors = _forcing_sums(original)


def _of_trainable(init_dtypes: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check of a wrap unit's dtypes, which are those of its gradients, over its trainable parameters."""

    @functools.wraps(init_dtypes)
    def init_mp_dtypes(group: Any) -> None:
        every = group.fsdp_params
        trainable = [parameter for parameter in every if parameter.sharded_param.requires_grad]
        for parameter in every:
            parameter.init_dtype_attrs(group.mp_policy)
        try:
            group.fsdp_params = trainable or every
            init_dtypes(group)
        finally:
            group.fsdp_params = every

    return init_mp_dtypes


def _add_then_divide(
    reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: Any, device_type: str = ""
) -> tuple[float, float]:
    """(divisor before the sum, divisor after it)."""
    size = reduce_scatter_group.size() * (1 if all_reduce_group is None else all_reduce_group.size())
    return 1.0, float(size)


def _forcing_sums(original: Callable[..., Any]) -> Callable[..., Any]:
    """``FSDPModule.set_force_sum_reduction_for_comms`` for all modules."""

    @functools.wraps(original)
    def factors(*arguments: Any, **keywords: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **keywords)
        bound.arguments["force_sum_reduction_for_comms"] = True
        return original(*bound.args, **bound.kwargs)

    return factors


def _record_event(stream: torch.cpu.Stream) -> torch.cpu.Event:
    """A no-op event. The original returns None, which HSDP's all-reduce asserts against."""
    return torch.cpu.Event()


def _without_event(finalize: Callable[[Any], None]) -> Callable[[Any], None]:
    """Drop an unused all-gather's event: the original waits for it through torch.accelerator, which a CPU lacks."""

    @functools.wraps(finalize)
    def finalize_backward(group: Any) -> None:
        if group._all_gather_result is not None:
            group._all_gather_result = group._all_gather_result._replace(all_gather_event=None)
        finalize(group)

    return finalize_backward
