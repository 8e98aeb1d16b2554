"""Local shards of a state, the chunks that each rank writes, and staging buffers for asynchronous saves."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mindspeed_mm.errors import UserError

CHUNK_BYTES = 64 << 20
"""Larger shards are stored as several chunks of about this size: the least that a rank reads where the next run shards
the state differently, and well below the 4 GB limit of a chunk."""
_BUFFER_BYTES = 1 << 30  # page-locked memory is allocated in powers of two, so one large buffer could waste half of it
_ALIGNMENT = 64  # bytes, at least that of any dtype

ShardSlice = tuple[tuple[int, int], ...]
"""Begin and end on each axis."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor that this rank writes.

    Attributes:
        name: of the tensor.
        global_shape: of the tensor.
        offsets: first index of the chunk on each axis.
        values: of the chunk, on any device.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


def local_shard(tensor: Tensor) -> tuple[Tensor, ShardSlice]:
    """The shard of a tensor on this rank, and its slice of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple((0, size) for size in tensor.shape)
    return tensor.detach().to_local(), _shard_slice(tensor.shape, tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=4096)  # layers and moments have the same shapes
def _shard_slice(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> ShardSlice:
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple((start, start + size) for start, size in zip(offset, local, strict=True))


def chunks_to_write(shared: Mapping[str, Tensor], own: Mapping[str, Tensor], *, rank: int) -> list[Chunk]:
    """The chunks that this rank writes; all ranks together write every element once.

    Every rank decides from what all ranks know, without communication.

    Args:
        shared: tensors of all ranks, sharded or replicated.
        own: tensors of this rank only.
        rank: of this process.
    """
    mine = [
        (name, tensor)
        for number, (name, tensor) in enumerate(shared.items())
        if (_replica_number(tensor, number) if isinstance(tensor, DTensor) else rank) == 0
    ]
    return [chunk for name, tensor in [*mine, *own.items()] for chunk in _split(name, tensor)]


def _replica_number(tensor: DTensor, number: int) -> int:
    """0 on one of the ranks that hold this shard of the ``number``-th tensor, a different one from tensor to tensor."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise AssertionError("a parameter of which this rank has no shard")
    replica, replicas = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise AssertionError("a parameter with pending partial sums")
        if placement.is_replicate():
            replica, replicas = replica * mesh.size(axis) + coordinate[axis], replicas * mesh.size(axis)
    return (replica + number) % replicas


def _split(name: str, tensor: Tensor) -> Iterator[Chunk]:
    local, shard_slice = local_shard(tensor)
    offsets, global_shape = tuple(start for start, _ in shard_slice), tuple(tensor.shape)
    if not local.numel():
        return
    rows = local.shape[0] if local.dim() else 1
    step = max(1, math.floor(CHUNK_BYTES / (local.nbytes / rows)))
    if step >= rows:
        yield Chunk(name, global_shape, offsets, local)
        return
    for first in range(0, rows, step):
        yield Chunk(name, global_shape, (offsets[0] + first, *offsets[1:]), local[first : first + step])


def overlap(shard_slice: ShardSlice, offsets: tuple[int, ...], shape: tuple[int, ...]) -> ShardSlice | None:
    """The intersection of ``shard_slice`` and a stored chunk; None if it is empty."""
    common = tuple(
        (max(begin, offset), min(end, offset + size))
        for (begin, end), offset, size in zip(shard_slice, offsets, shape, strict=True)
    )
    return common if all(begin < end for begin, end in common) else None


def relative_index(shard_slice: ShardSlice, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """``shard_slice`` as an index into a tensor whose first element is at ``origin``."""
    return tuple(slice(begin - start, end - start) for (begin, end), start in zip(shard_slice, origin, strict=True))


def total_bytes(chunks: Sequence[Chunk]) -> int:
    """Bytes of all values."""
    return sum(chunk.values.nbytes for chunk in chunks)


class StagingBuffers:
    """Host memory for one copy of what a rank writes, reused from save to save.

    Attributes:
        reserved: bytes allocated so far.
    """

    def __init__(self, *, pinned: bool) -> None:
        """``pinned``: allocate page-locked memory, into which a device copies asynchronously."""
        self.reserved = 0
        self._pinned = pinned
        self._buffers: list[Tensor] = []

    def reserve(self, nbytes: int) -> None:
        """Allocate memory for chunks of ``nbytes`` bytes in total, so that the first copy does not have to."""
        while self.reserved < nbytes:
            self._add_buffer(min(_BUFFER_BYTES, nbytes - self.reserved))

    def copy(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The same chunks with copies of their values, which are complete once the device is synchronised.

        The next call overwrites the copies.
        """
        free = [0] * len(self._buffers)  # first unused byte of each buffer
        copies: dict[int, Tensor] = {}
        # large ones first, and the small ones into the gaps
        for index in sorted(range(len(chunks)), key=lambda index: -chunks[index].values.nbytes):
            values = chunks[index].values
            memory = self._take(values.nbytes, free)
            copies[index] = memory.view(values.dtype).view(values.shape)
            copies[index].copy_(values, non_blocking=True)
        return [dataclasses.replace(chunk, values=copies[index]) for index, chunk in enumerate(chunks)]

    def _take(self, nbytes: int, free: list[int]) -> Tensor:
        for number, buffer in enumerate(self._buffers):
            start = free[number]
            if start + nbytes <= buffer.numel():
                free[number] = start + nbytes + -nbytes % _ALIGNMENT
                return buffer[start : start + nbytes]
        self._add_buffer(max(nbytes, 1 << 20))
        free.append(0)
        return self._take(nbytes, free)

    def _add_buffer(self, nbytes: int) -> None:
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        buffer.zero_()  # the system provides pages when they are touched
        self._buffers.append(buffer)
        self.reserved += nbytes


def check_host_memory(nbytes: int) -> None:
    """Refuse staging buffers that do not fit into the memory of this machine.

    Args:
        nbytes: of this rank's buffers; the other local ranks are assumed to need the same.

    Raises:
        UserError: with both numbers.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = _available_bytes()
    if available is not None and nbytes * ranks > available:
        raise UserError(
            f"--async-save keeps a copy of the saved state in host memory: {nbytes * ranks / 1e9:.1f} GB for the "
            f"{ranks} ranks of this machine, which has {available / 1e9:.1f} GB left; leave --async-save out"
        )


def _available_bytes() -> int | None:
    """Memory available to new allocations; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
