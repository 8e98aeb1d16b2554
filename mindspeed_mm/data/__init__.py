"""Data: conversations, images and videos from files to packed micro-batches.

Names are imported on first use, since the checks of ``validate_data`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Sample": "collator",
    "collate": "collator",
    "ChatDataset": "dataset",
    "build_datasets": "dataset",
    "BatchLoader": "loader",
    "TrainLoader": "loader",
    "build_eval_loader": "loader",
    "build_train_loader": "loader",
    "validate_data": "validate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
