"""A stub of ``torchair``, torch_npu's graph mode: MindSpeed registers converters with it on import.

No test runs a graph, so every attribute exists and does nothing.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any


class _Anything:
    """Stands for a name, a type or a decorator."""

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], FunctionType) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Module(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def register() -> None:
    """Make ``import torchair`` and ``from torchair.ge import ...`` work."""
    for name in ("torchair", "torchair.ge", "torchair._ge_concrete_graph", "torchair.configs"):
        sys.modules.setdefault(name, _Module(name))
