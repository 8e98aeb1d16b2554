"""Ranged reading of a distributed checkpoint written by any number of processes in any sharding.

torch's own reader loads whole stored pieces. Here only the bytes that are asked for are read: each stored piece is a
``torch.save`` archive, that is an uncompressed zip file whose one storage lies at a known place, and a small pickle
that gives its strides.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.checkpoint.checksum import file_checksum
from mindspeed_mm.training.checkpoint.dcp_metadata import METADATA, read_metadata
from mindspeed_mm.training.checkpoint.safetensors_io import read_tensor


@dataclasses.dataclass(frozen=True)
class StoredPiece:
    """Where a stored piece lies: absolute byte offset of its first element, its shape, and its strides in elements."""

    path: Path
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the order of the axes; the stride of an axis of length 1 says nothing."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and stride != step:
                return False
            step *= extent
        return True


class DcpReader:
    """The tensors of one checkpoint directory.

    Attributes:
        path: the directory.
        tensors: shape and type by name; entries that are no tensors are left out.
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
        recorded = (manifest or {"files": {}})["files"].get(METADATA)
        if recorded and file_checksum(path / METADATA) != recorded["checksum"]:
            raise UserError(f"{path / METADATA} has another checksum than recorded; restore it or make it again")
        self._metadata = read_metadata(path / METADATA)
        entries = self._metadata.state_dict_metadata
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places: dict[tuple[str, tuple[int, ...]], StoredPiece] = {}
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
        place = self._place(name, chunk, dtype)
        if rows is None:
            return read_tensor(place.path, place.start, dtype, place.shape)
        if not place.is_contiguous:
            span = 1 + sum((e - 1) * s for e, s in zip(place.shape, place.stride, strict=True))
            elements = read_tensor(place.path, place.start, dtype, (span,))
            return elements.as_strided(place.shape, place.stride)[rows[0] : rows[1]].contiguous()
        row_bytes = math.prod(place.shape[1:]) * dtype.itemsize
        shape = (rows[1] - rows[0], *place.shape[1:])
        return read_tensor(place.path, place.start + rows[0] * row_bytes, dtype, shape)

    def _chunks(self, name: str) -> list[ChunkStorageMetadata]:
        return self._metadata.state_dict_metadata[name].chunks

    def _place(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> StoredPiece:
        key = (name, tuple(chunk.offsets))
        with self._lock:
            known = self._places.get(key)
        if known is None:
            info = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            path = self.path / info.relative_path
            if getattr(info, "transform_descriptors", None):
                raise UserError(f"{path}: {name} is stored compressed or transformed, which is not supported")
            known = _locate(path, info.offset, info.length, name, tuple(chunk.sizes), dtype)
            with self._lock:
                self._places[key] = known
        return known


def _locate(
    path: Path, offset: int, length: int, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> StoredPiece:
    """Find the elements of a ``torch.save`` archive that lies in ``length`` bytes from ``offset`` of a file.

    Raises:
        UserError: if the archive is damaged, or holds something else than a tensor of this shape and type.
    """
    try:
        with path.open("rb") as file:
            section = io.BufferedReader(_Section(file.fileno(), offset, length))
            archive = zipfile.ZipFile(section)
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            pickled = _stored_bytes(section, entries["data.pkl"])
            layout = _LayoutUnpickler(io.BytesIO(pickled)).load()
            storage = entries[f"data/{layout.key}"]
            start = offset + _data_start(section, storage) + layout.storage_offset * dtype.itemsize
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make zipfile and pickle raise almost anything
        raise UserError(
            f"{path}: {name} cannot be read ({type(error).__name__}); the file is damaged, restore or make it again"
        ) from error
    if layout.shape != shape or layout.dtype != dtype:
        raise UserError(
            f"{path}: {name} is stored as {list(layout.shape)} {layout.dtype} and .metadata says {list(shape)} "
            f"{dtype}; the checkpoint is damaged, make it again"
        )
    return StoredPiece(path, start, shape, layout.stride)


class _Section(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._position))
        done = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._offset + self._position)
        self._position += done
        return done


def _data_start(section: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begin: its local header is 30 bytes, then name and padding of the lengths given there."""
    section.seek(entry.header_offset)
    header = section.read(30)
    if entry.compress_type != zipfile.ZIP_STORED or header[:4] != b"PK\x03\x04":
        raise ValueError("no stored entry")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _stored_bytes(section: io.BufferedReader, entry: zipfile.ZipInfo) -> bytes:
    # Not through zipfile: torch can be told to leave out the checksums, which zipfile insists on.
    section.seek(_data_start(section, entry))
    return section.read(entry.file_size)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What the pickle of a saved tensor says: storage key, type, offset in elements, shape and strides in elements."""

    key: str
    dtype: torch.dtype
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class _LayoutUnpickler(pickle.Unpickler):
    """Reads the layout of a saved tensor and nothing else; builds no storage and calls no foreign code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _layout
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} in a stored tensor")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = pid
        return key, dtype


def _layout(
    storage: tuple[str, torch.dtype], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Layout:
    key, dtype = storage
    return _Layout(key, dtype, offset, tuple(size), tuple(stride))

