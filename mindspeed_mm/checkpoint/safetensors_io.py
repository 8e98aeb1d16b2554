"""Ranged reading and sequential writing of safetensors files.

The format: eight bytes little-endian header length, a JSON header with dtype, shape and byte range of each tensor, then
the data. Reading by range instead of mapping whole files keeps the resident memory bounded and lets every fault of a
file be named before any of it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.directory import HEADER_BYTES, is_count, is_shape
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import kind_of, open_regular, reason, shorten

WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes of a model that trains here; others belong to quantised releases."""
DTYPES = {
    **WEIGHT_DTYPES, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
READ_BYTES = 16 << 20
"""Large tensors are read, converted and written in rows of about this size: small enough to stay in the cache from
reading to writing, and for malloc to reuse the memory."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a file: ``nbytes`` bytes from the absolute offset ``start``."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a safetensors file; its data begin at byte ``length``."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    length: int


def read_header(path: Path, *, dtypes: Mapping[str, torch.dtype] = WEIGHT_DTYPES) -> Header:
    """Read and check the header of a safetensors file, whose tensors must have one of ``dtypes``.

    Raises:
        UserError: if the file is unreadable, truncated or too long, if tensors do not fit their byte ranges, overlap or
            leave gaps, or if a dtype is not supported.
    """
    try:
        with os.fdopen(open_regular(path, limit=1 << 62), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, HEADER_BYTES):
                raise UserError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
            content = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header ({reason(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has a damaged header ({kind_of(content)}, not an object); download it again")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} has a damaged header: __metadata__ must map names to texts; download it again")
    start = 8 + length
    tensors = {name: _stored_tensor(path, name, entry, start, dtypes) for name, entry in content.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise UserError(f"{path}: the data of {tensor.name} overlap or leave a gap; download it again")
        end += tensor.nbytes
    if size != end:
        kind = "truncated" if size < end else "too long"
        raise UserError(f"{path} is {kind}: {size} bytes instead of {end}; download it again")
    return Header(tensors, metadata, start)


def _stored_tensor(
    path: Path, name: str, entry: Any, data_start: int, dtypes: Mapping[str, torch.dtype]
) -> StoredTensor:
    try:
        code, extents, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not is_shape(extents) or not is_count(begin) or not is_count(end):
            raise ValueError("shape and offsets must be whole numbers from 0")
        shape = tuple(extents)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the header entry of {shorten(name)} is damaged: {shorten(entry, 100)}; download it again"
        ) from error
    if not isinstance(code, str) or code not in dtypes:
        raise UserError(
            f"{path}: {shorten(name)} has type {shorten(code, 40)}; weights must be one of {', '.join(dtypes)} (take "
            "an unquantised release)"
        )
    dtype = dtypes[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != nbytes:
        raise UserError(f"{path}: {name} has {end - begin} bytes instead of {nbytes}; download it again")
    return StoredTensor(name, path, dtype, shape, data_start + begin, nbytes)


def build_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file with ``tensors`` (name, dtype, shape) in this order."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers may map the data, which then must be aligned
    return struct.pack("<Q", len(text)) + text


def read_tensor(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read a contiguous tensor from byte ``start`` of a file into new memory.

    Raises:
        UserError: if the file is too short or unreadable.
    """
    buffer = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    view = tensor_bytes(buffer)
    done = 0
    try:
        descriptor = open_regular(path, limit=1 << 62)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], start + done)
                if count == 0:
                    raise UserError(f"{path} became shorter while it was read; is another process writing it?")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return buffer.view(dtype).reshape(shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def listed(kind: str, names: Sequence[str]) -> list[str]:
    """``3 tensors missing: a, b, c`` with at most three of the names; no line if there are none."""
    if not names:
        return []
    more = ", ..." if len(names) > 3 else ""
    return [f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {', '.join(names[:3])}{more}"]


def split_rows(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Split ``rows`` rows of ``row_bytes`` bytes into ranges [a, b) of about ``READ_BYTES``.

    A divisor of ``rows`` close to that size is preferred, so that experts are split at powers of two and the shard of
    an expert-parallel rank consists of whole chunks.
    """
    fitting = max(1, READ_BYTES // max(1, row_bytes))
    if fitting >= rows:
        return [(0, rows)]
    step = next((n for n in range(fitting, fitting // 2, -1) if rows % n == 0), fitting)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
