"""Ranged reading of a distributed checkpoint written by any number of processes in any sharding.

torch's own reader loads whole stored pieces. Here only the bytes that are asked for are read: each stored piece is a
``torch.save`` archive, that is an uncompressed zip file whose one storage lies at a known place, and a small pickle
that gives its strides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mindspeed_mm.checkpoint.archive_reader import ArchivedTensor, find_tensor
from mindspeed_mm.checkpoint.checksum import crc32, file_checksum, format_checksum
from mindspeed_mm.checkpoint.dcp_metadata import METADATA, read_metadata
from mindspeed_mm.checkpoint.safetensors_io import read_tensor, tensor_bytes
from mindspeed_mm.errors import UserError


class DcpReader:
    """The tensors of one checkpoint directory.

    Attributes:
        path: the directory.
        tensors: shape and type by name; entries that are no tensors are left out.
        summed: files whose parts have checksums of their own in the manifest.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            path: the directory.
            manifest: its manifest, to compare ``.metadata`` with.

        Raises:
            UserError: if ``.metadata`` is missing, unreadable or another one than recorded.
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
        self.summed = {file for file, facts in files.items() if facts.get("items")}
        self._checksums = {
            (file, offset, length): checksum
            for file in self.summed
            for offset, length, checksum in files[file]["items"]
        }
        self._places: dict[tuple[str, tuple[int, ...]], tuple[Path, ArchivedTensor]] = {}
        self._lock = threading.Lock()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or rows [a, b) of it on axis 0, joined from its stored pieces.

        Raises:
            UserError: if the stored pieces do not cover it, or cannot be read.
        """
        shape, dtype = self.tensors[name]
        if not shape:
            return self.read_piece(name, self._chunks(name)[0], None, dtype)
        first, last = rows or (0, shape[0])
        result: Tensor | None = None
        covered = 0
        for chunk in self._chunks(name):
            begin = max(first, chunk.offsets[0])
            end = min(last, chunk.offsets[0] + chunk.sizes[0])
            if begin >= end or 0 in chunk.sizes:
                continue
            part = self.read_piece(name, chunk, (begin - chunk.offsets[0], end - chunk.offsets[0]), dtype)
            covered += part.numel()
            if tuple(part.shape) == (last - first, *shape[1:]):
                return part
            if result is None:
                result = torch.empty((last - first, *shape[1:]), dtype=dtype)
            place = [slice(begin - first, end - first)]
            place += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            result[tuple(place)] = part
        if result is None or covered != result.numel():
            raise UserError(f"{self.path}: rows {first} to {last} of {name} are not completely stored; save it again")
        return result

    def read_piece(
        self, name: str, chunk: ChunkStorageMetadata, rows: tuple[int, int] | None, dtype: torch.dtype
    ) -> Tensor:
        """Read rows [a, b) of one stored piece; the whole of a piece without axes."""
        path, place = self._place(name, chunk, dtype)
        if rows is None:
            return read_tensor(path, place.start, dtype, place.shape)
        if not place.is_contiguous:
            elements = read_tensor(path, place.start, dtype, (place.span,))
            return elements.as_strided(place.shape, place.stride)[rows[0] : rows[1]].contiguous()
        row_bytes = math.prod(place.shape[1:]) * dtype.itemsize
        shape = (rows[1] - rows[0], *place.shape[1:])
        return read_tensor(path, place.start + rows[0] * row_bytes, dtype, shape)

    def items(self, name: str) -> list[tuple[ChunkStorageMetadata, Any]]:
        """The stored pieces of a tensor: which part of it, and where (file, offset, length)."""
        return [(chunk, self._info(name, chunk)) for chunk in self._chunks(name)]

    def read_item(self, name: str, chunk: ChunkStorageMetadata, *, check: bool) -> Tensor:
        """Read a stored piece in one go, with all that surrounds its values.

        Args:
            name: of the tensor.
            chunk: which piece.
            check: compare its checksum, if the manifest knows it.

        Raises:
            UserError: if it cannot be read, is damaged, or is not what ``.metadata`` says.
        """
        info = self._info(name, chunk)
        path, dtype = self.path / info.relative_path, self.tensors[name][1]
        content = read_tensor(path, info.offset, torch.uint8, (info.length,))
        if check and info.relative_path in self.summed:
            recorded = self._checksums.get((info.relative_path, info.offset, info.length))
            if recorded != format_checksum(crc32(tensor_bytes(content))):
                raise UserError(f"{path}: {name} has another checksum than recorded; restore the file or another "
                                "checkpoint")

        def read(buffer: memoryview, position: int) -> int:
            buffer[:] = tensor_bytes(content)[position : position + len(buffer)]
            return len(buffer)

        with _damage_named(path, name):
            place = find_tensor(read, info.length)
            values = content[place.start : place.start + place.span * dtype.itemsize]
            values = values.clone() if place.start % dtype.itemsize else values
            tensor = values.view(dtype).as_strided(place.shape, place.stride)
        _check_layout(path, name, place, chunk, dtype)
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

    def _place(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> tuple[Path, ArchivedTensor]:
        """The file of a stored piece, and where in the file its elements lie."""
        key = (name, tuple(chunk.offsets))
        with self._lock:
            known = self._places.get(key)
        if known is None:
            info = self._info(name, chunk)
            path = self.path / info.relative_path
            with _damage_named(path, name), path.open("rb") as file:
                place = find_tensor(lambda b, at: os.preadv(file.fileno(), [b], info.offset + at), info.length)
            _check_layout(path, name, place, chunk, dtype)
            known = path, dataclasses.replace(place, start=place.start + info.offset)
            with self._lock:
                self._places[key] = known
        return known


@contextlib.contextmanager
def _damage_named(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make zipfile and pickle raise almost anything
        raise UserError(
            f"{path}: {name} cannot be read ({type(error).__name__}); the file is damaged, restore or make it again"
        ) from error


def _check_layout(
    path: Path, name: str, place: ArchivedTensor, chunk: ChunkStorageMetadata, dtype: torch.dtype
) -> None:
    if place.shape != tuple(chunk.sizes) or place.dtype != dtype:
        raise UserError(
            f"{path}: {name} is stored as {list(place.shape)} {place.dtype} and .metadata says {list(chunk.sizes)} "
            f"{dtype}; the checkpoint is damaged, make it again"
        )
