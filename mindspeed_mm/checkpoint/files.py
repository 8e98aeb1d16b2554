"""Writing files and directories so that they are on the disk, whole, and readable by owner and group only.

All of a checkpoint goes through these few functions of ``os``. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.checksum import combine, crc32

FILE_MODE, DIRECTORY_MODE = 0o640, 0o750
WRITE_BYTES = 1 << 20
"""Bytes in one write: several times faster than 16 MB at once where Linux buffers them, and quick to interrupt."""


def make_directory(path: Path) -> None:
    """Make a directory, and those above it; it has ``DIRECTORY_MODE`` whatever the umask, an existing one keeps its."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, DIRECTORY_MODE)
        set_mode(path, DIRECTORY_MODE)
        sync_directory(path.parent)


def set_mode(path: Path, mode: int) -> None:
    """Give a file or directory these permissions, where the file system has any."""
    if path.stat().st_mode & 0o777 != mode:
        with contextlib.suppress(OSError):
            os.chmod(path, mode)


class OutputFile:
    """A new file that keeps its length and checksum.

    Attributes:
        length: bytes written.
        crc: CRC-32 of them.
    """

    def __init__(self, path: Path) -> None:
        """Create ``path``, or empty it.

        Raises:
            OSError: as of all methods; its ``filename`` is the path.
        """
        self.length = self.crc = 0
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        set_mode(path, FILE_MODE)

    def write(self, *parts: Any, crc: int | None = None) -> None:
        """Append buffers; ``crc`` is the CRC-32 of them together where that is known."""
        before = self.length
        with self._named():
            for part in parts:
                view = memoryview(part).cast("B")
                done = 0
                while done < len(view):
                    done += os.write(self._descriptor, view[done : done + WRITE_BYTES])
                self.length += len(view)
                if crc is None:
                    self.crc = crc32(view, self.crc)
        if crc is not None:
            self.crc = combine(self.crc, crc, self.length - before)

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with self._named():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it; some network file systems report only now that they could not write."""
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
    """A file that is on the disk when the block ends without an error."""
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
    """Replace a file by rename, so that a reader sees the old content or the new, never a part."""
    temporary = temporary_name(path)
    with new_file(temporary) as file:
        file.write(content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Where the content of ``path`` lies until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def sync_file(path: Path) -> None:
    """Wait until a file, written by whomever on this machine, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    # Some network file systems refuse to open or sync a directory; the rename itself has happened then.
    with contextlib.suppress(OSError):
        sync_file(path)


def remove(path: Path) -> None:
    """Remove a file or a directory with all it holds, or nothing if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
