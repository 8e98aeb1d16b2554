"""MindSpeed's adaptor: what it may change in megatron-core, on an NPU, where MindSpeed is installed."""

from __future__ import annotations

import importlib.util
import sys

from mindspeed_mm.errors import UserError


def adapt_megatron() -> None:
    """Import MindSpeed's adaptor, where MindSpeed is installed.

    The adaptor parses sys.argv by itself and patches by what it finds there, so it is shown none of the recipe's flags:
    told of FSDP2 it would patch megatron.training, which megatron-core's wheel lacks.

    Raises:
        UserError: if megatron was imported earlier: the adaptor's patches would come too late for it.
    """
    if "mindspeed.megatron_adaptor" in sys.modules or importlib.util.find_spec("mindspeed") is None:
        return
    if "megatron" in sys.modules:
        raise UserError("megatron was imported before the device was chosen; MindSpeed's adaptor must come first")
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        import mindspeed.megatron_adaptor  # noqa: F401
    finally:
        sys.argv = arguments
