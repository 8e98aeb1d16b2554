"""Importing this lets programs written for CUDA run on the NPU: ``torch.cuda`` answers as ``torch.npu``, devices called
cuda are npu, nccl is hccl, ``torch.profiler.profile`` is torch_npu's, and nothing is scripted. As torch_npu's module of
this name, as far as MindSpeed, megatron-core and this project can notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

import torch_npu.npu
import torch_npu.profiler

# Before any of them is wrapped, torch must have remembered which functions ``with torch.device(...)`` concerns, or a
# model under it would be built on the host. torch_npu does this too.
_device_constructors()

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "normal",
    "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros",
    "zeros_like", "load", "get_device_module",
)  # fmt: skip
_TENSOR = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "to", "pin_memory")


def _npu(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("cuda", "npu")
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("npu") if value.index is None else torch.device("npu", value.index)
    return value


def _translated(function: Callable, word: Callable[[Any], Any] = _npu) -> Callable:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        named = {name: word(value) if name in ("device", "device_type", "map_location", "backend") else value
                 for name, value in options.items()}  # fmt: skip
        return function(*map(word, arguments), **named)

    return call


def _hccl(value: Any) -> Any:
    return value.replace("nccl", "hccl") if isinstance(value, str) else value


def _script(function: Any, *_: Any, **__: Any) -> Any:
    return function


for _name in dir(torch_npu.npu):
    if not _name.startswith("_"):
        setattr(torch.cuda, _name, getattr(torch_npu.npu, _name))
for _owner, _names in ((torch, _FACTORIES), (torch.Tensor, _TENSOR), (torch.nn.Module, ("to", "to_empty"))):
    for _name in _names:
        setattr(_owner, _name, _translated(getattr(_owner, _name)))
torch.Tensor.cuda = torch.Tensor.npu
torch.nn.Module.cuda = torch.nn.Module.npu
torch.profiler.profile = torch_npu.profiler.profile
torch.distributed.init_process_group = _translated(torch.distributed.init_process_group, _hccl)
torch.distributed.is_nccl_available = torch.distributed.is_hccl_available
torch.distributed.Backend.default_device_backend_map.pop("cuda", None)
torch.jit.script = _script
torch.jit.script_method = _script
