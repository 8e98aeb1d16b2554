"""One run at a time writes into a ``--save`` directory: a lock that goes with the process that holds it.

A second run would take the first's save in flight for what an interrupted one left, and remove it. Imports no torch.
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

LOCK = ".lock"
_PATIENCE = 5.0  # seconds that a process which was told to end, or killed, may need to be gone
_LATER = (errno.EACCES, errno.EAGAIN, errno.ENOENT, errno.ESTALE)
"""Another process holds the lock, or has just released it and taken the file away."""


class SaveLock:
    """Held from ``take`` until ``release``, or until the process dies, however it does.

    It is a POSIX record lock: unlike that of ``flock``, a data worker that outlives its parent does not inherit it.
    """

    def __init__(self, root: Path) -> None:
        """Lock nothing yet.

        Args:
            root: the ``--save`` directory.
        """
        self._root, self._path = root, root / LOCK
        self._descriptor: int | None = None
        self._made_directory = False

    def take(self) -> str | None:
        """Make the directory if need be, and lock it.

        Returns:
            A sentence where it could not be locked because of the file system; the run may go on.

        Raises:
            UserError: if another process holds the lock, with what that wrote about itself.
        """
        end = time.monotonic() + _PATIENCE
        try:
            self._made_directory = not self._root.is_dir()
            make_directory(self._root)
            while not self._try():
                if time.monotonic() > end:
                    raise UserError(
                        f"--save {self._root} is being written by another run ({self._holder()}); wait until that has "
                        f"ended, name another directory, or, if that host is lost for good, remove {self._path}"
                    )
                time.sleep(0.1)
        except OSError as error:
            return (
                f"warning: --save {self._root} could not be locked ({error.strerror or error}): see to it that no "
                "second run saves there"
            )
        return None

    def release(self) -> None:
        """Let others in, and leave nothing behind but what was saved."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None
        if self._made_directory:
            with contextlib.suppress(OSError):  # there is something in it
                self._root.rmdir()

    def _try(self) -> bool:
        """Lock the file, unless another has it or takes it away meanwhile."""
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
        with contextlib.suppress(OSError):  # a full disk: the lock holds without
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text(errors="replace").strip() or "which has not said who it is"
        return "which cannot be asked"
