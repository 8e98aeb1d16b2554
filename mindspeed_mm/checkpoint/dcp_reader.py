"""Ranged reading of a distributed checkpoint written by any number of ranks in any sharding.

torch's own reader loads whole stored chunks. ``DcpReader`` reads the requested bytes only; ``ChunkReader`` reads whole
chunks where the manifest has their checksums, and compares these on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mindspeed_mm.checkpoint import safetensors_io
from mindspeed_mm.checkpoint.dcp_format import ArchivedTensor, find_tensor, read_metadata
from mindspeed_mm.checkpoint.directory import METADATA
from mindspeed_mm.checkpoint.files import crc32, file_checksum, format_checksum
from mindspeed_mm.checkpoint.safetensors_io import read_tensor, split_rows, tensor_bytes
from mindspeed_mm.errors import UserError

Rows = tuple[int, int]
"""First row and end, exclusive."""


class DcpReader:
    """The tensors of one checkpoint directory.

    Attributes:
        path: the directory.
        tensors: shape and dtype by name, without entries that are not tensors.
        files_with_chunk_checksums: files for which the manifest has a checksum of each chunk.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            path: the directory.
            manifest: its manifest, to compare ``.metadata`` with.

        Raises:
            UserError: if ``.metadata`` is missing, unreadable or not the recorded one.
        """
        self.path = path
        files = (manifest or {"files": {}})["files"]
        recorded = files.get(METADATA)
        if recorded and file_checksum(path / METADATA) != recorded["checksum"]:
            raise UserError(f"{path / METADATA} has another checksum than recorded; restore it or make it again")
        self._metadata = read_metadata(path / METADATA)
        entries = self._metadata.state_dict_metadata
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._files = None if manifest is None else frozenset(manifest["files"])
        self.files_with_chunk_checksums = {file for file, facts in files.items() if facts.get("items")}
        self._checksums = {
            (file, offset, length): checksum
            for file in self.files_with_chunk_checksums
            for offset, length, checksum in files[file]["items"]
        }
        self._located: dict[tuple[str, tuple[int, ...]], tuple[Path, ArchivedTensor]] = {}
        self._lock = threading.Lock()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or rows [a, b) of it on axis 0, assembled from its stored chunks.

        Raises:
            UserError: if the chunks do not cover it, or cannot be read.
        """
        shape, dtype = self.tensors[name]
        if not shape:
            return self._read_rows(name, self._chunks(name)[0], None)
        first, last = rows or (0, shape[0])
        result: Tensor | None = None
        covered = 0
        for chunk in self._chunks(name):
            begin = max(first, chunk.offsets[0])
            end = min(last, chunk.offsets[0] + chunk.sizes[0])
            if begin >= end or 0 in chunk.sizes:
                continue
            values = self._read_rows(name, chunk, (begin - chunk.offsets[0], end - chunk.offsets[0]))
            covered += values.numel()
            if tuple(values.shape) == (last - first, *shape[1:]):
                return values
            if result is None:
                result = torch.empty((last - first, *shape[1:]), dtype=dtype)
            index = [slice(begin - first, end - first)]
            index += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            result[tuple(index)] = values
        if result is None or covered != result.numel():
            raise UserError(f"{self.path}: rows {first} to {last} of {name} are not completely stored; save it again")
        return result

    def _read_rows(self, name: str, chunk: ChunkStorageMetadata, rows: Rows | None) -> Tensor:
        """Read rows [a, b) of a chunk; None for a chunk without axes."""
        path, archived = self._locate(name, chunk)
        dtype = archived.dtype
        if rows is None:
            return read_tensor(path, archived.start, dtype, archived.shape)
        if not archived.is_contiguous:
            elements = read_tensor(path, archived.start, dtype, (archived.span,))
            return elements.as_strided(archived.shape, archived.stride)[rows[0] : rows[1]].contiguous()
        row_bytes = math.prod(archived.shape[1:]) * dtype.itemsize
        shape = (rows[1] - rows[0], *archived.shape[1:])
        return read_tensor(path, archived.start + rows[0] * row_bytes, dtype, shape)

    def chunks(self, name: str) -> list[tuple[ChunkStorageMetadata, Any]]:
        """The chunks of a tensor, each with its storage (``relative_path``, ``offset``, ``length``)."""
        return [(chunk, self._info(name, chunk)) for chunk in self._chunks(name)]

    def read_chunk(self, name: str, chunk: ChunkStorageMetadata, *, check: bool) -> Tensor:
        """Read a whole chunk, including the archive around its values.

        Args:
            name: of the tensor.
            chunk: one of its chunks.
            check: compare its checksum, if the manifest has it.

        Raises:
            UserError: if it cannot be read, is damaged, or is not what ``.metadata`` says.
        """
        info = self._info(name, chunk)
        path, dtype = self.path / info.relative_path, self.tensors[name][1]
        content = read_tensor(path, info.offset, torch.uint8, (info.length,))
        if check and info.relative_path in self.files_with_chunk_checksums:
            recorded = self._checksums.get((info.relative_path, info.offset, info.length))
            if recorded != format_checksum(crc32(tensor_bytes(content))):
                raise UserError(f"{path}: {name} has another checksum than recorded; restore the file or another "
                                "checkpoint")

        def read(buffer: memoryview, position: int) -> int:
            buffer[:] = tensor_bytes(content)[position : position + len(buffer)]
            return len(buffer)

        with _naming_damage(path, name):
            archived = find_tensor(read, info.length)
            values = content[archived.start : archived.start + archived.span * dtype.itemsize]
            values = values.clone() if archived.start % dtype.itemsize else values
            tensor = values.view(dtype).as_strided(archived.shape, archived.stride)
        _check_layout(path, name, archived, chunk, dtype)
        return tensor

    def _info(self, name: str, chunk: ChunkStorageMetadata) -> Any:
        info = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        if self._files is not None and info.relative_path not in self._files:
            raise UserError(f"{self.path / METADATA} names {info.relative_path}, which the manifest does not have")
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{self.path / info.relative_path}: {name} is stored compressed or transformed, which is not supported"
            )
        return info

    def _chunks(self, name: str) -> list[ChunkStorageMetadata]:
        return self._metadata.state_dict_metadata[name].chunks

    def _locate(self, name: str, chunk: ChunkStorageMetadata) -> tuple[Path, ArchivedTensor]:
        """The file of a chunk, and the location of its values in that file."""
        key, dtype = (name, tuple(chunk.offsets)), self.tensors[name][1]
        with self._lock:
            known = self._located.get(key)
        if known is None:
            info = self._info(name, chunk)
            path = self.path / info.relative_path
            with _naming_damage(path, name), path.open("rb") as file:
                archived = find_tensor(lambda b, at: os.preadv(file.fileno(), [b], info.offset + at), info.length)
            _check_layout(path, name, archived, chunk, dtype)
            known = path, dataclasses.replace(archived, start=archived.start + info.offset)
            with self._lock:
                self._located[key] = known
        return known


