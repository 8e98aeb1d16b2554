"""Loading torch_npu, its settings and MindSpeed's adaptor, in the required order, once an NPU is requested."""

from __future__ import annotations

import torch

from mindspeed_mm.backend import has_torch_npu
from mindspeed_mm.backend.mindspeed import adapt_megatron
from mindspeed_mm.errors import UserError


def why_unusable() -> str | None:
    """The reason why no NPU is usable here, with the remedy; None if one is. Imports torch_npu.

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
    """Apply torch_npu's settings and MindSpeed's adaptor; to be called before megatron is imported. Idempotent."""
    # Parameters are views of FSDP2's flat storage, which the NPU's private formats do not support.
    torch.npu.config.allow_internal_format = False
    # Use CANN's precompiled operators: packed batches change shape every step, and each shape would compile anew.
    torch.npu.set_compile_mode(jit_compile=False)
    adapt_megatron()
