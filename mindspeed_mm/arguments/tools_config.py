"""``--mm-tool``: profiling and memory snapshots. Steps are iterations as the log counts them, from 1."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mindspeed_mm.arguments.fields import StrictModel, effective, no_effect, refused

_RANKS = "ranks that write a file; [-1]: all"


def _check_steps(start: int, end: int) -> None:
    if end <= start:
        raise ValueError(f"end_step {end} must be greater than start_step {start}")


class StaticProfile(StrictModel):
    """Profile of the steps start_step up to, not including, end_step. Null leaves a choice to the device."""

    level: Literal["level0", "level1", "level2"] | None = effective(
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
    aic_metrics_type: str | None = effective(
        None, "hardware counters to record, where the device's profiler has them"
    )

    @model_validator(mode="after")
    def _steps_in_order(self) -> StaticProfile:
        _check_steps(self.start_step, self.end_step)
        return self


class DynamicProfile(StrictModel):
    """Profiling that is switched while training runs."""

    config_path: str = no_effect("./", "only profile_type dynamic reads it, which is not implemented yet")


class ProfileConfig(StrictModel):
    """Profiler."""

    enable: bool = effective(False, "profile at all")
    profile_type: Literal["static", "dynamic"] = refused(
        "static", "switching the profiler while training runs is not implemented yet"
    )
    ranks: list[int] = effective([0], _RANKS)
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
