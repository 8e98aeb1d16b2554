"""Profiles and memory snapshots of chosen steps, as tools.json asks for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.profiler import record_function

from mindspeed_mm.backend.profiling import Profiler, ProfileRequest, Recording
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.tools_config import (
    DYNAMIC_FILE,
    DynamicRequest,
    MemoryProfileConfig,
    ProfileConfig,
    ToolsConfig,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.logging_setup import ALL_RANKS

logger = logging.getLogger(__name__)

_EVERY_RANK = -1
_SHOWN = (
    "is_valid", "start_step", "active", "prof_dir", "record_shapes", "profile_memory", "with_stack", "is_rank",
    "rank_list",
)  # fmt: skip
"""Fields that the file to be edited begins with."""


class MemoryHistory(Protocol):
    """A device's memory module."""

    def _record_memory_history(self, enabled: str | None, **options: Any) -> None: ...

    def _dump_snapshot(self, filename: str) -> None: ...

    def memory_summary(self) -> str:
        """The allocator's statistics as text."""


class _Tool(Protocol):
    """Records some of the steps."""

    def step_begin(self, iteration: int) -> None: ...

    def step_end(self, iteration: int) -> None: ...

    def close(self) -> None: ...


class Profiling(Callback):
    """Starts and stops the profiles and memory snapshots that tools.json enables for this rank.

    Steps are iterations, counted from 1 over the whole run: a run resumed behind a tool's end_step never starts it,
    one resumed in between starts it at once.
    """

    def __init__(
        self, config: ToolsConfig, *, rank: int, profiler: Profiler, memory_history: MemoryHistory | None
    ) -> None:
        """Check that the device can do what is enabled.

        Args:
            config: tools.json.
            rank: of this process.
            profiler: the device's.
            memory_history: the device's memory module, None where allocations are not recorded.

        Raises:
            UserError: naming a field that cannot act on this device. Raised on every rank, chosen or not, so that no
                rank trains on alone.
        """
        self._tools: list[_Tool] = []
        if config.profile.enable:
            self._tools += _profiles(config.profile, rank=rank, profiler=profiler)
        if config.memory_profile.enable:
            if memory_history is None:
                raise UserError(
                    "tools file: memory_profile.enable is true, but this device keeps no record of its allocations; "
                    "set it to false (profile.static_param.with_memory records the host's)"
                )
            if _is_chosen(rank, config.memory_profile.dump_ranks):
                self._tools.append(_MemoryRecorder(config.memory_profile, rank=rank, memory=memory_history))

    def on_step_start(self, iteration: int) -> None:
        """Start what begins with the step."""
        self._call(lambda tool: tool.step_begin(iteration))

    def on_step_queued(self, iteration: int) -> None:
        """Stop what ends with the step."""
        self._call(lambda tool: tool.step_end(iteration))

    def on_run_end(self, *, failed: bool) -> None:
        """Write what is still being recorded."""
        self._call(lambda tool: tool.close())

    def _call(self, method: Callable[[_Tool], None]) -> None:
        """Call a method of each tool; one that cannot write is left out from then on, and training continues."""
        for tool in list(self._tools):
            try:
                method(tool)
            except (UserError, OSError) as error:
                self._tools.remove(tool)
                logger.warning(f"{error}; nothing more is recorded")


def _profiles(config: ProfileConfig, *, rank: int, profiler: Profiler) -> list[_Tool]:
    """What ``profile`` asks for on this rank; raises where the device cannot do it."""
    if config.profile_type == "dynamic":
        return [_DynamicProfile(config.dynamic_param.config_path, rank=rank, profiler=profiler)]
    static = config.static_param
    request = ProfileRequest(
        source="tools file: profile.static_param",
        host=static.with_cpu,
        stacks=static.with_stack,
        memory=static.with_memory,
        shapes=static.record_shapes,
        level=static.level,
        counters=static.aic_metrics_type,
        simplified=static.data_simplification,
    )
    profiler.check(request)
    if not _is_chosen(rank, config.ranks):
        return []
    return [
        _Profile(
            request, first=static.start_step, end=static.end_step, directory=(static.save_path, "save_path"),
            rank=rank, profiler=profiler,
        )
    ]  # fmt: skip


