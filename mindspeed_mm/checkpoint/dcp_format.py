"""The files of PyTorch's distributed checkpoints (DCP): ``.metadata``, and chunks written by ``torch.save``.

``.metadata`` says which chunk of which tensor is in which file. It is a pickle, and unpickling can run any code that
the file names; here only the record types of the format are admitted, so a checkpoint from any source can be opened.

A chunk is a ``torch.save`` archive, an uncompressed zip file: ``data.pkl`` describes the tensor, ``data/0`` holds its
values. ``torch.save`` computes the zip's checksum while it holds Python's lock; ``archive_frame`` makes the bytes
around values whose checksum is known. ``find_tensor`` locates the values of an archive without running foreign code.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the record type of the format itself
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mindspeed_mm.checkpoint.files import crc32, new_file
from mindspeed_mm.errors import UserError

MODEL_PREFIX = "model."
"""Begins the names of the model's parameters in a checkpoint; the rest is the parameter's name in the model."""
_ALIGNMENT = 64  # bytes, of the values within the archive, as in torch
_LIMIT = 2**32 - 1  # bytes; a larger zip file needs the zip64 format
_DOS_EPOCH = (0, 33)  # time and date of every entry, 1 January 1980: the same tensor gives the same bytes


@dataclasses.dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor in a file of a checkpoint.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        global_shape: of the tensor.
        offsets: first index of the chunk on each axis.
        shape: of the chunk.
        file: relative to the checkpoint's directory.
        offset, length: byte range in the file.
        checksum: of these bytes, as in a manifest.
    """

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    checksum: str


