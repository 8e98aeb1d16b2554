"""Writing one process's part of a checkpoint: torch's file format, summed while it is written."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint import torch_archive
from mindspeed_mm.checkpoint.checksum import combine, crc32, format_checksum
from mindspeed_mm.checkpoint.dcp_metadata import StoredItem
from mindspeed_mm.checkpoint.directory import WrittenFile
from mindspeed_mm.checkpoint.files import OutputFile, new_file
from mindspeed_mm.checkpoint.safetensors_io import tensor_bytes
from mindspeed_mm.checkpoint.shards import Item, bytes_of

FILE_BYTES = 256 << 20
"""A second file is begun, by a second thread, where a process has more than this to write."""
MAX_THREADS = 4


class Abandoned(Exception):
    """Another process could not write its part; this one need not go on."""


@dataclasses.dataclass(frozen=True)
class WrittenItem:
    """An item in its file: which bytes, and their checksum."""

    item: Item
    offset: int
    length: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of one process, on the disk."""

    name: str
    size: int
    checksum: str
    items: list[WrittenItem]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and words, for another process."""
        items = [
            [w.item.name, str(w.item.values.dtype).removeprefix("torch."), list(w.item.whole), list(w.item.offsets),
             list(w.item.values.shape), w.offset, w.length, w.checksum]
            for w in self.items
        ]
        return {"name": self.name, "size": self.size, "checksum": self.checksum, "items": items}


def read_shard(content: dict[str, Any]) -> tuple[WrittenFile, list[StoredItem]]:
    """What ``Shard.to_json`` says, for the manifest and for ``.metadata``."""
    items = [
        StoredItem(name, getattr(torch, dtype), tuple(whole), tuple(offsets), tuple(shape), content["name"], at, size)
        for name, dtype, whole, offsets, shape, at, size, _ in content["items"]
    ]
    parts = [(at, size, checksum) for *_, at, size, checksum in content["items"]]
    return WrittenFile(content["size"], content["checksum"], parts), items


def write_shards(
    directory: Path, items: Sequence[Item], *, rank: int, go_on: Callable[[], bool] = lambda: True
) -> list[Shard]:
    """Write items into files of this process's own, and flush them to disk.

    Args:
        directory: exists.
        items: their values may be on any device.
        rank: of this process, which names the files.
        go_on: asked before each item.

    Raises:
        OSError: if writing failed.
        Abandoned: if ``go_on`` said so.
    """
    if not items:
        return []
    files = _deal_out(items, max(1, min(MAX_THREADS, bytes_of(items) // FILE_BYTES)))
    names = [f"__{rank}_{number}.distcp" for number in range(len(files))]
    with ThreadPoolExecutor(len(files), thread_name_prefix="save") as pool:
        return list(pool.map(lambda name, part: _write_file(directory / name, part, go_on), names, files))


def _deal_out(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Spread items over ``count`` files of about the same size, in their order."""
    share, files, local_shard = bytes_of(items) / count, [[]], 0
    for item in items:
        if local_shard >= share * len(files) and len(files) < count:
            files.append([])
        files[-1].append(item)
        local_shard += item.values.nbytes
    return files


def _write_file(path: Path, items: Sequence[Item], go_on: Callable[[], bool]) -> Shard:
    written = []
    with new_file(path) as file:
        for item in items:
            if not go_on():
                raise Abandoned
            offset = file.length
            checksum = _write_item(file, item)
            written.append(WrittenItem(item, offset, file.length - offset, checksum))
    return Shard(path.name, file.length, format_checksum(file.crc), written)


def _write_item(file: OutputFile, item: Item) -> str:
    values = item.values.cpu().contiguous()
    if not torch_archive.fits(values):
        buffer = io.BytesIO()
        torch.save(values.clone(), buffer)
        content = buffer.getbuffer()
        crc = crc32(content)
        file.write(content, crc=crc)
        return format_checksum(crc)
    data = tensor_bytes(values)
    inner = crc32(data)
    head, tail = torch_archive.frame(values, inner)
    crc = crc32(tail, combine(crc32(head), inner, len(data)))
    file.write(head, data, tail, crc=crc)
    return format_checksum(crc)
