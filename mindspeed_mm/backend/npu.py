"""Ascend NPUs: torch_npu, its settings, and MindSpeed's adaptor, in the order in which they must be loaded.

Nothing here imports torch_npu before an NPU is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch

from mindspeed_mm.backend import has_torch_npu
from mindspeed_mm.backend.accelerator import Accelerator
from mindspeed_mm.backend.mindspeed import adapt_megatron
from mindspeed_mm.backend.profiling import NpuProfiler, Profiler
from mindspeed_mm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Npu(Accelerator):
    """An NPU, which torch_npu gives the module ``torch.npu``."""

    communication: ClassVar[str] = "hccl"
    deterministic_variables: ClassVar[Mapping[str, str]] = {
        "HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"
    }

    def profiler(self) -> Profiler:
        """torch_npu's profiler, which takes the place of torch's."""
        return NpuProfiler()


def why_unusable() -> str | None:
    """What keeps this process from using an NPU, and the remedy; None if nothing does. Imports torch_npu.

    Raises:
        UserError: if torch_npu is installed, but cannot be loaded.
    """
    if not has_torch_npu():
        return "torch_npu is not installed; bash scripts/install.sh on the machine with the NPUs"
    try:
        import torch_npu  # noqa: F401  registers torch.npu
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"torch_npu cannot be loaded ({str(error).strip().splitlines()[0]}); source CANN's set_env.sh (step 1 of "
            "the guide), or choose another device with --device"
        ) from error
    if not torch.npu.is_available():
        return "the driver shows none; see what npu-smi info says, and whether ASCEND_RT_VISIBLE_DEVICES hides them"
    return None


def prepare() -> None:
    """Settings of every NPU process, then MindSpeed's adaptor. Calling it again is harmless.

    To be called before megatron is imported.
    """
    # Parameters are views of FSDP2's flat storage, which the NPU's private formats do not allow.
    torch.npu.config.allow_internal_format = False
    # Operators come compiled with CANN; compiling for each of the shapes of packed batches would never end.
    torch.npu.set_compile_mode(jit_compile=False)
    adapt_megatron()