class _Profile:
    """A profile of the steps first..end-1, each with a mark of its own."""

    def __init__(
        self,
        request: ProfileRequest,
        *,
        first: int,
        end: int,
        directory: tuple[str, str],
        rank: int,
        profiler: Profiler,
    ) -> None:
        """``directory``: where the trace goes, and the field that says so."""
        self.first, self.end = first, end
        self._request = request
        self._directory, self._field = directory
        self._rank = rank
        self._profiler = profiler
        self._recording: Recording | None = None
        self._step: Any = None

    def step_begin(self, iteration: int) -> None:
        if self._recording is None and self.first <= iteration < self.end:
            directory = _make_directory(self._directory, f"{self._request.source}: {self._field}")
            name = f"trace_rank{self._rank}_steps{iteration}-{self.end - 1}"
            self._recording = self._profiler.start(self._request, directory=directory, name=name)
        if self._recording is not None:
            self._step = record_function(f"iteration {iteration}")
            self._step.__enter__()

    def step_end(self, iteration: int) -> None:
        self._end_mark()
        if iteration + 1 >= self.end:
            self.close()

    def close(self) -> None:
        self._end_mark()
        if self._recording is not None:
            path = self._recording.stop()
            logger.info(f"profile of rank {self._rank} is in {path}", extra=ALL_RANKS)
            self._recording = None

    def _end_mark(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


class _DynamicProfile:
    """Profiles that a file asks for while training runs. A mistake in it is a warning; training continues."""

    def __init__(self, directory: str, *, rank: int, profiler: Profiler) -> None:
        self._file = RequestFile(
            _make_directory(directory, "tools file: profile.dynamic_param.config_path"), writes=rank == 0
        )
        self._rank = rank
        self._profiler = profiler
        self._profile: _Profile | None = None

    def step_begin(self, iteration: int) -> None:
        try:
            self._take_request(iteration)
            if self._profile is not None:
                self._profile.step_begin(iteration)
        except UserError as error:
            self._profile = None
            logger.warning(f"{error}; nothing is profiled")

    def _take_request(self, iteration: int) -> None:
        asked = self._file.changed()
        if asked is None or not asked.is_valid or (asked.is_rank and self._rank not in asked.rank_list):
            return
        first = iteration if asked.start_step == -1 else asked.start_step
        if first < iteration:
            raise UserError(f"{self._file.path}: start_step {first} has passed, iteration {iteration} begins")
        counters = asked.experimental_config
        request = ProfileRequest(
            source=str(self._file.path),
            host=asked.activities is None or "CPU" in asked.activities,
            stacks=asked.with_stack,
            memory=asked.profile_memory,
            shapes=asked.record_shapes,
            level=None if counters.profiler_level is None else counters.profiler_level.lower(),
            counters=counters.aic_metrics,
            simplified=counters.data_simplification,
        )
        self._profiler.check(request)
        self.close()
        self._profile = _Profile(
            request, first=first, end=first + asked.active, directory=(asked.prof_dir, "prof_dir"),
            rank=self._rank, profiler=self._profiler,
        )  # fmt: skip

    def step_end(self, iteration: int) -> None:
        if self._profile is not None:
            self._profile.step_end(iteration)

    def close(self) -> None:
        if self._profile is not None:
            self._profile.close()


class RequestFile:
    """``profiler_config.json`` in a directory. What it holds when the run starts asks for nothing yet.

    Attributes:
        path: the file.
    """

    def __init__(self, directory: Path, *, writes: bool) -> None:
        """``writes``: whether this process leaves a file to be edited where there is none.

        Raises:
            UserError: if the directory cannot be written to.
        """
        self.path = directory / DYNAMIC_FILE
        if writes and not self.path.exists():
            template = DynamicRequest().model_dump(include=set(_SHOWN))
            try:
                self.path.write_text(json.dumps(template, indent=4) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"tools file: profile.dynamic_param.config_path: {self.path} cannot be written: {error.strerror}"
                ) from error
        self._seen = self._stamp()

    def changed(self) -> DynamicRequest | None:
        """What the file asks for, if it has been written anew since the last call.

        Raises:
            UserError: naming the mistake in it.
        """
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return None
        self._seen = stamp
        return load_config(self.path, DynamicRequest, flag="profile.dynamic_param.config_path")

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs once the file is written anew; None where there is none at present."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class _MemoryRecorder:
    """The device's allocations over the steps first..end-1, written as one snapshot."""

    def __init__(self, config: MemoryProfileConfig, *, rank: int, memory: MemoryHistory) -> None:
        self._config = config
        self._rank = rank
        self._memory = memory
        self._running = False

    def step_begin(self, iteration: int) -> None:
        config = self._config
        if self._running or not config.start_step <= iteration < config.end_step:
            return
        _make_directory(config.save_path, "tools file: memory_profile.save_path")
        options = {} if config.max_entries is None else {"max_entries": config.max_entries}
        self._memory._record_memory_history("all", stacks=config.stacks, **options)
        self._running = True

    def step_end(self, iteration: int) -> None:
        if iteration + 1 >= self._config.end_step:
            self.close()

    def close(self) -> None:
        if not self._running:
            return
        stem = Path(self._config.save_path) / f"snapshot_rank{self._rank}"
        # torch_npu writes over an existing file without shortening it
        Path(f"{stem}.pickle").unlink(missing_ok=True)
        self._memory._dump_snapshot(f"{stem}.pickle")
        self._memory._record_memory_history(None)
        if self._config.mem_info:
            Path(f"{stem}.txt").write_text(self._memory.memory_summary())
        self._running = False


def _is_chosen(rank: int, ranks: Sequence[int]) -> bool:
    return rank in ranks or _EVERY_RANK in ranks


def _make_directory(path: str, what: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be made: {error.strerror}") from error
    return Path(path)
