"""Checks of operators' arguments against their documentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Refused(RuntimeError):
    """The documentation excludes these arguments."""


def demand(holds: bool, message: str) -> None:
    """Raise :class:`Refused` unless ``holds``."""
    if not holds:
        raise Refused(message)


def demand_type(name: str, tensor: Tensor, types: Sequence[torch.dtype]) -> None:
    """Raise :class:`Refused` unless ``tensor`` has one of ``types``."""
    demand(tensor.dtype in types, f"{name} is {tensor.dtype}; supported are {', '.join(map(str, types))}")


def demand_same_type(**tensors: Tensor) -> None:
    """Raise :class:`Refused` unless all have the same type."""
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    demand(len(set(kinds.values())) == 1, f"types must be the same: {kinds}")
