"""Profiles and memory snapshots of chosen steps, as tools.json asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.profiler import ProfilerActivity, profile, record_function

from mindspeed_mm.arguments.tools_config import MemoryProfileConfig, ProfileConfig, ToolsConfig
from mindspeed_mm.errors import UserError

ALL_RANKS = -1
# Fields that only some devices' profilers know, each with the value that asks for nothing.
_DEVICE_FIELDS = {"level": None, "data_simplification": None, "aic_metrics_type": None}


class MemoryHistory(Protocol):
    """A device's memory module."""

    def _record_memory_history(self, enabled: str | None, **options: Any) -> None: ...

    def _dump_snapshot(self, filename: str) -> None: ...

    def memory_summary(self) -> str:
        """The allocator's statistics as text."""


class StepTools:
    """Told of every step's begin and end, starts and stops what tools.json enables for this rank.

    Steps are iterations, counted from 1 over the whole run: a run resumed behind a tool's end_step never starts it,
    one resumed in between starts it at once.
    """

    def __init__(
        self,
        config: ToolsConfig,
        *,
        rank: int,
        activities: Sequence[Any],
        memory_history: MemoryHistory | None,
    ) -> None:
        """Check that the device can do what is enabled.

        Args:
            config: tools.json.
            rank: of this process.
            activities: what torch.profiler can record here, the host's among them.
            memory_history: the device's memory module, None where allocations are not recorded.

        Raises:
            UserError: naming a field that cannot act on this device. Raised on every rank, chosen or not, so that no
                rank trains on alone.
        """
        self._tools: list[_Profiler | _MemoryRecorder] = []
        if config.profile.enable:
            chosen = _choose_activities(config.profile, activities)
            if _is_chosen(rank, config.profile.ranks):
                self._tools.append(_Profiler(config.profile, rank=rank, activities=chosen))
        if config.memory_profile.enable:
            if memory_history is None:
                raise UserError(
                    "tools file: memory_profile.enable is true, but this device keeps no record of its allocations; "
                    "set it to false (profile.static_param.with_memory records the host's)"
                )
            if _is_chosen(rank, config.memory_profile.dump_ranks):
                self._tools.append(_MemoryRecorder(config.memory_profile, rank=rank, memory=memory_history))

    def step_begin(self, iteration: int) -> None:
        """To be called before anything of ``iteration`` happens."""
        for tool in self._tools:
            if not tool.running and tool.first <= iteration < tool.end:
                tool.start(iteration)
            if tool.running:
                tool.mark_begin(iteration)

    def step_end(self, iteration: int) -> None:
        """To be called after everything of ``iteration`` has been started on the device."""
        for tool in self._tools:
            if tool.running:
                tool.mark_end()
                if iteration + 1 >= tool.end:
                    tool.stop(iteration)

    def close(self) -> None:
        """Write what is still being recorded; the run ends."""
        for tool in self._tools:
            if tool.running:
                tool.stop(None)


class _Profiler:
    """torch.profiler over the steps first..end-1, written as one Chrome trace."""

    def __init__(self, config: ProfileConfig, *, rank: int, activities: list[Any]) -> None:
        self._static = config.static_param
        self._rank = rank
        self._activities = activities
        self._profile: profile | None = None
        self._step: Any = None
        self._started_at = 0
        self.first, self.end = self._static.start_step, self._static.end_step

    @property
    def running(self) -> bool:
        return self._profile is not None

    def start(self, iteration: int) -> None:
        _make_directory(self._static.save_path, "profile.static_param.save_path")
        self._started_at = iteration
        self._profile = profile(
            activities=self._activities,
            record_shapes=self._static.record_shapes,
            profile_memory=self._static.with_memory,
            with_stack=self._static.with_stack,
        )
        self._profile.start()

    def mark_begin(self, iteration: int) -> None:
        self._step = record_function(f"iteration {iteration}")
        self._step.__enter__()

    def mark_end(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def stop(self, iteration: int | None) -> None:
        self.mark_end()
        recorded, self._profile = self._profile, None
        recorded.stop()
        last = self._started_at if iteration is None else iteration
        path = Path(self._static.save_path) / f"trace_rank{self._rank}_steps{self._started_at}-{last}.json"
        recorded.export_chrome_trace(str(path))


class _MemoryRecorder:
    """The device's allocations over the steps first..end-1, written as one snapshot."""

    def __init__(self, config: MemoryProfileConfig, *, rank: int, memory: MemoryHistory) -> None:
        self._config = config
        self._rank = rank
        self._memory = memory
        self.running = False
        self.first, self.end = config.start_step, config.end_step

    def start(self, iteration: int) -> None:
        del iteration
        _make_directory(self._config.save_path, "memory_profile.save_path")
        options = {} if self._config.max_entries is None else {"max_entries": self._config.max_entries}
        self._memory._record_memory_history("all", stacks=self._config.stacks, **options)
        self.running = True

    def mark_begin(self, iteration: int) -> None:
        """A snapshot has no marks."""

    def mark_end(self) -> None:
        """A snapshot has no marks."""

    def stop(self, iteration: int | None) -> None:
        del iteration
        stem = Path(self._config.save_path) / f"snapshot_rank{self._rank}"
        self._memory._dump_snapshot(f"{stem}.pickle")
        self._memory._record_memory_history(None)
        if self._config.mem_info:
            Path(f"{stem}.txt").write_text(self._memory.memory_summary())
        self.running = False


def _is_chosen(rank: int, ranks: Sequence[int]) -> bool:
    return rank in ranks or ALL_RANKS in ranks


def _choose_activities(config: ProfileConfig, available: Sequence[Any]) -> list[Any]:
    """Activities to record; raises where the file asks for what the device's profiler lacks."""
    static = config.static_param
    for name, nothing in _DEVICE_FIELDS.items():
        value = getattr(static, name)
        if value != nothing:
            raise UserError(
                f"tools file: profile.static_param.{name} is {value!r}, but this device's profiler has no such "
                "choice; leave it out"
            )
    chosen = [activity for activity in available if static.with_cpu or activity is not ProfilerActivity.CPU]
    if not chosen:
        raise UserError(
            "tools file: profile.static_param.with_cpu is false, but on this device the host is all there is to "
            "profile; set it to true"
        )
    return chosen


def _make_directory(path: str, field: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"tools file: {field} {path} cannot be made: {error.strerror}") from error
