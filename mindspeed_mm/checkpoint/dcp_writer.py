"""Writing a distributed checkpoint file by file, from tensors that are made on demand.

torch's own writer wants the whole state dict in memory. The files are the same: each holds tensors saved by
``torch.save`` one after another, and ``.metadata`` says where each piece of each tensor lies.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint import torch_archive
from mindspeed_mm.checkpoint.checksum import combine, crc32, format_checksum
from mindspeed_mm.checkpoint.dcp_metadata import StoredItem
from mindspeed_mm.checkpoint.directory import WrittenFile
from mindspeed_mm.checkpoint.executor import WRITE_BYTES, ByteBudget, Progress
from mindspeed_mm.checkpoint.hf_source import HFSource, ReadRange
from mindspeed_mm.checkpoint.pieces import split_rows
from mindspeed_mm.checkpoint.safetensors_io import tensor_bytes
from mindspeed_mm.models.state_dict import WeightRule

PREFIX = "model."
FILE_BYTES = 1 << 30
"""Size at which a file is closed: what an interruption can cost, per worker."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows [first, last) of one mcore parameter, stored as one item."""

    rule: WeightRule
    first: int
    last: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored item."""
        return (self.last - self.first, *self.rule.target_shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored item."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass
class Item:
    """A stored piece: where it lies in its file, the CRC-32 of its values, and the checksum of all its bytes there."""

    target: str
    first: int
    rows: int
    offset: int
    length: int
    crc: int
    checksum: str


@dataclasses.dataclass
class FileRecord:
    """What one finished file holds, and which source bytes went into it; kept in the journal as JSON."""

    size: int
    checksum: str
    items: list[Item]
    reads: list[ReadRange]

    @property
    def written(self) -> WrittenFile:
        """For the manifest."""
        return WrittenFile(self.size, self.checksum, [(i.offset, i.length, i.checksum) for i in self.items])

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> FileRecord:
        """Inverse of ``to_json``."""
        items = [Item(**item) for item in content["items"]]
        return cls(content["size"], content["checksum"], items, [ReadRange(**read) for read in content["reads"]])


def plan_files(source: HFSource, dtype: torch.dtype | None) -> dict[str, list[Piece]]:
    """Divide all parameters into pieces and the pieces into files, in the order of the weight map.

    Args:
        source: what is converted.
        dtype: type to store, None for each tensor's own.
    """
    files: list[list[Piece]] = [[]]
    local_shard = 0
    for rule in source.rules:
        stored = dtype or source.dtype_of(rule)
        rows = rule.target_shape[0]
        row_bytes = math.prod(rule.target_shape[1:]) * stored.itemsize
        for first, last in split_rows(rows, row_bytes) if rule.row_wise else [(0, rows)]:
            piece = Piece(rule, first, last, stored)
            if local_shard and local_shard + piece.nbytes > FILE_BYTES:
                files.append([])
                local_shard = 0
            files[-1].append(piece)
            local_shard += piece.nbytes
    return {f"__0_{number}.distcp": pieces for number, pieces in enumerate(files)}


def write_file(
    path: Path, pieces: Sequence[Piece], source: HFSource, *, budget: ByteBudget, progress: Progress
) -> FileRecord:
    """Write one file of pieces, flush it to disk and return its record."""
    items: list[Item] = []
    reads: list[ReadRange] = []
    with path.open("wb") as file:
        stream = _CountingStream(file, progress)
        for piece in pieces:
            # Source and result are both held, and a change of type holds one more.
            with budget.take(3 * piece.nbytes):
                offset = stream.position
                tensor, crc = _resolve(piece, source, reads)
                checksum = format_checksum(stream.save(tensor, crc))
                del tensor
            length = stream.position - offset
            items.append(Item(piece.rule.target, piece.first, piece.last - piece.first, offset, length, crc, checksum))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(stream.position, format_checksum(stream.crc), items, reads)


def _resolve(piece: Piece, source: HFSource, reads: list[ReadRange]) -> tuple[torch.Tensor, int]:
    """The values of a piece and their checksum; the ranges read are appended to ``reads``."""
    rows = (piece.first, piece.last) if piece.rule.row_wise else None
    parts = [source.read(name, rows) for name, _ in piece.rule.sources]
    reads.extend(read for _, read in parts)
    tensor = piece.rule.to_mcore([part for part, _ in parts]).to(piece.dtype)
    if piece.rule.is_copy and piece.dtype == parts[0][0].dtype:
        return tensor, parts[0][1].crc
    return tensor, crc32(tensor_bytes(tensor))


class _CountingStream:
    """A binary file that keeps its position and checksum, and advances the progress bar."""

    def __init__(self, file: Any, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.position = 0
        self.crc = 0

    def save(self, tensor: torch.Tensor, crc: int) -> int:
        """Write a tensor as ``torch.save`` does, its values having the checksum ``crc``; returns that of the whole."""
        before, start, self.crc = self.crc, self.position, 0
        if torch_archive.fits(tensor):
            head, tail = torch_archive.frame(tensor, crc)
            self.write(head)
            self._write_parts(tensor_bytes(tensor))
            self.crc = combine(self.crc, crc, tensor.nbytes)
            self.write(tail)
        else:
            torch.save(tensor, self)
        whole = self.crc
        self.crc = combine(before, whole, self.position - start)
        return whole

    def write(self, data: Any) -> int:
        """Write any buffer; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self.crc = crc32(view, self.crc)
        self._write_parts(view)
        return len(view)

    def flush(self) -> None:
        """The file is flushed once, when it is complete."""

    def _write_parts(self, view: memoryview) -> None:
        for start in range(0, len(view), WRITE_BYTES):
            part = view[start : start + WRITE_BYTES]
            self._file.write(part)
            self._progress.advance(len(part))
        self.position += len(view)


def stored_items(files: dict[str, list[Piece]], records: dict[str, FileRecord]) -> list[StoredItem]:
    """All pieces, where they lie."""
    return [
        StoredItem(
            name=PREFIX + piece.rule.target,
            dtype=piece.dtype,
            whole=piece.rule.target_shape,
            offsets=(piece.first, *[0] * (len(piece.shape) - 1)),
            shape=piece.shape,
            file=file,
            offset=item.offset,
            length=item.length,
        )
        for file, pieces in files.items()
        for piece, item in zip(pieces, records[file].items, strict=True)
    ]


def tensor_facts(files: dict[str, list[Piece]], records: dict[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """Shape, type and checksum of every parameter, for the manifest."""
    crcs: dict[str, int] = {}
    facts: dict[str, dict[str, Any]] = {}
    for file, pieces in files.items():
        for piece, item in zip(pieces, records[file].items, strict=True):
            name = PREFIX + piece.rule.target
            # Pieces of a tensor follow one another, so their checksums join to that of the whole.
            crcs[name] = combine(crcs[name], item.crc, piece.nbytes) if name in crcs else item.crc
            facts[name] = {
                "shape": list(piece.rule.target_shape),
                "dtype": str(piece.dtype).removeprefix("torch."),
                "checksum": format_checksum(crcs[name]),
            }
    return facts
