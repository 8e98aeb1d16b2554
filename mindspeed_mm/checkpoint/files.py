"""Durable files: written whole, flushed to disk, with CRC-32 checksums, readable by owner and group only.

All output of the checkpoint package goes through these few functions of ``os``. ``crc32`` is the one function that
computes checksums: with the package ``isal`` it uses the processor's carry-less multiplication, many times as fast as
zlib; without it zlib gives the same values. Checksums can be combined, so that of a file follows from those of its
chunks. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from mindspeed_mm.inputs import open_regular

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32 as crc32

T = TypeVar("T")

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zlib, gzip and PNG; coefficients reflected, so the highest bit is x^0
_READ_BYTES = 1 << 20  # stays in the cache
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
    """Checksum of a file's content.

    Raises:
        OSError: if it is missing, unreadable or not a regular file.
    """
    with os.fdopen(open_regular(path, limit=1 << 62), "rb", buffering=0) as file:
        return format_checksum(section_checksum(file.fileno(), 0, os.fstat(file.fileno()).st_size))


def section_checksum(descriptor: int, offset: int, length: int) -> int:
    """CRC-32 of a part of an open file; of the part that exists if the file is shorter."""
    value, end = 0, offset + length
    if hasattr(os, "posix_fadvise"):  # let the disk read all of it at once
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    buffer = memoryview(bytearray(min(_READ_BYTES, max(1, length))))
    while offset < end and (count := os.preadv(descriptor, [buffer[: end - offset]], offset)):
        value = crc32(buffer[:count], value)
        offset += count
    return value


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


class _RawFile(io.RawIOBase):
    """A new file, written through ``os.write``; errors name its path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        set_mode(path, FILE_MODE)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with self._named():
            return os.write(self._descriptor, memoryview(data).cast("B")[:WRITE_BYTES])

    def sync(self) -> None:
        with self._named():
            os.fsync(self._descriptor)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._named():  # some network file systems report write errors only here
                os.close(self._descriptor)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


class OutputFile:
    """A new file that computes checksums of its sections and of its whole content.

    A section ends wherever ``tell`` is called: torch's writer calls it before and after each item.

    Attributes:
        crc: CRC-32 of all bytes.
        sections: offset -> (length, CRC-32).
        error: why a write failed.
    """

    def __init__(self, path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> None:
        """Create or truncate ``path``. ``advance`` is called with the number of bytes of each write.

        Raises:
            OSError: as all methods may; its ``filename`` is the path.
        """
        self.crc = 0
        self.error: BaseException | None = None
        self.sections: dict[int, tuple[int, int]] = {}
        self._raw = _RawFile(path)
        self._buffered = io.BufferedWriter(self._raw, 1 << 16)  # larger writes are not copied
        self._advance = advance
        self._start = self._length = self._section_crc = 0

    def write(self, data: Any) -> int:
        """Append a buffer; returns its length in bytes."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), WRITE_BYTES):
                piece = view[start : start + WRITE_BYTES]
                self._section_crc = crc32(piece, self._section_crc)
                self._buffered.write(piece)
                self._advance(len(piece))
        except BaseException as error:
            self.error = error
            raise
        self._length += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far; ends a section."""
        if length := self._length - self._start:
            self.sections[self._start] = length, self._section_crc
            self.crc = combine(self.crc, self._section_crc, length)
            self._start, self._section_crc = self._length, 0
        return self._length

    def flush(self) -> None:
        """Nothing: the file is flushed once, by ``finish``."""

    def close(self) -> None:
        """Nothing: torch's writer closes the file after each part of it."""

    def finish(self) -> None:
        """Flush the file to disk and close it."""
        self.tell()
        self._buffered.flush()
        self._raw.sync()
        self._raw.close()

    def abandon(self) -> None:
        """Close the file, whatever of it is on disk."""
        with contextlib.suppress(OSError):
            self._raw.close()


@contextlib.contextmanager
def new_file(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> Iterator[OutputFile]:
    """A file that is flushed to disk when the block ends without an error."""
    file = OutputFile(path, advance)
    try:
        yield file
        file.finish()
    except BaseException:
        if file.error is not None:  # torch hides it behind the failure to complete its archive
            raise file.error from None
        raise
    finally:
        file.abandon()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by rename, so that a reader sees the old content or the new, never a mixture."""
    temporary = temporary_name(path)
    try:
        with new_file(temporary) as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
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


def run_all(jobs: Iterable[Callable[[], T]], *, threads: int, stop: Callable[[], None] = lambda: None) -> list[T]:
    """Run jobs on several threads; returns their results in order.

    At the first failure ``stop`` is called, jobs that have not begun are dropped, and the failure is raised once the
    others have ended.
    """
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="checkpoint") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]
