"""What every launch of a Triton kernel needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, whichever the tensors are on."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
