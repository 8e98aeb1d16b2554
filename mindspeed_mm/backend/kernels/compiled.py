"""torch.compile for small operations, on request: each becomes one pass over memory.

Compiled at the first call, for all token counts at once. torch's compiler is loaded only then.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

import torch

from mindspeed_mm.errors import UserError

RECOMPILE_LIMIT = 64


def check_compiler(*, device: str) -> None:
    """Check that torch.compile can run.

    Raises:
        UserError: on an NPU, or where there is no C++ compiler, which torch.compile needs on every device.
    """
    if device == "npu":
        raise UserError("--compile-small-operators: an NPU has fused operators for these already; leave it out")
    names = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        raise UserError(
            "--compile-small-operators: no g++ or clang++ on the PATH, and none named by CXX; install one, or leave "
            "the flag out"
        )


@functools.cache
def compiled(function: Callable) -> Callable:
    """``function`` by torch.compile, with dynamic shapes."""
    # one graph for each input layout, with and without gradients: with evaluation more than torch's default of 8
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)
