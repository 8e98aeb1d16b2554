"""What is installed for a device, found out without importing it."""

from __future__ import annotations

import importlib.util


def has_torch_npu() -> bool:
    """Whether torch_npu is installed, which it is on machines with NPUs."""
    return importlib.util.find_spec("torch_npu") is not None