@contextlib.contextmanager
def _naming_damage(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make zipfile and pickle raise almost anything
        raise UserError(
            f"{path}: {name} cannot be read ({type(error).__name__}); the file is damaged, restore or make it again"
        ) from error


def _check_layout(
    path: Path, name: str, archived: ArchivedTensor, chunk: ChunkStorageMetadata, dtype: torch.dtype
) -> None:
    if archived.shape != tuple(chunk.sizes) or archived.dtype != dtype:
        raise UserError(
            f"{path}: {name} is stored as {list(archived.shape)} {archived.dtype} and .metadata says "
            f"{list(chunk.sizes)} {dtype}; the checkpoint is damaged, make it again"
        )


class ChunkReader:
    """Reads rows of parameters in bounded memory.

    Where the manifest has checksums of chunks, as every checkpoint of this package has, whole chunks are read and
    compared, each once. Files written by other programs are read by ranges of rows.
    """

    def __init__(self, reader: DcpReader, *, check: bool) -> None:
        """
        Args:
            reader: the checkpoint.
            check: compare checksums.
        """
        self._reader = reader
        self._check = check

    def files_without_chunk_checksums(self, names: Iterable[str]) -> set[str]:
        """Files of these parameters that have no checksums of chunks and must be checked as a whole."""
        files = {info.relative_path for name in names for _, info in self._reader.chunks(name)}
        return files - self._reader.files_with_chunk_checksums

    def ranges(self, name: str) -> list[Rows]:
        """Ranges of rows, to be read one by one, that make up the whole parameter."""
        shape, dtype = self._reader.tensors[name]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if not self._has_chunk_checksums(name):
            return split_rows(shape[0], row_bytes)
        return list(_grouped(self._bands(name), row_bytes))

    def read(self, name: str, rows: Rows) -> Tensor:
        """Rows [a, b) of a parameter; one of its ``ranges``, or all of it.

        Raises:
            UserError: if a chunk is missing, damaged or unreadable.
        """
        if not self._has_chunk_checksums(name):
            return self._reader.read(name, rows)
        first, last = rows
        shape, dtype = self._reader.tensors[name]
        result, covered = None, 0
        for chunk, _ in self._reader.chunks(name):
            if chunk.offsets[0] >= last or chunk.offsets[0] + chunk.sizes[0] <= first or 0 in chunk.sizes:
                continue
            values = self._reader.read_chunk(name, chunk, check=self._check)
            if tuple(values.shape) == (last - first, *shape[1:]):
                return values.contiguous()
            if result is None:
                result = torch.empty((last - first, *shape[1:]), dtype=dtype)
            result[_index_in_rows(chunk, first)] = values
            covered += values.numel()
        if result is None or covered != result.numel():
            raise UserError(
                f"{self._reader.path}: rows {first} to {last} of {name} are not completely stored; save it again"
            )
        return result

    def _has_chunk_checksums(self, name: str) -> bool:
        files = {info.relative_path for _, info in self._reader.chunks(name)}
        return files <= self._reader.files_with_chunk_checksums

    def _bands(self, name: str) -> list[Rows]:
        """The finest ranges of rows whose limits no chunk crosses."""
        spans = sorted(
            (chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
            for chunk, _ in self._reader.chunks(name)
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


def _index_in_rows(chunk: ChunkStorageMetadata, first: int) -> tuple[slice, ...]:
    """Index of a chunk in a tensor that begins with row ``first``."""
    starts = [chunk.offsets[0] - first, *chunk.offsets[1:]]
    return tuple(slice(start, start + size) for start, size in zip(starts, chunk.sizes, strict=True))


def _grouped(bands: Iterable[Rows], row_bytes: int) -> Iterator[Rows]:
    """Adjacent bands, merged up to ``ROW_CHUNK_BYTES``."""
    merged: Rows | None = None
    for start, end in bands:
        if merged is not None and (end - merged[0]) * row_bytes <= safetensors_io.ROW_CHUNK_BYTES:
            merged = (merged[0], end)
            continue
        if merged is not None:
            yield merged
        merged = (start, end)
    if merged is not None:
        yield merged
