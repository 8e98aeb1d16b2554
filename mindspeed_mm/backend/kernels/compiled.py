"""Small operations by torch.compile, where a model asks for it: each becomes one pass over memory.

Compiled once for all numbers of tokens, when they are first called. torch's compiler is loaded only then.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.backend.kernels import by_hand
from mindspeed_mm.errors import UserError

VARIANTS = 64


class Swiglu(NamedTuple):
    """SwiGLU for kernels that have a backward pass of their own; neither has autograd.

    Attributes:
        forward: see :func:`mindspeed_mm.backend.kernels.by_hand.swiglu`.
        again: see :func:`mindspeed_mm.backend.kernels.by_hand.swiglu_again`.
    """

    forward: Callable[[Tensor], Tensor]
    again: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


BY_HAND = Swiglu(by_hand.swiglu, by_hand.swiglu_again)


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


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_again(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    share = gate.sigmoid()
    active = gate * share
    grad_gate = grad * up * (share + active * (1.0 - share))
    return (active * up).to(gate_up.dtype), torch.cat((grad_gate, grad * active), dim=-1).to(gate_up.dtype)


def compiled_swiglu() -> Swiglu:
    """SwiGLU in one pass each way."""
    return Swiglu(compiled(_swiglu), compiled(_swiglu_again))
