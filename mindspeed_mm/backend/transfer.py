"""Copies to the device beside its computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
