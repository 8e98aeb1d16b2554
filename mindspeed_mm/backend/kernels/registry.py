"""The kernels that each device has, chosen by name when the model is built."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F

from mindspeed_mm.backend.kernels import attention, elementwise, experts, npu, permutation
from mindspeed_mm.backend.kernels.compiled import compiled as torch_compiled
from mindspeed_mm.errors import UserError

Kernel = TypeVar("Kernel", bound=Callable)


def _select(kind: str, name: str, table: Mapping[str, Kernel], *, device: str) -> Kernel:
    """Look up ``name`` among the kernels that ``device`` has; there is no silent fallback."""
    if name in table:
        return table[name]
    raise UserError(f"{kind} {name!r} is not available on {device}; choose one of {', '.join(sorted(table))}")


def attention_kernel(name: str | None, *, device: str) -> attention.AttentionKernel:
    """The attention kernel called ``name``; None selects the device's fastest.

    Every device has ``eager`` and ``sdpa``; a CPU ``math`` (``products`` is an alias); CUDA ``flash_attention_2`` where
    the flash-attn package is installed, and ``varlen`` where torch's own kernel for packed sequences works; an NPU
    ``npu_fusion_attention``, with ``flash_attention_2`` as an alias, which is the spelling in the recipe's files.

    Raises:
        UserError: if the device does not have the kernel.
    """
    table: dict[str, attention.AttentionKernel] = {
        "eager": attention.eager_attention, "sdpa": attention.sdpa_attention
    }
    if device == "cpu":
        table["math"] = table["products"] = attention.math_attention
    if device == "cuda" and attention.find_varlen(device) is not None:
        table["varlen"] = attention.varlen_attention
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        table["flash_attention_2"] = attention.flash_attention
    if device == "npu":
        table["npu_fusion_attention"] = table["flash_attention_2"] = npu.npu_fusion_attention
    if name is None:
        name = next(best for best in ("flash_attention_2", "varlen", "math", "sdpa") if best in table)
    return _select("attn_implementation", name, table, device=device)


def rms_norm_kernel(*, device: str, compiled: bool = False) -> elementwise.RMSNormKernel:
    """The device's RMSNorm; with ``compiled`` the one that torch.compile generates."""
    if compiled:
        return torch_compiled(elementwise.torch_rms_norm)
    if device == "cpu":  # torch has no fused one there
        return elementwise.autograd_rms_norm
    return npu.npu_rms_norm if device == "npu" else elementwise.torch_rms_norm


def rotary_kernel(*, device: str, compiled: bool = False) -> elementwise.RotaryKernel:
    """The device's rotary embedding; with ``compiled`` the one that torch.compile generates."""
    if compiled:
        return torch_compiled(elementwise.torch_rotary)
    return npu.npu_rotary if device == "npu" else elementwise.autograd_rotary


def swiglu_kernel(*, compiled: bool = False) -> elementwise.SwigluKernel:
    """SwiGLU on a CPU or GPU; with ``compiled`` the one that torch.compile generates, one pass each way."""
    if compiled:
        return elementwise.SwigluKernel(
            torch_compiled(elementwise.torch_swiglu), torch_compiled(elementwise.torch_swiglu_backward)
        )
    return elementwise.EAGER_SWIGLU


def expert_kernel_name(
    *, fused: bool, hidden_size: int, intermediate_size: int, device: str, dtype: torch.dtype
) -> str:
    """The expert kernel for a model: a grouped one if ``fused`` and available, else the ``reference`` loop.

    An NPU has ``npu_grouped_matmul``; other devices have torch's ``grouped_mm`` from 2.8, which requires weight rows
    aligned to 16 bytes, 8 bf16 values: published models qualify, tiny ones may not. A CPU in bf16 has
    ``padded_bucket``, which is faster there than either (docs/performance.md).

    Args:
        fused: whether the user asks for a grouped kernel.
        hidden_size: H.
        intermediate_size: I.
        device: kind of device.
        dtype: compute type.
    """
    if not fused:
        return "reference"
    if device == "npu":
        return "npu_grouped_matmul"
    if device == "cpu" and dtype == torch.bfloat16:
        return "padded_bucket"
    aligned = hidden_size % 8 == 0 and intermediate_size % 8 == 0
    return "grouped_mm" if aligned and hasattr(F, "grouped_mm") else "reference"


def expert_kernel(name: str, *, device: str, compiled: bool = False) -> experts.ExpertKernel:
    """The expert kernel called ``name``; ``compiled`` selects torch.compile's SwiGLU where the kernel takes one.

    Raises:
        UserError: if the device or this version of torch does not have the kernel.
    """
    table: dict[str, experts.ExpertKernel] = {"reference": experts.reference_experts}
    if device == "npu":
        table["npu_grouped_matmul"] = npu.npu_grouped_experts
    else:
        swiglu = swiglu_kernel(compiled=compiled)
        if hasattr(F, "grouped_mm"):
            table["grouped_mm"] = functools.partial(experts.grouped_experts, swiglu=swiglu)
        if device == "cpu":
            table["padded_bucket"] = functools.partial(experts.padded_bucket_experts, swiglu=swiglu)
    return _select("expert kernel", name, table, device=device)


def token_permuter(default: permutation.TokenPermuter, *, fused: bool, device: str) -> permutation.TokenPermuter:
    """The device's fused permutation if ``fused`` and it has one, else ``default``."""
    return npu.NpuTokenPermuter(default) if fused and device == "npu" else default


def combine_kernel(*, device: str) -> permutation.CombineKernel:
    """The device's fastest weighted sum of permuted tokens."""
    return permutation.embedding_bag_combine if device in ("cpu", "cuda") else permutation.gather_combine
