"""A lock that admits one writer to a directory: a run that saves, or a conversion.

A second writer would take the first one's partial directory for the leftover of an interrupted one and remove it. This
module imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from mindspeed_mm.checkpoint.files import FILE_MODE, make_directory, set_mode
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import read_bytes, shorten

LOCK = ".lock"
LOCK_SECONDS = 5.0
"""Time for a process that was stopped or killed to end."""
_CONTENT_BYTES = 4096
_LATER = (errno.EACCES, errno.EAGAIN, errno.ENOENT, errno.ESTALE)
"""Another process holds the lock, or has just released it and removed the file."""


class DirectoryLock:
    """Held from ``acquire`` until ``release``, or until the process ends in any way.

    It is a POSIX record lock: unlike a ``flock``, it is not inherited by a data worker that outlives its parent.
    """

    def __init__(self, path: Path, what: str) -> None:
        """
        Args:
            path: of the lock file; its directory is made if necessary.
            what: is locked, for messages.
        """
        self._root, self._path, self._what = path.parent, path, what
        self._descriptor: int | None = None
        self._made_directory = False

    def acquire(self) -> str | None:
        """Make the directory if necessary, and lock it.

        Returns:
            A warning if the file system does not support locks; the run may continue.

        Raises:
            UserError: if another process holds the lock, with its description of itself.
        """
        end = time.monotonic() + LOCK_SECONDS
        try:
            self._made_directory = not self._root.is_dir()
            make_directory(self._root)
            while not self._try():
                if time.monotonic() > end:
                    raise UserError(
                        f"{self._what} is being written by another run ({self._holder()}); wait until that has "
                        f"ended, name another directory, or, if that host is lost for good, remove {self._path}"
                    )
                time.sleep(0.1)
        except OSError as error:
            return (
                f"{self._what} could not be locked ({error.strerror or error}): make sure that no second process "
                "writes there"
            )
        return None

    def release(self) -> None:
        """Release the lock, and remove its file and an empty directory."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None
        if self._made_directory:
            with contextlib.suppress(OSError):  # not empty
                self._root.rmdir()

    def _try(self) -> bool:
        """Lock the file, unless another process holds it or removes it meanwhile."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except OSError as error:
            os.close(descriptor)
            if error.errno in _LATER:
                return False
            raise
        if not ours:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        with contextlib.suppress(OSError):
            set_mode(self._path, FILE_MODE)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        content = f"process {os.getpid()} on host {socket.gethostname()}, since {since}\n".encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without content
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            content = read_bytes(self._path, limit=_CONTENT_BYTES).decode(errors="replace")
            return shorten(content.strip()) or "unknown: the lock file is empty"
        return "unknown: the lock file cannot be read"
