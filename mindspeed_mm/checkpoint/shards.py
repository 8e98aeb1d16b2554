"""Which part of a state a process holds, and which of it the process writes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ITEM_BYTES = 64 << 20
"""Larger parts are stored as several items of about this size: what a process reads at least where the next run spreads
the state in another way, and well below the 4 GB that one may have."""

ShardSlice = tuple[tuple[int, int], ...]
"""Begin and end on each axis."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A part of a tensor that this process writes.

    Attributes:
        name: of the tensor.
        whole: its shape.
        offsets: where the part begins on each axis.
        values: the part, wherever it lies.
    """

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


def local_shard(tensor: Tensor) -> tuple[Tensor, ShardSlice]:
    """The part of a tensor that lies on this process, and where in the whole it belongs."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple((0, size) for size in tensor.shape)
    return tensor.detach().to_local(), _region(tensor.shape, tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=4096)  # layers and moments have the same shapes
def _region(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> ShardSlice:
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple((start, start + size) for start, size in zip(offset, local, strict=True))


def items_to_write(shared: Mapping[str, Tensor], own: Mapping[str, Tensor], *, rank: int) -> list[Item]:
    """What this process writes, so that all processes together write everything once.

    Every process decides for itself, from what all of them know: nothing is communicated.

    Args:
        shared: tensors that all processes have: spread over them, or the same on each.
        own: tensors that only this process has.
        rank: of this process.
    """
    mine = [
        (name, tensor)
        for number, (name, tensor) in enumerate(shared.items())
        if (_copy_number(tensor, number) if isinstance(tensor, DTensor) else rank) == 0
    ]
    return [item for name, tensor in [*mine, *own.items()] for item in _cut(name, tensor)]


def _copy_number(tensor: DTensor, number: int) -> int:
    """0 on one of the processes that hold this part of the ``number``-th tensor; by turns, not always the same one."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise AssertionError("a parameter that this process has no part of")
    copy, copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise AssertionError("a parameter that is a sum yet to be made")
        if placement.is_replicate():
            copy, copies = copy * mesh.size(axis) + coordinate[axis], copies * mesh.size(axis)
    return (copy + number) % copies


def _cut(name: str, tensor: Tensor) -> Iterator[Item]:
    local, region = local_shard(tensor)
    offsets, whole = tuple(start for start, _ in region), tuple(tensor.shape)
    if not local.numel():
        return
    rows = local.shape[0] if local.dim() else 1
    step = max(1, math.floor(ITEM_BYTES / (local.nbytes / rows)))
    if step >= rows:
        yield Item(name, whole, offsets, local)
        return
    for first in range(0, rows, step):
        yield Item(name, whole, (offsets[0] + first, *offsets[1:]), local[first : first + step])


def overlap(region: ShardSlice, offsets: tuple[int, ...], shape: tuple[int, ...]) -> ShardSlice | None:
    """The part of ``region`` that a stored piece covers; None where they do not meet."""
    common = tuple(
        (max(begin, offset), min(end, offset + size))
        for (begin, end), offset, size in zip(region, offsets, shape, strict=True)
    )
    return common if all(begin < end for begin, end in common) else None


def within(region: ShardSlice, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """``region`` as an index into a tensor that begins at ``origin``."""
    return tuple(slice(begin - start, end - start) for (begin, end), start in zip(region, origin, strict=True))


def bytes_of(items: Sequence[Item]) -> int:
    """Bytes of all values."""
    return sum(item.values.nbytes for item in items)
