"""Implementations of the model's heavy operations, each chosen once, by name, when the model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from mindspeed_mm.errors import UserError

Kernel = TypeVar("Kernel", bound=Callable)


def pick(kind: str, name: str, table: Mapping[str, Kernel], *, device: str) -> Kernel:
    """Look up ``name`` among the implementations of ``kind`` that ``device`` has.

    Raises:
        UserError: naming what is available. Nothing falls back silently.
    """
    if name in table:
        return table[name]
    raise UserError(f"{kind} {name!r} is not available on {device}; choose one of {', '.join(sorted(table))}")
