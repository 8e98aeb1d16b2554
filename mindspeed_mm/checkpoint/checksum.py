"""CRC-32 checksums that can be joined: the checksum of a whole file from those of its parts, in any order of making.

``crc32`` is the one function that sums bytes. With the package ``isal`` it uses the processor's carry-less
multiplication, many times as fast as zlib; without it zlib gives the same values.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["combine", "crc32", "file_checksum", "format_checksum"]

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zlib, gzip and PNG; coefficients reflected, so the highest bit is x^0
_BLOCK = 16 << 20  # bytes read at a time


def format_checksum(value: int) -> str:
    """A checksum as it stands in a manifest: ``crc32:`` and eight hexadecimal digits."""
    return f"crc32:{value & 0xFFFFFFFF:08x}"


def combine(first: int, second: int, second_length: int) -> int:
    """Checksum of A followed by B.

    Args:
        first: checksum of A.
        second: checksum of B.
        second_length: bytes in B.
    """
    # Appending n bytes multiplies A's remainder by x^(8n).
    return _multiply(_power_of_x(8 * second_length), first) ^ second


def file_checksum(path: str | os.PathLike[str]) -> str:
    """Checksum of a file's content, read in blocks."""
    value = 0
    with Path(path).open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_BLOCK, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            value = crc32(buffer[:count], value)
    return format_checksum(value)


def _multiply(left: int, right: int) -> int:
    """Product of two polynomials modulo the CRC polynomial."""
    product, mask = 0, 1 << 31
    while mask:
        if left & mask:
            product ^= right
        right = (right >> 1) ^ _POLYNOMIAL if right & 1 else right >> 1
        mask >>= 1
    return product


@functools.lru_cache(maxsize=4096)  # most pieces have one of a few lengths
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the CRC polynomial."""
    result, base = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        exponent >>= 1
    return result
