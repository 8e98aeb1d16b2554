"""Preflight check of the device, before any rank starts, without importing torch where possible."""

from __future__ import annotations

from mindspeed_mm.backend import has_torch_npu


def check_device(name: str, *, local_ranks: int) -> None:
    """Check that this machine has the devices that the run needs. The CPU needs no check and no torch.

    Args:
        name: the value of ``--device``.
        local_ranks: ranks on this machine.

    Raises:
        UserError: see :func:`mindspeed_mm.backend.device.find_device`.
    """
    if name == "cpu" or (name == "auto" and not has_torch_npu()):
        return
    from mindspeed_mm.backend.device import find_device

    find_device(name, local_ranks=local_ranks)
