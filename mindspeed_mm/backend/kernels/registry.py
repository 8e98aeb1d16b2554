"""The kernels that each device has, chosen by name when the model is built.

Modules of Triton kernels are imported where :func:`use_triton` has found that they run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F

from mindspeed_mm.backend.kernels import (
    attention,
    cross_entropy,
    elementwise,
    experts,
    npu,
    permutation,
)
from mindspeed_mm.backend.kernels.compiled import compiled as torch_compiled
from mindspeed_mm.errors import UserError

logger = logging.getLogger(__name__)
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
    ``npu_fusion_attention``, with ``flash_attention_2`` as an alias. That is the spelling in the recipe's files, where
    it means exact attention over packed sequences: without it, the device's fastest is selected and logged.

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
    best = next(kernel for kernel in ("flash_attention_2", "varlen", "math", "sdpa") if kernel in table)
    if name == "flash_attention_2" and name not in table:
        logger.info("attn_implementation flash_attention_2: this %s has no such kernel; %s computes the same attention",
                    device, best)
        name = best
    return _select("--mm-model: attn_implementation", name or best, table, device=device)


@functools.cache
def use_triton(device: str) -> bool:
    """Whether Triton's kernels can be used: on a CUDA GPU where a small one runs and is right.

    Triton comes with torch's CUDA builds for Linux; it needs a C compiler at run time, and a GPU of compute capability
    8.0 or later for bf16.
    """
    if device != "cuda" or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    from mindspeed_mm.backend.kernels import triton_moe

    try:
        rows = torch.arange(8.0, device="cuda").view(4, 2)
        sums = triton_moe.sum_rows(rows, torch.tensor([[0, 3], [1, 2]], device="cuda"), None).tolist()
    except Exception as error:  # no compiler, or a Triton that does not know the GPU
        logger.warning("Triton does not run on this GPU (%s); its kernels are replaced by torch's", error)
        return False
    if sums != [[6.0, 8.0], [6.0, 8.0]]:
        logger.warning("Triton is wrong on this GPU: %s; its kernels are replaced by torch's", sums)
        return False
    return True


def split_kernel(*, triton: bool) -> elementwise.SplitKernel | None:
    """Split of the joint projection, head norms and rotary embedding in one; None where separate kernels do it."""
    if not triton:
        return None
    from mindspeed_mm.backend.kernels.triton_rotary import norm_rotary_split

    return norm_rotary_split


def router_kernel(*, triton: bool) -> elementwise.RouterKernel | None:
    """Softmax, top-k and renormalisation in one; None where torch's operators do it."""
    if not triton:
        return None
    from mindspeed_mm.backend.kernels.triton_router import top_k_softmax

    return top_k_softmax


def cross_entropy_kernel(*, triton: bool) -> cross_entropy.CrossEntropyKernel:
    """Cross-entropy of the loss head; ``triton``: see :func:`use_triton`."""
    if not triton:
        return cross_entropy.torch_cross_entropy
    from mindspeed_mm.backend.kernels.triton_cross_entropy import fused_cross_entropy

    return fused_cross_entropy


def rms_norm_kernel(*, device: str, compiled: bool = False, triton: bool = False) -> elementwise.RMSNormKernel:
    """The device's RMSNorm; with ``compiled`` the one that torch.compile generates; ``triton``: :func:`use_triton`."""
    if triton:
        from mindspeed_mm.backend.kernels.triton_rms_norm import rms_norm

        return rms_norm
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
    *, fused: bool, hidden_size: int, intermediate_size: int, device: str, dtype: torch.dtype, triton: bool = False
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
        triton: whether to use Triton kernels; see :func:`use_triton`.
    """
    if not fused:
        return "reference"
    if device == "npu":
        return "npu_grouped_matmul"
    if device == "cpu" and dtype == torch.bfloat16:
        return "padded_bucket"
    aligned = hidden_size % 8 == 0 and intermediate_size % 8 == 0
    if not aligned or not hasattr(F, "grouped_mm"):
        return "reference"
    return "triton_grouped_mm" if triton and dtype == torch.bfloat16 else "grouped_mm"


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
        if use_triton(device) and hasattr(F, "grouped_mm"):
            from mindspeed_mm.backend.kernels.triton_experts import weighted_experts

            table["triton_grouped_mm"] = weighted_experts
        if hasattr(F, "grouped_mm"):
            table["grouped_mm"] = functools.partial(experts.grouped_experts, swiglu=swiglu)
        if device == "cpu":
            table["padded_bucket"] = functools.partial(experts.padded_bucket_experts, swiglu=swiglu)
    return _select("expert kernel", name, table, device=device)


def token_permuter(default: permutation.TokenPermuter, *, fused: bool, device: str) -> permutation.TokenPermuter:
    """The device's fused permutation if ``fused`` and it has one, else ``default``."""
    return npu.NpuTokenPermuter(default) if fused and device == "npu" else default


def combine_kernel(*, device: str, triton: bool = False) -> permutation.CombineKernel:
    """The device's fastest weighted sum of permuted tokens; ``triton``: see :func:`use_triton`."""
    if triton:
        from mindspeed_mm.backend.kernels.triton_moe import sum_rows

        return sum_rows
    return permutation.embedding_bag_combine if device in ("cpu", "cuda") else permutation.gather_combine


def combine_backward_kernel(*, triton: bool) -> permutation.CombineBackwardKernel | None:
    """The gradients of a weighted sum in one; None where torch's operators compute them."""
    if not triton:
        return None
    from mindspeed_mm.backend.kernels.triton_moe import sum_rows_backward

    return sum_rows_backward
