"""Activations in the host's memory, and waiting for the device: what differs between devices when memory is short."""

from __future__ import annotations

import contextlib
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


def host_offload(*, device: str) -> Offload:
    """Keep what autograd saves in the host's memory, page-locked where the device is an accelerator.

    The copies run in the device's own order of work, each at the place where autograd saves or wants its tensor, so
    nothing has to wait for the host. Weights stay where they are. On a CPU the tensors are copied within the host's
    memory: this saves nothing, and makes a recipe that offloads run everywhere.
    """
    pinned = device != "cpu"

    @contextlib.contextmanager
    def offload(layers: Sequence[nn.Module]) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if not tensor.is_floating_point() or _is_weight(tensor, layers):
                return tensor
            # empty_like keeps the strides, which decide how a product is computed
            host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
            host.copy_(tensor, non_blocking=pinned)
            return tensor.device, host

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            origin, host = packed
            return host.to(origin, non_blocking=pinned)

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
