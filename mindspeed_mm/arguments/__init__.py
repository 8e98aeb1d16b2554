"""What a run is told: launcher flags, and the JSON and YAML files they name. Imports no torch.

A name is imported from here when it is first used, so that ``--help`` does not wait for the typed models.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ACCEPTED_WITHOUT_EFFECT": "parser",
    "BatchPlan": "rules",
    "DataConfig": "data_config",
    "FSDPConfig": "fsdp_config",
    "ModelConfig": "model_config",
    "Recipe": "recipe",
    "ToolsConfig": "tools_config",
    "TrainingArgs": "flags",
    "check_data_files": "recipe",
    "check_flags": "rules",
    "check_geometry": "rules",
    "check_parallel": "rules",
    "check_sharding": "rules",
    "check_weights": "recipe",
    "describe_ignored": "parser",
    "load_recipe": "recipe",
    "parse_args": "parser",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