def write_metadata(path: Path, chunks: Iterable[StoredChunk]) -> None:
    """Write ``.metadata`` for these chunks and flush it to disk."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        entry = tensors.setdefault(
            chunk.name, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.global_shape), [])
        )
        offsets = torch.Size(chunk.offsets)
        storage[MetadataIndex(chunk.name, offsets, len(entry.chunks))] = _StorageInfo(
            chunk.file, chunk.offset, chunk.length
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.shape)))
    # The default planner records how a nested state dict was flattened; ours is flat.
    metadata = Metadata(tensors, planner_data={name: (name,) for name in tensors}, storage_data=storage)
    with new_file(path) as file:
        file.write(pickle.dumps(metadata, protocol=4))


def read_metadata(path: Path) -> Metadata:
    """Read ``.metadata`` without running anything that it names.

    Raises:
        UserError: if it is missing, damaged, or holds anything but the records of the format.
    """
    try:
        content = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}, so it is not a distributed checkpoint") from error
    except _Foreign as error:
        raise UserError(
            f"{path} asks for {error}, which is not part of a checkpoint; it was not run. Do not trust the checkpoint: "
            "take it from its source again"
        ) from error
    except Exception as error:  # unpickling damaged bytes raises almost anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({reason}); restore it or create the checkpoint again") from error
    if not isinstance(content, Metadata) or not isinstance(content.state_dict_metadata, dict):
        raise UserError(f"{path} has no description of a checkpoint; create the checkpoint again")
    return content


class _Foreign(pickle.UnpicklingError):
    """The pickle names something that is not in the format."""


_RECORDS = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    **{
        (records.__name__, name): getattr(records, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the records of the format and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return _joined  # the directory that it was written to, which is not used
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        try:
            return _RECORDS[module, name]
        except KeyError:
            raise _Foreign(f"{module}.{name}") from None


def _joined(*parts: str) -> str:
    return "/".join(map(str, parts))


class _TensorPickler(pickle.Pickler):
    """Pickles the description of a tensor, with a reference in place of its storage."""

    def __init__(self, out: io.BytesIO, elements: int) -> None:
        super().__init__(out, protocol=2)
        self._elements = elements

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return ("storage", _storage_class(obj.dtype), "0", "cpu", self._elements)
        return None


def _storage_class(dtype: torch.dtype) -> type:
    names = {torch.float64: "Double", torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    return getattr(torch, f"{names[dtype]}Storage")


def can_frame(tensor: Tensor) -> bool:
    """Whether ``archive_frame`` supports a tensor: smaller than 4 GB, and of a floating-point type."""
    return tensor.nbytes < _LIMIT - (1 << 20) and tensor.dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
    )


def archive_frame(tensor: Tensor, crc: int) -> tuple[bytes, bytes]:
    """The bytes before and after the values of a tensor in its archive.

    Args:
        tensor: contiguous.
        crc: CRC-32 of its values.
    """
    head, directory = bytearray(), bytearray()
    _add_entry(head, directory, "archive/data.pkl", _description(tensor.shape, tensor.dtype))
    _add_entry(head, directory, "archive/byteorder", sys.byteorder.encode())
    _add_header(head, directory, "archive/data/0", crc, tensor.nbytes, aligned=True)
    start_of_tail = len(head) + tensor.nbytes
    tail = bytearray()
    _add_entry(tail, directory, "archive/version", b"3\n", shift=start_of_tail)
    count = 4
    position = start_of_tail + len(tail)
    tail += directory
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), position, 0)
    return bytes(head), bytes(tail)


@functools.lru_cache(maxsize=4096)  # layers have the same shapes
def _description(shape: torch.Size, dtype: torch.dtype) -> bytes:
    out = io.BytesIO()
    tensor = torch.empty(shape, dtype=dtype)  # its memory is never touched
    _TensorPickler(out, tensor.numel()).dump(tensor)
    return out.getvalue()


def _add_entry(out: bytearray, directory: bytearray, name: str, content: bytes, *, shift: int = 0) -> None:
    _add_header(out, directory, name, crc32(content), len(content), shift=shift)
    out += content


def _add_header(
    out: bytearray, directory: bytearray, name: str, crc: int, size: int, *, shift: int = 0, aligned: bool = False
) -> None:
    """Append the local header of an entry to ``out``, and its record to the archive's central directory.

    Args:
        shift: bytes of the archive before ``out``.
        aligned: pad the header so that the content begins at a multiple of ``_ALIGNMENT``.
    """
    position = shift + len(out)
    padding = b""
    if aligned:
        missing = -(position + 30 + len(name) + 4) % _ALIGNMENT
        padding = struct.pack("<2sH", b"FB", missing) + b"Z" * missing
    # version needed, flags, method (stored), time, date, checksum, size as stored, size, lengths of name and extra
    common = struct.pack("<5H3L", 20, 0, 0, *_DOS_EPOCH, crc, size, size)
    encoded = name.encode()
    out += b"PK\3\4" + common + struct.pack("<2H", len(encoded), len(padding)) + encoded + padding
    directory += b"PK\1\2" + struct.pack("<H", 20) + common
    directory += struct.pack("<5H2L", len(encoded), 0, 0, 0, 0, 0, position) + encoded


ReadInto = Callable[[memoryview, int], int]
"""Fills a buffer from the given byte of the archive on; returns the number of bytes read."""


@dataclasses.dataclass(frozen=True)
class ArchivedTensor:
    """A tensor in an archive: byte of its first element, dtype, shape, and strides in elements."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are in row-major order; the stride of an axis of length 1 is ignored."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and stride != step:
                return False
            step *= extent
        return True

    @property
    def span(self) -> int:
        """Number of elements from the first to the last in memory."""
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.stride, strict=True))


def find_tensor(read: ReadInto, length: int) -> ArchivedTensor:
    """Find the elements of the one tensor of an archive of ``length`` bytes.

    Raises:
        Exception: of almost any type, if the archive is damaged or is not a tensor.
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
    """File interface to an archive within a file or in memory."""

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
    """Offset of an entry's data, after its local header: 30 bytes, then name and padding of the lengths given there."""
    section.seek(entry.header_offset)
    header = section.read(30)
    if entry.compress_type != zipfile.ZIP_STORED or header[:4] != b"PK\x03\x04":
        raise ValueError("no stored entry")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _stored_bytes(section: io.BufferedReader, entry: zipfile.ZipInfo) -> bytes:
    # Not through zipfile, which requires the checksums that torch can be configured to omit.
    section.seek(_data_start(section, entry))
    return section.read(entry.file_size)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Description of a saved tensor: storage key, dtype, and offset, shape and strides in elements."""

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
    """Reads only the layout of a saved tensor; builds no storage and calls no foreign code."""

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
