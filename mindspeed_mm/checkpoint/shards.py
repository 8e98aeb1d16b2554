"""Local shards of a state as torch's planner sees them, and staging of them in host memory."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import available_memory

CHUNK_BYTES = 64 << 20
"""Larger shards are stored as several chunks of about this size: the least that a rank reads where the next run shards
the state differently."""
_BUFFER_BYTES = 1 << 30  # page-locked memory is allocated in powers of two, so one large buffer could waste half of it
_ALIGNMENT = 64  # bytes, at least that of any dtype

Rows = tuple[int, int]
"""First row and end, exclusive."""
ShardSlice = tuple[Rows, ...]
"""Begin and end on each axis."""


def local_shard(tensor: Tensor) -> tuple[Tensor, ShardSlice]:
    """The shard of a tensor on this rank, and its slice of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), tuple((0, size) for size in tensor.shape)
    return tensor.detach().to_local(), _shard_slice(tensor.shape, tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=4096)  # layers and moments have the same shapes
def _shard_slice(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> ShardSlice:
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple((start, start + size) for start, size in zip(offset, local, strict=True))


def write_items(
    name: str, dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]
) -> list[WriteItem]:
    """What torch's planner wants to know about the chunks of a tensor.

    Args:
        name: of the tensor.
        dtype: of the tensor.
        shape: of the whole tensor.
        chunks: that this rank can write.
    """
    return [
        WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape)),
        )
        for chunk in chunks
    ]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The shard of a tensor on one rank, written as chunks of at most ``CHUNK_BYTES`` along axis 0.

    Implements the part of torch's ``_Checkpointable`` protocol that saving uses.

    Attributes:
        values: of the shard.
        offsets: first index of the shard on each axis of the whole tensor.
        shape: of the whole tensor.
    """

    values: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Shard:
        """The local shard of a tensor, without a copy."""
        values, shard_slice = local_shard(tensor)
        return cls(values, tuple(start for start, _ in shard_slice), tuple(tensor.shape))

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        chunks = []
        for first, last in self._rows():
            offsets, sizes = list(self.offsets), list(self.values.shape)
            if sizes:
                offsets[0], sizes[0] = offsets[0] + first, last - first
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        return write_items(fqn, self.values.dtype, self.shape, chunks)

    def chunk(self, offsets: Sequence[int]) -> Tensor:
        """The values of the chunk that begins at ``offsets`` of the whole tensor, on the CPU."""
        if not offsets:
            return self.values.cpu()
        first = offsets[0] - self.offsets[0]
        rows = next(last for start, last in self._rows() if start == first)
        values = self.values[first:rows].cpu().contiguous()
        if values.untyped_storage().size() == values.nbytes:
            return values
        # torch's writer would copy a part of a larger storage; an array over the same memory is a storage of its own
        return torch.from_numpy(values.reshape(-1).view(torch.uint8).numpy()).view(values.dtype).view(values.shape)

    def _rows(self) -> Iterator[Rows]:
        if not self.values.numel():
            return
        rows = self.values.shape[0] if self.values.dim() else 1
        step = max(1, int(CHUNK_BYTES / (self.values.nbytes / rows)))
        for first in range(0, rows, step):
            yield first, min(first + step, rows)


class Stager:
    """Host memory for one copy of a rank's shards, reused from save to save.

    Attributes:
        reserved: bytes allocated so far.
    """

    def __init__(self, backend: Backend) -> None:
        """``backend``: of the device that holds the shards; an accelerator copies to page-locked memory."""
        self.reserved = 0
        self._backend = backend
        self._buffers: list[Tensor] = []

    def reserve(self, nbytes: int) -> None:
        """Allocate memory for ``nbytes`` bytes in total, so that the first copy does not have to."""
        while self.reserved < nbytes:
            self._add_buffer(min(_BUFFER_BYTES, nbytes - self.reserved))

    def stage(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """Copies of the shards, complete on return; the next call overwrites them."""
        free = [0] * len(self._buffers)  # first unused byte of each buffer
        copies: dict[str, Shard] = {}
        # large ones first, and the small ones into the gaps
        for name, shard in sorted(shards.items(), key=lambda entry: -entry[1].values.nbytes):
            memory = self._take(shard.values.nbytes, free)
            values = memory.view(shard.values.dtype).view(shard.values.shape)
            values.copy_(shard.values, non_blocking=True)
            copies[name] = dataclasses.replace(shard, values=values)
        self._backend.synchronize()
        return {name: copies[name] for name in shards}

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
        buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._backend.is_accelerator)
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
    available = available_memory()
    if available is not None and nbytes * ranks > available:
        raise UserError(
            f"--async-save keeps a copy of the saved state in host memory: {nbytes * ranks / 1e9:.1f} GB for the "
            f"{ranks} ranks of this machine, which has {available / 1e9:.1f} GB left; leave --async-save out"
        )
