"""torch.compile for small operations, where a model asks for it: each becomes one pass over memory.

Compiled once for all numbers of tokens, when they are first called. torch's compiler is loaded only then.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

import torch

from mindspeed_mm.errors import UserError

VARIANTS = 64


def check_compiler(*, device: str) -> None:
    """Before anything is compiled: whether it can be.

    Raises:
        UserError: on an NPU, and where there is no compiler for C++, which torch.compile calls on every device.
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
    """``function`` by torch.compile, for all sizes at once."""
    # one variant for each layout of its input, with and without gradients: with evaluation more than the usual eight
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)
