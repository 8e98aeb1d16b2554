"""What trackers and reports record of a run besides its metrics: configuration, code, data, hardware, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.config.flags import option_name
from mindspeed_mm.config.job import JobConfig

CONFIGURATION = ("flags", "data", "model", "fsdp2")
"""Names of the description's parts that are the job's configuration."""
_PACKAGES = ("torch", "torch_npu", "megatron-core", "mindspeed", "transformers", "tokenizers", "datasets", "numpy",
             "triton")
_GIT_SECONDS = 10.0
_IN_URL = re.compile(r"(?<=://)[^/\s@]*@|(?<=[?&])[^=&\s]*(?:token|key|signature|secret|password)[^=&\s]*=[^&\s]*",
                     re.IGNORECASE)


def describe_run(job: JobConfig, backend: Backend, *, world_size: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """The run as nested plain values. Environment variables are not among them, nor passwords and tokens in URLs.

    Args:
        job: flags and files.
        backend: the device.
        world_size: number of ranks.
        data: what is known of the data sets.
    """
    config = {
        "flags": {option_name(name)[2:]: value for name, value in job.args.model_dump(mode="json").items()},
        "data": job.data.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "fsdp2": job.fsdp.model_dump(mode="json"),
    }
    facts = {
        "data_summary": dict(data),
        "hardware": _hardware(backend, world_size),
        "packages": {"python": platform.python_version(), **_versions()},
    }
    git = git_revision(Path(__file__).resolve().parents[2])
    return without_secrets({**config, **facts, **({"git": git} if git else {})})


def git_revision(root: Path) -> dict[str, Any]:
    """Commit, branch, and whether tracked files have changed, of the repository at ``root``; empty without one."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, timeout=_GIT_SECONDS
        )
        return result.stdout.strip()

    try:
        if os.path.realpath(git("rev-parse", "--show-toplevel")) != os.path.realpath(root):
            return {}  # an installed package, inside of a repository that is not its own
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def without_secrets(value: Any) -> Any:
    """``value`` without user names, passwords and tokens in the URLs that it holds."""
    if isinstance(value, Mapping):
        return {str(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return _IN_URL.sub("", value) if isinstance(value, str) else value


def _hardware(backend: Backend, world_size: int) -> dict[str, Any]:
    return {
        "device": backend.name,
        **backend.describe(),
        "ranks": world_size,
        "ranks_per_machine": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "communication": backend.communication,
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
