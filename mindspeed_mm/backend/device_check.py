"""Whether the device that a run asks for is here: asked before any process is started, without torch where possible."""

from __future__ import annotations

from mindspeed_mm.backend import has_torch_npu


def check_device(name: str, *, processes: int) -> None:
    """Check that this machine's device can serve a run. The host can, and is not looked at: that takes no torch.

    Args:
        name: what ``--device`` says.
        processes: how many are to run on this machine.

    Raises:
        UserError: see :func:`mindspeed_mm.backend.device.find_device`.
    """
    if name == "cpu" or (name == "auto" and not has_torch_npu()):
        return
    from mindspeed_mm.backend.device import find_device

    find_device(name, processes=processes)
