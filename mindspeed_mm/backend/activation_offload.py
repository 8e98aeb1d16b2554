"""Activations in the host's memory, and waiting for the device: what differs between devices when memory is short."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Offload = Callable[[Sequence[nn.Module]], contextlib.AbstractContextManager[None]]
"""Makes a context for the forward pass of the given layers, in which autograd keeps its tensors elsewhere."""


def synchronizer(*, device: str) -> Callable[[], None]:
    """What waits until ``device`` has done all work queued so far; on a CPU there is nothing to wait for."""
    return _nothing if device == "cpu" else getattr(torch, device).synchronize


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """A tensor's values in the host's memory, and what it takes to make the same tensor of them."""

    values: Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    pinned: bool

    @classmethod
    def store(cls, tensor: Tensor, *, pinned: bool) -> _OnHost:
        once = tensor
        for axis, step in enumerate(tensor.stride()):
            if step == 0:  # repeated by expand()
                once = once.narrow(axis, 0, 1)
        values = torch.empty(once.shape, dtype=once.dtype, device="cpu", pin_memory=pinned)
        values.copy_(once, non_blocking=pinned)
        return cls(values, tensor.device, tensor.shape, tensor.stride(), pinned)

    def restore(self) -> Tensor:
        dense = self.values.to(self.device, non_blocking=self.pinned)
        stride = [step or own for step, own in zip(self.stride, dense.stride(), strict=True)]
        if list(dense.stride()) != stride:
            # the order in memory decides how a product is computed, and so its last bits
            dense = torch.empty_strided(dense.shape, stride, dtype=dense.dtype, device=self.device).copy_(dense)
        return dense.expand(self.shape)


def host_offload(*, device: str) -> Offload:
    """Keep what autograd saves in the host's memory, page-locked where the device is an accelerator.

    The copies run in the device's own order of work, each at the place where autograd saves or wants its tensor, so
    nothing has to wait for the host. Weights and integers stay where they are. On a CPU the tensors are copied within
    the host's memory: this saves nothing, and makes a recipe that offloads run everywhere.
    """
    pinned = device != "cpu"

    @contextlib.contextmanager
    def offload(layers: Sequence[nn.Module]) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor | _OnHost:
            if not tensor.is_floating_point() or _is_weight(tensor, layers):
                return tensor
            return _OnHost.store(tensor, pinned=pinned)

        def unpack(packed: Tensor | _OnHost) -> Tensor:
            return packed.restore() if isinstance(packed, _OnHost) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    return offload


def _is_weight(tensor: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether ``tensor`` is a parameter of the layers or a view of one, as it is gathered at present."""
    place = tensor.untyped_storage().data_ptr()
    for layer in layers:
        for parameter in layer.parameters():
            local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter
            if local.untyped_storage().data_ptr() == place:
                return True
    return False
