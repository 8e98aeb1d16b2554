"""Activation offload to host memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Offload = Callable[[Sequence[nn.Module]], contextlib.AbstractContextManager[None]]
"""Returns a context for the forward pass of the given layers, in which autograd saves its tensors elsewhere."""


def synchronizer(*, device: str) -> Callable[[], None]:
    """A function that blocks until ``device`` has finished all queued work; on a CPU it does nothing."""
    return _nothing if device == "cpu" else getattr(torch, device).synchronize


def _nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """A tensor's values in host memory, with its device, shape and strides."""

    values: Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    pinned: bool

    @classmethod
    def store(cls, tensor: Tensor, *, pinned: bool) -> _OnHost:
        base = tensor
        for axis, step in enumerate(tensor.stride()):
            if step == 0:  # repeated by expand()
                base = base.narrow(axis, 0, 1)
        values = torch.empty(base.shape, dtype=base.dtype, device="cpu", pin_memory=pinned)
        values.copy_(base, non_blocking=pinned)
        return cls(values, tensor.device, tensor.shape, tensor.stride(), pinned)

    def restore(self) -> Tensor:
        dense = self.values.to(self.device, non_blocking=self.pinned)
        stride = [step or own for step, own in zip(self.stride, dense.stride(), strict=True)]
        if list(dense.stride()) != stride:
            # the memory layout decides how a product is computed, and so its last bits
            dense = torch.empty_strided(dense.shape, stride, dtype=dense.dtype, device=self.device).copy_(dense)
        return dense.expand(self.shape)


def host_offload(*, device: str) -> Offload:
    """Keep the tensors that autograd saves in host memory, pinned if the device is an accelerator.

    The copies are enqueued on the device's current stream where autograd saves or reads a tensor, so there is no
    host-device synchronisation. Weights and integer tensors stay on the device. On a CPU the tensors are copied within
    host memory: this saves nothing, but configurations with offload run everywhere.
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
    """Whether ``tensor`` is a parameter of the layers, as gathered now, or a view of one."""
    storage = tensor.untyped_storage().data_ptr()
    for layer in layers:
        for parameter in layer.parameters():
            local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter
            if local.untyped_storage().data_ptr() == storage:
                return True
    return False
