"""``--mm-tool``: profiling and memory snapshots. Steps are iterations as the log counts them, from 1."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from mindspeed_mm.config.schema import StrictModel, effective, no_effect, refused

DYNAMIC_FILE = "profiler_config.json"
Counters = Literal[
    "AiCoreNone", "PipeUtilization", "ArithmeticUtilization", "Memory", "MemoryL0", "MemoryUB", "ResourceConflictRatio",
    "L2Cache", "MemoryAccess",
]
"""Hardware counters by torch_npu's names."""

_NOT_TAKEN = "profiles are taken without it"
_RANKS = "ranks that write a file; [-1]: all"


def _check_steps(start: int, end: int) -> None:
    if end <= start:
        raise ValueError(f"end_step {end} must be greater than start_step {start}")


class StaticProfile(StrictModel):
    """Profile of the steps start_step up to, not including, end_step. Null leaves a choice to the device."""

    level: Literal["level_none", "level0", "level1", "level2"] | None = effective(
        None, "depth of an accelerator profile, where the device's profiler has levels"
    )
    with_stack: bool = effective(False, "record the Python call stack of each operator")
    with_memory: bool = effective(False, "record allocations")
    record_shapes: bool = effective(False, "record the shapes of operator inputs")
    with_cpu: bool = effective(True, "record host operators, not the device alone")
    save_path: str = effective("./profiling", "directory for the traces (Chrome trace format, one file per rank)")
    start_step: int = effective(10, "first step", ge=1)
    end_step: int = effective(11, "step before which profiling ends", ge=2)
    data_simplification: bool | None = effective(
        None, "drop intermediate files, where the device's profiler writes any"
    )
    aic_metrics_type: Counters | None = effective(
        None, "hardware counters to record, where the device's profiler has them; they need level1 or level2"
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> StaticProfile:
        _check_steps(self.start_step, self.end_step)
        return self


class DynamicProfile(StrictModel):
    """Profiling that is switched while training runs."""

    config_path: str = effective(
        "./", f"directory whose {DYNAMIC_FILE} is looked at before each step; it is written where there is none"
    )


class DynamicCounters(StrictModel):
    """``experimental_config`` of :class:`DynamicRequest`: choices of accelerators' profilers."""

    profiler_level: Literal["Level_none", "Level0", "Level1", "Level2"] | None = effective(
        None, "depth; null: as the profiler thinks best"
    )
    aic_metrics: Counters | None = effective(None, "hardware counters; null: none")
    data_simplification: bool | None = effective(None, "drop intermediate files; null: as the profiler thinks best")
    l2_cache: bool = refused(False, _NOT_TAKEN)
    op_attr: bool = refused(False, _NOT_TAKEN)
    record_op_args: bool = refused(False, _NOT_TAKEN)
    msprof_tx: bool = refused(False, _NOT_TAKEN)
    mstx: bool = refused(False, _NOT_TAKEN)
    gc_detect_threshold: float | None = refused(None, _NOT_TAKEN)
    export_type: Any = no_effect(None, "traces are written as text")


class DynamicRequest(StrictModel):
    """What ``profiler_config.json`` asks for; the fields have the names that torch_npu gives them."""

    is_valid: bool = effective(False, "profile once; becomes effective whenever the file is written anew")
    start_step: int = effective(-1, "first step; -1: the next one", ge=-1)
    active: int = effective(1, "number of steps", ge=1)
    prof_dir: str = effective("./profiling", "directory for the traces")
    activities: list[str] | None = effective(None, "without CPU among them the device alone is recorded; null: both")
    record_shapes: bool = effective(False, "record the shapes of operator inputs")
    profile_memory: bool = effective(False, "record allocations")
    with_stack: bool = effective(False, "record the Python call stack of each operator")
    is_rank: bool = effective(False, "write on the ranks of rank_list alone, not on all")
    rank_list: list[int] = effective([], "see is_rank")
    with_flops: bool = refused(False, _NOT_TAKEN)
    with_modules: bool = refused(False, _NOT_TAKEN)
    warmup: int = refused(0, "the first step that is recorded is start_step itself")
    analyse: bool = no_effect(False, "traces are always written so that they open")
    async_mode: bool = no_effect(False, "the next step waits until a trace is written")
    metadata: dict[str, Any] = no_effect({}, "traces hold no metadata")
    experimental_config: DynamicCounters = DynamicCounters()

    @model_validator(mode="after")
    def _names_ranks(self) -> DynamicRequest:
        if self.is_rank and not self.rank_list:
            raise ValueError("is_rank is true and rank_list is empty")
        return self


class ProfileConfig(StrictModel):
    """Profiler."""

    enable: bool = effective(False, "profile at all")
    profile_type: Literal["static", "dynamic"] = effective(
        "static", "static: the steps of static_param; dynamic: whenever the file of dynamic_param asks for it"
    )
    ranks: list[int] = effective([0], f"{_RANKS}; of profile_type static")
    static_param: StaticProfile = StaticProfile()
    dynamic_param: DynamicProfile = DynamicProfile()


class MemoryProfileConfig(StrictModel):
    """Record of the device's allocations from start_step up to, not including, end_step."""

    enable: bool = effective(False, "record at all")
    start_step: int = effective(1, "first step", ge=1)
    end_step: int = effective(2, "step before which recording ends", ge=2)
    save_path: str = effective("./memory_snapshot", "directory for the snapshots (one pickle file per rank)")
    dump_ranks: list[int] = effective([0], _RANKS)
    stacks: Literal["python", "all"] = effective("all", "call stacks to record: Python's alone, or C++ as well")
    max_entries: int | None = effective(None, "most allocations kept, the oldest being dropped; null: all", ge=1)
    mem_info: bool = effective(False, "write the allocator's statistics beside the snapshot, as text")

    @model_validator(mode="after")
    def _steps_in_order(self) -> MemoryProfileConfig:
        _check_steps(self.start_step, self.end_step)
        return self


class ToolsConfig(StrictModel):
    """The whole file."""

    profile: ProfileConfig = ProfileConfig()
    memory_profile: MemoryProfileConfig = MemoryProfileConfig()
