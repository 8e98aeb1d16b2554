"""A simulated torch_npu: a device ``npu`` on a machine without one, with torch_npu's operators.

With the parent directory on PYTHONPATH, ``import torch_npu`` finds it; ``torch`` then has a device ``npu`` with memory,
random generators, streams and the collective library ``hccl`` (gloo underneath). The first import compiles
two C++ files (about a minute with g++; kept in the temporary directory, or in SIMULATED_NPU_CACHE).

    PYTHONPATH=tests/helpers/simulated_npu python -c "import torch, torch_npu; print(torch.ones(2, device='npu'))"

Tensors are in host memory and torch's CPU kernels compute, so results equal the CPU's. But tensors of different devices
do not mix, generators of another device are refused, and the operators (``torch_npu._operators``) refuse the arguments
that the real ones' documentation excludes.

Environment:
    SIMULATED_NPU_COUNT: devices of this machine (8).
    SIMULATED_NPU_VERSION: torch_npu version whose operator signatures are registered (2.7.1, or another key of
        ``signatures.yaml``).
    SIMULATED_NPU_CACHE: directory of the compiled device.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torch  # noqa: E402
import torch.distributed  # noqa: E402
import torch.utils.checkpoint  # noqa: E402

from torch_npu import _build  # noqa: E402

_C = _build.load()

import torch_npu.npu  # noqa: E402
from torch_npu import _graph_mode  # noqa: E402
from torch_npu._operators import register  # noqa: E402

__version__ = os.environ.get("SIMULATED_NPU_VERSION", "2.7.1")


_gloo_groups: list[Any] = []  # never destroyed: torch 2.7 cannot destroy one inside another, see shutdown_distributed


def _create_hccl(options: Any, group_options: Any) -> Any:
    gloo = torch.distributed.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, options.timeout
    )
    _gloo_groups.append(gloo)
    return _C.hccl(gloo, options.group_rank, options.group_size)


def _register_device() -> None:
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", torch_npu.npu)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    torch.utils.checkpoint.DefaultDeviceType.set_device_type("npu")
    torch.distributed.Backend.register_backend("hccl", _create_hccl, extended_api=True, devices=["npu"])
    torch.distributed.is_hccl_available = lambda: True


def _autoload() -> None:
    """torch's entry point for devices; importing this module did all the work."""


_register_device()
_graph_mode.register()
for _name in register(__version__):
    globals()[_name] = getattr(torch.ops.npu, _name)
