"""Asynchronous host-device copies and device events: no host-device synchronisation until a result is read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mindspeed_mm.backend.device import Backend


class CopyStream:
    """Copies values with a ``to(device, non_blocking=...)`` method to the device, on a stream of its own.

    On a CPU there is nothing to overlap, and the copies are made at once.
    """

    def __init__(self, backend: Backend) -> None:
        """Create the stream on ``backend``'s device."""
        self._device = backend.device
        self._module = getattr(torch, backend.name) if backend.is_accelerator else None
        self._stream = None if self._module is None else self._module.Stream(device=backend.device)

    def start(self, values: list[Any]) -> tuple[list[Any], Any]:
        """Enqueue the copies of ``values``, from any thread; pinned memory makes them asynchronous.

        Returns:
            The copies, not to be used before :meth:`finish`, and the event that ``finish`` takes.
        """
        if self._module is None:
            return [value.to(self._device) for value in values], None
        with self._module.stream(self._stream):
            moved = [value.to(self._device, non_blocking=True) for value in values]
            return moved, self._stream.record_event()

    def finish(self, moved: list[Any], event: Any) -> None:
        """Make the current stream wait for the copies; the host does not wait."""
        if self._module is None:
            return
        current = self._module.current_stream(self._device)
        current.wait_event(event)
        for tensor in _tensors(moved):
            tensor.record_stream(current)  # keeps the allocator from reusing the memory while this stream reads it


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def copy_to_device(
    values: Sequence[float], device: torch.device, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Host numbers -> [len(values)] on ``device``, copied asynchronously from pinned memory."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type != "cpu").to(device, non_blocking=True)


class DeviceEvent:
    """An event on the device's current stream; on a CPU, which finishes work as it is queued, a host timestamp."""

    def __init__(self, device: torch.device) -> None:
        """Record the event after all work queued so far."""
        self._seconds, self._event = time.perf_counter(), None
        if device.type != "cpu":
            module = getattr(torch, device.type)
            self._event = module.Event(enable_timing=True)
            self._event.record(module.current_stream(device))

    def synchronize(self) -> None:
        """Block the host until the device reaches the event."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        """Seconds from ``earlier`` to this event by the device's clock; synchronises with this event."""
        self.synchronize()
        if self._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000.0


class DeferredHostRead:
    """An asynchronous device-to-host copy: enqueued at construction, synchronised when it is read.

    Attributes:
        ready: event after the copy.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        """Enqueue the copy of ``numbers``; on a CPU there is no copy, and ``numbers`` must not be overwritten."""
        self._host = numbers.detach()
        if numbers.device.type != "cpu":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
        self.ready = DeviceEvent(numbers.device)

    def tolist(self) -> list[Any]:
        """The numbers, after the copy has finished."""
        self.ready.synchronize()
        return self._host.tolist()
