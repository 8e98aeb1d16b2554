"""Copies between host and device beside the computation: the host waits for none that it did not ask for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mindspeed_mm.backend.device import Backend


class Transfer:
    """Moves values with a ``to(device, non_blocking=...)`` method to a device, in a queue of its own.

    On a CPU there is nothing to overlap, and the values are handed on as they are.
    """

    def __init__(self, backend: Backend) -> None:
        """Make the queue, for ``backend``'s device."""
        self._device = backend.device
        self._module = getattr(torch, backend.name) if backend.is_accelerator else None
        self._stream = None if self._module is None else self._module.Stream(device=backend.device)

    def start(self, values: list[Any]) -> tuple[list[Any], Any]:
        """Queue the copies of ``values``; they are truly beside the computation if their memory is pinned.

        Returns:
            The copies, not to be used before ``finish``, and what ``finish`` waits for. Any thread may call this.
        """
        if self._module is None:
            return [value.to(self._device) for value in values], None
        with self._module.stream(self._stream):
            moved = [value.to(self._device, non_blocking=True) for value in values]
            return moved, self._stream.record_event()

    def finish(self, moved: list[Any], event: Any) -> None:
        """Let the computation that is queued from now on by this thread wait for the copies; the host does not wait."""
        if self._module is None:
            return
        current = self._module.current_stream(self._device)
        current.wait_event(event)
        for tensor in _tensors(moved):
            tensor.record_stream(current)  # or its memory could be given away while the computation still reads it


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


def upload(values: Sequence[float], device: torch.device, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of the host -> [len(values)] on ``device``; page-locked on the way, so that the host need not wait."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type != "cpu").to(device, non_blocking=True)


class DeviceEvent:
    """A place in the device's queue of work; on a CPU, whose work is done when it has been queued, a point in time."""

    def __init__(self, device: torch.device) -> None:
        """Mark the end of what has been queued so far."""
        self._seconds, self._event = time.perf_counter(), None
        if device.type != "cpu":
            module = getattr(torch, device.type)
            self._event = module.Event(enable_timing=True)
            self._event.record(module.current_stream(device))

    def wait(self) -> None:
        """Let the host wait until the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        """Time that the device took from there to here, which is waited for; by its own clock, not by the host's."""
        self.wait()
        if self._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000.0


class DeferredHostRead:
    """Numbers of the device on their way to the host: queued when this is made, waited for when they are wanted.

    Attributes:
        made: when the device has made them.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        """Queue the copy behind the work that makes ``numbers``, which nobody may overwrite on a CPU afterwards."""
        self._host = numbers.detach()
        if numbers.device.type != "cpu":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
        self.made = DeviceEvent(numbers.device)

    def tolist(self) -> list[Any]:
        """The numbers, as soon as the device has made them."""
        self.made.wait()
        return self._host.tolist()
