"""Durable files: written whole, flushed to disk, with CRC-32 checksums, readable by owner and group only.

All output of the checkpoint package goes through these few functions of ``os``. ``crc32`` is the one function that
computes checksums: with the package ``isal`` it uses the processor's carry-less multiplication, many times as fast as
zlib; without it zlib gives the same values. Checksums can be combined, so the checksum of a whole file follows from
those of its chunks, computed in any order. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32 as crc32

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zlib, gzip and PNG; coefficients reflected, so the highest bit is x^0
_READ_BYTES = 16 << 20
FILE_MODE, DIRECTORY_MODE = 0o640, 0o750
WRITE_BYTES = 1 << 20
"""Bytes in one write: several times faster than 16 MB at once where Linux buffers them, and quick to interrupt."""
VISIBILITY_SECONDS = 10.0
"""Time for a network file system to show what another machine has written."""


def format_checksum(value: int) -> str:
    """A checksum as written to a manifest: ``crc32:`` and eight hexadecimal digits."""
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
    """Checksum of a file's content."""
    value = 0
    with Path(path).open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_READ_BYTES, max(1, os.fstat(file.fileno()).st_size))))
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


@functools.lru_cache(maxsize=4096)  # most chunks have one of a few lengths
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the CRC polynomial."""
    result, base = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        exponent >>= 1
    return result

def make_directory(path: Path) -> None:
    """Make a directory and its parents; a new one gets ``DIRECTORY_MODE`` whatever the umask."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, DIRECTORY_MODE)
        set_mode(path, DIRECTORY_MODE)
        sync_directory(path.parent)


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file or directory, where the file system has any."""
    if path.stat().st_mode & 0o777 != mode:
        with contextlib.suppress(OSError):
            os.chmod(path, mode)


class OutputFile:
    """A new file that counts its bytes and computes their checksum.

    Attributes:
        length: bytes written.
        crc: CRC-32 of them.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate ``path``.

        Raises:
            OSError: as all methods may; its ``filename`` is the path.
        """
        self.length = self.crc = 0
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        set_mode(path, FILE_MODE)

    def write(self, *buffers: Any, crc: int | None = None) -> None:
        """Append buffers; ``crc`` is the CRC-32 of their concatenation if known."""
        before = self.length
        with self._named():
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                done = 0
                while done < len(view):
                    done += os.write(self._descriptor, view[done : done + WRITE_BYTES])
                self.length += len(view)
                if crc is None:
                    self.crc = crc32(view, self.crc)
        if crc is not None:
            self.crc = combine(self.crc, crc, self.length - before)

    def sync(self) -> None:
        """Flush the file to disk."""
        with self._named():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it; some network file systems report write errors only here."""
        with self._named():
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[OutputFile]:
    """A file that is flushed to disk when the block ends without an error."""
    file = OutputFile(path)
    try:
        yield file
        file.sync()
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    file.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by rename, so that a reader sees the old content or the new, never a mixture."""
    temporary = temporary_name(path)
    with new_file(temporary) as file:
        file.write(content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Path of the content of ``path`` until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def sync_file(path: Path) -> None:
    """Flush a file to disk, whichever process on this machine wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to disk."""
    # Some network file systems refuse to open or sync a directory; the rename itself has happened then.
    with contextlib.suppress(OSError):
        sync_file(path)


def remove(path: Path) -> None:
    """Remove a file, or a directory with its content; no error if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def becomes_visible(path: Path) -> bool:
    """Whether a path that exists on another machine is visible here within ``VISIBILITY_SECONDS``."""
    end = time.monotonic() + VISIBILITY_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
