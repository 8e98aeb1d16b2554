"""Where the values of a tensor saved by ``torch.save`` lie, found without building anything that the file asks for."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import torch

ReadInto = Callable[[memoryview, int], int]
"""Fills a buffer from a byte of the archive on; returns the number of bytes."""


@dataclasses.dataclass(frozen=True)
class ArchivedTensor:
    """A tensor in an archive: byte of its first element, its type, shape, and strides in elements."""

    start: int
    dtype: torch.dtype
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

    @property
    def span(self) -> int:
        """Elements from the first to the last, in memory."""
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.stride, strict=True))


def find_tensor(read: ReadInto, length: int) -> ArchivedTensor:
    """Find the elements of the one tensor of an archive of ``length`` bytes.

    Raises:
        Exception: of almost any kind, if the archive is damaged or holds something else than a tensor.
    """
    section = io.BufferedReader(_Section(read, length))
    archive = zipfile.ZipFile(section)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    pickled = _stored_bytes(section, entries["data.pkl"])
    layout = _LayoutUnpickler(io.BytesIO(pickled)).load()
    start = _data_start(section, entries[f"data/{layout.key}"]) + layout.storage_offset * layout.dtype.itemsize
    found = ArchivedTensor(start, layout.dtype, layout.shape, layout.stride)
    if min((*layout.shape, *layout.stride, start), default=0) < 0 or start + found.span * found.dtype.itemsize > length:
        raise ValueError("a tensor beyond the end")
    return found


class _Section(io.RawIOBase):
    """An archive within a file or in memory, as a file."""

    def __init__(self, read: ReadInto, length: int) -> None:
        self._read, self._length, self._position = read, length, 0

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
        done = self._read(memoryview(buffer)[:count], self._position)
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
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
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

