"""What a run is told: launcher flags, and the JSON and YAML files they name. Imports no torch.

A name is imported from here when it is first used, so that ``--help`` does not wait for the typed models.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ACCEPTED_WITHOUT_EFFECT": "command_line",
    "BatchPlan": "checks",
    "DataConfig": "data_config",
    "FSDPConfig": "fsdp_config",
    "ModelOptions": "model_options",
    "JobConfig": "job",
    "ToolsConfig": "tools_config",
    "TrainingArgs": "flags",
    "check_data_files": "job",
    "check_flags": "checks",
    "check_model_config": "checks",
    "check_parallel": "checks",
    "check_sharding": "checks",
    "check_weights": "job",
    "describe_ignored": "command_line",
    "load_job_config": "job",
    "parse_args": "command_line",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
