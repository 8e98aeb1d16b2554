"""Parameters of a distributed checkpoint, read in bounded pieces and compared with their checksums on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint import pieces
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.errors import UserError

Rows = tuple[int, int]


class StoredParameters:
    """Reads rows of parameters.

    Where the manifest has checksums of the stored items, as ours have, whole items are read and compared: nothing is
    read twice, and nothing but the parameters. Items of files that another program has written are read by ranges.
    """

    def __init__(self, reader: DcpReader, *, check: bool) -> None:
        """
        Args:
            reader: the checkpoint.
            check: compare checksums.
        """
        self._reader = reader
        self._check = check

    def files_without(self, names: Iterable[str]) -> set[str]:
        """Files that hold items of these parameters and have no checksums of items: they have to be checked whole."""
        files = {info.relative_path for name in names for _, info in self._reader.items(name)}
        return files - self._reader.summed

    def ranges(self, name: str) -> list[Rows]:
        """Ranges of rows, to be read one by one, that together are the whole parameter."""
        shape, dtype = self._reader.tensors[name]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if not self._by_items(name):
            return pieces.split_rows(shape[0], row_bytes)
        return list(_grouped(self._bands(name), row_bytes))

    def read(self, name: str, rows: Rows) -> Tensor:
        """Rows [a, b) of a parameter; one of its ``ranges``, or all of it.

        Raises:
            UserError: if an item is missing, damaged or cannot be read.
        """
        if not self._by_items(name):
            return self._reader.read(name, rows)
        first, last = rows
        shape, dtype = self._reader.tensors[name]
        result, covered = None, 0
        for chunk, _ in self._reader.items(name):
            if chunk.offsets[0] >= last or chunk.offsets[0] + chunk.sizes[0] <= first or 0 in chunk.sizes:
                continue
            item = self._reader.read_item(name, chunk, check=self._check)
            if tuple(item.shape) == (last - first, *shape[1:]):
                return item.contiguous()
            if result is None:
                result = torch.empty((last - first, *shape[1:]), dtype=dtype)
            result[_place(chunk, first)] = item
            covered += item.numel()
        if result is None or covered != result.numel():
            raise UserError(
                f"{self._reader.path}: rows {first} to {last} of {name} are not completely stored; save it again"
            )
        return result

    def _by_items(self, name: str) -> bool:
        return all(info.relative_path in self._reader.summed for _, info in self._reader.items(name))

    def _bands(self, name: str) -> list[Rows]:
        """The finest ranges of rows that no item crosses."""
        spans = sorted(
            (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
            for chunk, _ in self._reader.items(name)
            if 0 not in chunk.sizes
        )
        bands: list[Rows] = []
        for start, end in spans:
            if bands and start < bands[-1][1]:
                bands[-1] = (bands[-1][0], max(end, bands[-1][1]))
            else:
                bands.append((start, end))
        rows = self._reader.tensors[name][0][0]
        edges = [0, *(edge for band in bands for edge in band), rows]
        if any(edges[i] != edges[i + 1] for i in range(0, len(edges), 2)):
            raise UserError(f"{self._reader.path}: {name} is not completely stored; save it again")
        return bands


def _place(chunk: Any, first: int) -> tuple[slice, ...]:
    """Where an item lies in a tensor that begins with row ``first``."""
    starts = [chunk.offsets[0] - first, *chunk.offsets[1:]]
    return tuple(slice(start, start + size) for start, size in zip(starts, chunk.sizes, strict=True))


def _grouped(bands: Iterable[Rows], row_bytes: int) -> Iterator[Rows]:
    """Neighbouring bands joined as long as they stay within a piece's usual size."""
    local_shard: Rows | None = None
    for start, end in bands:
        if local_shard is not None and (end - local_shard[0]) * row_bytes <= pieces.PIECE_BYTES:
            local_shard = (local_shard[0], end)
            continue
        if local_shard is not None:
            yield local_shard
        local_shard = (start, end)
    if local_shard is not None:
        yield local_shard
