"""Environment of processes with a simulated NPU, see ``tests/helpers/simulated_npu/torch_npu``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SIMULATED_NPU = Path(__file__).parent / "simulated_npu"
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None


def host_synchronisations() -> int:
    """Number of host-device synchronisations so far; always 0 on a real NPU, which does not count them."""
    import torch_npu

    return getattr(torch_npu._C, "host_waits", int)()


def npu_environment(*, version: str = "2.7.1", count: int = 8) -> dict[str, str]:
    """Environment of a process on a machine with ``count`` NPUs and torch_npu ``version``."""
    paths = [str(SIMULATED_NPU), str(SIMULATED_NPU.parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SIMULATED_NPU_VERSION": version,
        "SIMULATED_NPU_COUNT": str(count),
        "OMP_NUM_THREADS": "1",
    }
