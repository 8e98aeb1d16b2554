"""Memory statistics of the simulated allocator, over all devices of this process."""

from __future__ import annotations

import pickle
from typing import Any

from torch_npu import _C

TOTAL_BYTES = 64 * 2**30


def memory_allocated(device: Any = None) -> int:
    return _C.allocated()


def max_memory_allocated(device: Any = None) -> int:
    return _C.peak()


def memory_reserved(device: Any = None) -> int:
    return _C.allocated()


def max_memory_reserved(device: Any = None) -> int:
    return _C.peak()


def reset_peak_memory_stats(device: Any = None) -> None:
    _C.reset_peak()


def empty_cache() -> None:
    pass


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return TOTAL_BYTES - _C.allocated(), TOTAL_BYTES


def memory_stats(device: Any = None) -> dict[str, int]:
    return {"allocated_bytes.all.current": _C.allocated(), "allocated_bytes.all.peak": _C.peak()}


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in memory_stats(device).items())


def _record_memory_history(
    enabled: str | None = "all", context: str | None = "all", stacks: str = "all", max_entries: int = 2**31 - 1,
    device: Any = None,
) -> None:
    pass


def _snapshot(device: Any = None) -> dict[str, Any]:
    return {"segments": [], "device_traces": [[]], "allocated": _C.allocated()}


def _dump_snapshot(filename: str = "dump_snapshot.pickle") -> None:
    with open(filename, "wb") as file:
        pickle.dump(_snapshot(), file)
