"""``--mm-tool``: profiling and memory snapshots. Steps are iterations as in the log, from 1."""

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


class SwitchedModel(StrictModel):
    """A section with a switch. While it is off, the names of the other fields are checked and their values are not."""

    enable: bool = effective(False, "use this section")

    @model_validator(mode="before")
    @classmethod
    def _ignore_values_while_off(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("enable", False) is not False:
            return content
        return {name: value for name, value in content.items() if name == "enable" or name not in cls.model_fields}


def _check_steps(start: int, end: int) -> None:
    if end <= start:
        raise ValueError(f"end_step {end} must be greater than start_step {start}")


class StaticProfile(StrictModel):
    """Profile of the steps from start_step to end_step - 1. Null leaves a choice to the device's profiler."""

    level: Literal["level_none", "level0", "level1", "level2"] | None = effective(
        None, "level of detail, where the device's profiler has levels"
    )
    with_stack: bool = effective(False, "record the Python call stack of each operator")
    with_memory: bool = effective(False, "record allocations")
    record_shapes: bool = effective(False, "record the shapes of operator inputs")
    with_cpu: bool = effective(True, "also record host operators")
    save_path: str = effective("./profiling", "directory for the traces (Chrome trace format, one file per rank)")
    start_step: int = effective(10, "first step", ge=1)
    end_step: int = effective(11, "step before which profiling ends", ge=2)
    data_simplification: bool | None = effective(
        None, "delete the profiler's intermediate files, where it writes any"
    )
    aic_metrics_type: Counters | None = effective(
        None, "hardware counters to record, where the device has them; needs level1 or level2"
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> StaticProfile:
        _check_steps(self.start_step, self.end_step)
        return self


class DynamicProfile(StrictModel):
    """Profiling switched on while training runs."""

    config_path: str = effective(
        "./", f"directory whose {DYNAMIC_FILE} is read before each step; it is created if missing"
    )


class DynamicCounters(StrictModel):
    """``experimental_config`` of :class:`DynamicRequest`: choices of accelerators' profilers."""

    profiler_level: Literal["Level_none", "Level0", "Level1", "Level2"] | None = effective(
        None, "level of detail; null: the profiler's default"
    )
    aic_metrics: Counters | None = effective(None, "hardware counters to record; null: none")
    data_simplification: bool | None = effective(None, "delete intermediate files; null: the profiler's default")
    l2_cache: bool = refused(False, _NOT_TAKEN)
    op_attr: bool = refused(False, _NOT_TAKEN)
    record_op_args: bool = refused(False, _NOT_TAKEN)
    msprof_tx: bool = refused(False, _NOT_TAKEN)
    mstx: bool = refused(False, _NOT_TAKEN)
    gc_detect_threshold: float | None = refused(None, _NOT_TAKEN)
    export_type: Any = no_effect(None, "traces are written as text")


class DynamicRequest(StrictModel):
    """What ``profiler_config.json`` asks for; the fields have the names that torch_npu gives them."""

    is_valid: bool = effective(False, "profile once; takes effect whenever the file is written")
    start_step: int = effective(-1, "first step; -1: the next one", ge=-1)
    active: int = effective(1, "number of steps", ge=1)
    prof_dir: str = effective("./profiling", "directory for the traces")
    activities: list[str] | None = effective(None, "without CPU in the list only the device is recorded; null: both")
    record_shapes: bool = effective(False, "record the shapes of operator inputs")
    profile_memory: bool = effective(False, "record allocations")
    with_stack: bool = effective(False, "record the Python call stack of each operator")
    is_rank: bool = effective(False, "write on the ranks of rank_list only, not on all")
    rank_list: list[int] = effective([], "see is_rank")
    with_flops: bool = refused(False, _NOT_TAKEN)
    with_modules: bool = refused(False, _NOT_TAKEN)
    warmup: int = refused(0, "recording starts with start_step itself")
    analyse: bool = no_effect(False, "traces are always written in a form that viewers open")
    async_mode: bool = no_effect(False, "training is blocked until a trace is written")
    metadata: dict[str, Any] = no_effect({}, "traces hold no metadata")
    experimental_config: DynamicCounters = DynamicCounters()

    @model_validator(mode="after")
    def _names_ranks(self) -> DynamicRequest:
        if self.is_rank and not self.rank_list:
            raise ValueError("is_rank is true and rank_list is empty")
        return self


class ProfileConfig(SwitchedModel):
    """Profiler."""

    profile_type: Literal["static", "dynamic"] = effective(
        "static", "static: the steps of static_param; dynamic: whenever the file of dynamic_param asks for it"
    )
    ranks: list[int] = effective([0], f"{_RANKS}; of profile_type static")
    static_param: StaticProfile = StaticProfile()
    dynamic_param: DynamicProfile = DynamicProfile()


class MemoryProfileConfig(SwitchedModel):
    """Record of the device's allocations in the steps from start_step to end_step - 1."""

    start_step: int = effective(1, "first step", ge=1)
    end_step: int = effective(2, "step before which recording ends", ge=2)
    save_path: str = effective("./memory_snapshot", "directory for the snapshots (one pickle file per rank)")
    dump_ranks: list[int] = effective([0], _RANKS)
    stacks: Literal["python", "all"] = effective("all", "call stacks to record: Python's only, or also C++")
    max_entries: int | None = effective(None, "most allocations to keep, dropping the oldest; null: all", ge=1)
    mem_info: bool = effective(False, "also write the allocator's statistics, as text")

    @model_validator(mode="after")
    def _steps_in_order(self) -> MemoryProfileConfig:
        _check_steps(self.start_step, self.end_step)
        return self


class ToolsConfig(StrictModel):
    """The whole file."""

    profile: ProfileConfig = ProfileConfig()
    memory_profile: MemoryProfileConfig = MemoryProfileConfig()
    sorafeature: dict[str, Any] | None = no_effect(None, "features of video generation models are not recorded")
