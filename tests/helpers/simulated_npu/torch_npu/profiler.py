"""torch_npu's profiler interface over torch's profiler; ``tests/ut/tools/test_npu_profiler.py`` compares the signatures
with a wheel.

Options that the real one resets with a warning are errors here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch.profiler


class ProfilerActivity(Enum):
    CPU = 0
    NPU = 1


class ProfilerLevel:
    Level0 = "Level0"
    Level1 = "Level1"
    Level2 = "Level2"
    Level_none = "Level_none"


class AiCMetrics:
    PipeUtilization = "ACL_AICORE_PIPE_UTILIZATION"
    ArithmeticUtilization = "ACL_AICORE_ARITHMETIC_UTILIZATION"
    Memory = "ACL_AICORE_MEMORY_BANDWIDTH"
    MemoryL0 = "ACL_AICORE_L0B_AND_WIDTH"
    MemoryUB = "ACL_AICORE_MEMORY_UB"
    ResourceConflictRatio = "ACL_AICORE_RESOURCE_CONFLICT_RATIO"
    L2Cache = "ACL_AICORE_L2_CACHE"
    MemoryAccess = "ACL_AICORE_MEMORY_ACCESS"
    AiCoreNone = "ACL_AICORE_NONE"


class _ExperimentalConfig:
    def __init__(
        self,
        profiler_level: str = ProfilerLevel.Level0,
        aic_metrics: str = AiCMetrics.AiCoreNone,
        l2_cache: bool = False,
        msprof_tx: bool = False,
        mstx: bool = False,
        data_simplification: bool = True,
        record_op_args: bool = False,
        op_attr: bool = False,
        gc_detect_threshold: float | None = None,
        export_type: str | list | None = None,
        host_sys: list | None = None,
        mstx_domain_include: list | None = None,
        mstx_domain_exclude: list | None = None,
        sys_io: bool = False,
        sys_interconnection: bool = False,
    ) -> None:
        if profiler_level not in vars(ProfilerLevel).values() or aic_metrics not in vars(AiCMetrics).values():
            raise ValueError(f"unknown profiler_level {profiler_level!r} or aic_metrics {aic_metrics!r}")
        if profiler_level in (ProfilerLevel.Level0, ProfilerLevel.Level_none) and aic_metrics != AiCMetrics.AiCoreNone:
            raise ValueError("aic_metrics need level1 or level2")
        if not isinstance(data_simplification, bool):
            raise ValueError("data_simplification must be of bool type")
        self.chosen = {"level": profiler_level, "metrics": aic_metrics, "data_simplification": data_simplification}


def tensorboard_trace_handler(
    dir_name: str | None = None, worker_name: str | None = None, analyse_flag: bool = True, async_mode: bool = False
) -> Callable[[profile], None]:
    if dir_name is not None and not Path(dir_name).is_dir():
        raise ValueError(f"{dir_name} is not a directory")

    def write(recorder: profile) -> None:
        name = f"{worker_name}_{os.getpid()}_{time.strftime('%Y%m%d%H%M%S')}000_ascend_pt"
        output = Path(dir_name or ".", name, "ASCEND_PROFILER_OUTPUT")
        output.mkdir(parents=True)
        recorder._inner.export_chrome_trace(str(output / "trace_view.json"))

    return write


class profile:  # noqa: N801  torch_npu's name
    recorders: list[profile] = []

    def __init__(
        self,
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        schedule: Callable[[int], Any] | None = None,
        on_trace_ready: Callable[..., Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
        experimental_config: _ExperimentalConfig | None = None,
        use_cuda: bool | None = None,
    ) -> None:
        if not all(isinstance(activity, ProfilerActivity) for activity in activities or ()):
            raise TypeError("activities are torch_npu's own ProfilerActivity")
        self.activities = set(activities or ProfilerActivity)
        self.experimental_config = experimental_config
        self.on_trace_ready = on_trace_ready
        self._inner = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=record_shapes,
            profile_memory=profile_memory, with_stack=with_stack,
        )  # fmt: skip
        profile.recorders.append(self)

    def start(self) -> None:
        self._inner.start()

    def stop(self) -> None:
        self._inner.stop()
        if self.on_trace_ready is not None:
            self.on_trace_ready(self)
