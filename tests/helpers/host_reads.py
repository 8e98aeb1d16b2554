"""Finds host-device synchronisations, on a CPU too: every place where the host reads a tensor's values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
READING_METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
# operators whose result's shape or value the host needs
READING_OPERATORS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "argwhere",
    "masked_select",
    "equal",
    "allclose",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}


def _place() -> str:
    """``path:function`` of the innermost frame in this project, except those of ``DeferredHostRead``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_deferred_read = path == ROOT / "mindspeed_mm/backend/transfer.py"
        inside = any(path.is_relative_to(ROOT / part) for part in ("mindspeed_mm", "tests/ut"))
        if inside and not is_deferred_read:
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the project"


def _reads(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if name in READING_OPERATORS:
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if _reads(name, args, kwargs or {}):
            self.found.append((name, _place()))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING_METHODS:
            self.found.append((name, _place()))
        return func(*args, **(kwargs or {}))


class HostReads:
    """Context that records the host's reads of tensors in this thread and in its backward passes.

    Attributes:
        found: (operator or method, ``path:function``) of each. A method and the operator it calls are one entry each.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._modes = (_Methods(self.found), _Operators(self.found))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
