"""Writes one rank's chunks of a checkpoint in torch's file format, with their checksums."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.dcp_format import StoredChunk, archive_frame, can_frame
from mindspeed_mm.checkpoint.directory import WrittenFile
from mindspeed_mm.checkpoint.files import OutputFile, combine, crc32, format_checksum, new_file
from mindspeed_mm.checkpoint.safetensors_io import tensor_bytes
from mindspeed_mm.checkpoint.shards import Chunk, total_bytes

MIN_FILE_BYTES = 256 << 20
"""A rank that writes more than this begins another file, in another thread."""
MAX_THREADS = 4


class SaveAborted(Exception):
    """Another rank failed to write, so this one stops."""


@dataclasses.dataclass(frozen=True)
class RankFile:
    """One file of one rank, flushed to disk."""

    name: str
    size: int
    checksum: str
    chunks: list[StoredChunk]

    @property
    def written(self) -> WrittenFile:
        """For the manifest."""
        return WrittenFile(self.size, self.checksum, [(c.offset, c.length, c.checksum) for c in self.chunks])

    def to_json(self) -> dict[str, Any]:
        """As plain lists and strings, for another rank."""
        chunks = [
            [c.name, str(c.dtype).removeprefix("torch."), c.global_shape, c.offsets, c.shape, c.offset, c.length,
             c.checksum]
            for c in self.chunks
        ]
        return {"name": self.name, "size": self.size, "checksum": self.checksum, "chunks": chunks}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RankFile:
        """Inverse of ``to_json``."""
        chunks = [
            StoredChunk(
                name, getattr(torch, dtype), tuple(global_shape), tuple(offsets), tuple(shape), content["name"], *stored
            )
            for name, dtype, global_shape, offsets, shape, *stored in content["chunks"]
        ]
        return cls(content["name"], content["size"], content["checksum"], chunks)


def write_rank_files(
    directory: Path, chunks: Sequence[Chunk], *, rank: int, should_continue: Callable[[], bool] = lambda: True
) -> list[RankFile]:
    """Write chunks into this rank's files and flush them to disk.

    Args:
        directory: must exist.
        chunks: their values may be on any device.
        rank: of this process; part of the file names.
        should_continue: called before each chunk.

    Raises:
        OSError: if writing failed.
        SaveAborted: if ``should_continue`` returned False.
    """
    if not chunks:
        return []
    files = _divide(chunks, max(1, min(MAX_THREADS, total_bytes(chunks) // MIN_FILE_BYTES)))
    paths = [directory / f"__{rank}_{number}.distcp" for number in range(len(files))]
    with ThreadPoolExecutor(len(files), thread_name_prefix="save") as pool:
        return list(pool.map(lambda path, content: _write_file(path, content, should_continue), paths, files))


def _divide(chunks: Sequence[Chunk], count: int) -> list[list[Chunk]]:
    """Divide chunks, in their order, into ``count`` files of about the same size."""
    share, files, nbytes = total_bytes(chunks) / count, [[]], 0
    for chunk in chunks:
        if nbytes >= share * len(files) and len(files) < count:
            files.append([])
        files[-1].append(chunk)
        nbytes += chunk.values.nbytes
    return files


def _write_file(path: Path, chunks: Sequence[Chunk], should_continue: Callable[[], bool]) -> RankFile:
    stored = []
    with new_file(path) as file:
        for chunk in chunks:
            if not should_continue():
                raise SaveAborted
            offset = file.length
            checksum = _write_chunk(file, chunk)
            dtype, shape = chunk.values.dtype, tuple(chunk.values.shape)
            stored.append(
                StoredChunk(
                    chunk.name, dtype, chunk.global_shape, chunk.offsets, shape, path.name, offset,
                    file.length - offset, checksum,
                )
            )
    return RankFile(path.name, file.length, format_checksum(file.crc), stored)


def _write_chunk(file: OutputFile, chunk: Chunk) -> str:
    values = chunk.values.cpu().contiguous()
    if not can_frame(values):
        buffer = io.BytesIO()
        torch.save(values.clone(), buffer)
        content = buffer.getbuffer()
        crc = crc32(content)
        file.write(content, crc=crc)
        return format_checksum(crc)
    data = tensor_bytes(values)
    data_crc = crc32(data)
    head, tail = archive_frame(values, data_crc)
    crc = crc32(tail, combine(crc32(head), data_crc, len(data)))
    file.write(head, data, tail, crc=crc)
    return format_checksum(crc)
