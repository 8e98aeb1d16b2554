"""The bytes of ``torch.save(tensor)`` around its values, for values whose checksum is known.

A saved tensor is a zip file, uncompressed: ``data.pkl`` describes the tensor, ``data/0`` holds its values.
``torch.save`` sums the values for the zip's checksum and holds Python's lock while it does; here they are only written.
``torch.load`` and torch.distributed.checkpoint read the result, and so does any zip program.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import sys
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.checksum import crc32

_ALIGNMENT = 64  # of the values within the archive, in bytes, as torch has it
_LIMIT = 2**32 - 1  # bytes; beyond that a zip file needs another form
_DOS_EPOCH = (0, 33)  # time and date of every entry, 1 January 1980: the same tensor gives the same bytes


class _TensorPickler(pickle.Pickler):
    """Writes a tensor's description and, for its storage, only a reference."""

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


def fits(tensor: Tensor) -> bool:
    """Whether a tensor can be written this way: below 4 GB, and of a type that weights have."""
    return tensor.nbytes < _LIMIT - (1 << 20) and tensor.dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
    )


def frame(tensor: Tensor, crc: int) -> tuple[bytes, bytes]:
    """What stands before and after the values of a tensor in its archive.

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
    tensor = torch.empty(shape, dtype=dtype)  # with a storage of its own size; the memory is never touched
    _TensorPickler(out, tensor.numel()).dump(tensor)
    return out.getvalue()


def _add_entry(out: bytearray, directory: bytearray, name: str, content: bytes, *, shift: int = 0) -> None:
    _add_header(out, directory, name, crc32(content), len(content), shift=shift)
    out += content


def _add_header(
    out: bytearray, directory: bytearray, name: str, crc: int, size: int, *, shift: int = 0, aligned: bool = False
) -> None:
    """Append an entry's own header to ``out``, and its line to the archive's directory.

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
