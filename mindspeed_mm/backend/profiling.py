"""Device profilers behind one interface: torch.profiler on CPU and CUDA, torch_npu.profiler on an NPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.profiler import ProfilerActivity, profile

from mindspeed_mm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """Contents of a profile. None leaves an option to the profiler's default.

    Attributes:
        source: file and section of the request, for messages.
        host: record host operators too.
        stacks: record each operator's Python call stack.
        memory: record allocations.
        shapes: record operators' input shapes.
        level: depth of an accelerator's profile, ``level0`` to ``level2`` or ``level_none``.
        counters: hardware counters to record, by torch_npu's name.
        simplified: drop intermediate files.
    """

    source: str
    host: bool = True
    stacks: bool = False
    memory: bool = False
    shapes: bool = False
    level: str | None = None
    counters: str | None = None
    simplified: bool | None = None


class Recording(Protocol):
    """A running profile."""

    def stop(self) -> Path:
        """Stop and write the profile; returns its file or directory."""


class Profiler(Protocol):
    """A device's profiler."""

    def check(self, request: ProfileRequest) -> None:
        """Raise UserError for a field that this device's profiler does not support."""

    def start(self, request: ProfileRequest, *, directory: Path, name: str) -> Recording:
        """Start a profile, to be written into ``directory`` under ``name``."""


@dataclasses.dataclass(frozen=True)
class TorchProfiler:
    """``torch.profiler``; writes one Chrome trace, ``NAME.json``.

    Attributes:
        activities: the activities it can record, the host's included.
    """

    activities: Sequence[Any]

    def check(self, request: ProfileRequest) -> None:
        """See :class:`Profiler`."""
        for field, value in (
            ("level", request.level),
            ("data_simplification", request.simplified),
            ("aic_metrics_type", request.counters),
        ):
            if value is not None:
                raise UserError(
                    f"{request.source}.{field} is {value!r}, but this device's profiler has no such option; "
                    "remove it"
                )
        if not self._chosen(request):
            raise UserError(
                f"{request.source}.with_cpu is false, but this device's profiler records only the host; "
                "set it to true"
            )

    def start(self, request: ProfileRequest, *, directory: Path, name: str) -> Recording:
        """See :class:`Profiler`."""
        recorder = profile(
            activities=self._chosen(request),
            record_shapes=request.shapes,
            profile_memory=request.memory,
            with_stack=request.stacks,
        )
        recorder.start()
        return _TorchRecording(recorder, directory / f"{name}.json")

    def _chosen(self, request: ProfileRequest) -> list[Any]:
        return [activity for activity in self.activities if request.host or activity is not ProfilerActivity.CPU]


@dataclasses.dataclass(frozen=True)
class _TorchRecording:
    recorder: profile
    path: Path

    def stop(self) -> Path:
        self.recorder.stop()
        self.recorder.export_chrome_trace(str(self.path))
        return self.path


class NpuProfiler:
    """``torch_npu.profiler``; writes a directory ``NAME_PID_TIME_ascend_pt``.

    Its ``ASCEND_PROFILER_OUTPUT/trace_view.json`` is a Chrome trace. Written for torch_npu 2.7.1 to 2.13.0.
    """

    _LEVELS = {"level0": "Level0", "level1": "Level1", "level2": "Level2", "level_none": "Level_none"}

    def check(self, request: ProfileRequest) -> None:
        """See :class:`Profiler`. torch_npu itself only warns when a level drops the counters."""
        if request.counters not in (None, "AiCoreNone") and request.level not in ("level1", "level2"):
            raise UserError(
                f"{request.source}.aic_metrics_type is {request.counters!r}, which needs level level1 or level2, and "
                f"level is {request.level!r}; set it"
            )

    def start(self, request: ProfileRequest, *, directory: Path, name: str) -> Recording:
        """See :class:`Profiler`."""
        from torch_npu import profiler

        options: dict[str, Any] = {}
        if request.level is not None:
            options["profiler_level"] = getattr(profiler.ProfilerLevel, self._LEVELS[request.level])
        if request.counters is not None:
            options["aic_metrics"] = getattr(profiler.AiCMetrics, request.counters)
        if request.simplified is not None:
            options["data_simplification"] = request.simplified
        host = [profiler.ProfilerActivity.CPU] if request.host else []
        recorder = profiler.profile(
            activities=[*host, profiler.ProfilerActivity.NPU],
            on_trace_ready=profiler.tensorboard_trace_handler(str(directory), worker_name=name),
            record_shapes=request.shapes,
            profile_memory=request.memory,
            with_stack=request.stacks,
            experimental_config=profiler._ExperimentalConfig(**options),
        )
        recorder.start()
        return _NpuRecording(recorder, directory)


@dataclasses.dataclass(frozen=True)
class _NpuRecording:
    recorder: Any
    directory: Path

    def stop(self) -> Path:
        self.recorder.stop()  # calls on_trace_ready, which writes the profile
        return self.directory
