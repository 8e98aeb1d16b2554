"""Preflight check of the device, before any rank starts, without importing torch where possible.

``python -m mindspeed_mm.backend.device_check npu|cuda|cpu|auto`` checks whether this machine has one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mindspeed_mm.backend import has_torch_npu
from mindspeed_mm.errors import UserError, report_errors

# of NVIDIA's driver, of that under WSL, and of AMD's, whose devices torch calls cuda too
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def needs_torch(name: str) -> bool:
    """Whether only torch can tell which device ``--device name`` selects on this machine."""
    if name == "auto":
        return has_torch_npu() or any(path.exists() for path in _GPU_FILES)
    return name != "cpu"


def check_device(name: str, *, local_ranks: int) -> None:
    """Check that this machine has the devices that the run needs. The CPU needs no torch.

    Args:
        name: the value of ``--device``.
        local_ranks: ranks on this machine.

    Raises:
        UserError: if there are more ranks than accelerators, or far more than CPU cores; and see
            :func:`mindspeed_mm.backend.device.find_device`.
    """
    if needs_torch(name):
        from mindspeed_mm.backend.device import find_device

        if find_device(name, local_ranks=local_ranks) != "cpu":
            return
    check_cpu_ranks(local_ranks)


def check_cpu_ranks(local_ranks: int, *, cores: int | None = None) -> None:
    """Check that the ranks that compute on this machine's CPU are not far more than its cores.

    Raises:
        UserError: naming both numbers.
    """
    cores = cores or len(os.sched_getaffinity(0))
    most = max(16, 4 * cores)
    if local_ranks > most:
        raise UserError(
            f"{local_ranks} ranks on this machine are too many for its {cores} CPU cores; start at most {most} "
            "(--nproc_per_node, NPUS_PER_NODE in the launcher)"
        )


if __name__ == "__main__":
    sys.exit(report_errors(lambda: check_device(sys.argv[1], local_ranks=1)))
