"""Injects one fault into this process at a chosen point; used by ``checkpoint_faults.py``.

A point is before one of the system calls in ``CALLS``, or in the middle of a write.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from mindspeed_mm.checkpoint import files

CALLS = (
    "open", "write", "fsync", "replace", "rename", "mkdir", "chmod", "unlink", "rmdir", "listdir", "scandir", "pread",
    "preadv",
)
BUFFER_BYTES = 512
"""Of a file: a third of a chunk of these tensors, so that it takes several writes as one of a real model does."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        ranks: world size.
        asynchronous: ``--async-save``.
        fault: ``kill`` (SIGKILL of the process), ``kill all``, ``torn`` (half of a write, then SIGKILL), ``power cut``
            (SIGKILL, and half of what was not flushed is gone), ``full disk``, ``I/O error``, or ``none``.
        rank: the rank with the fault.
        point: the number of the point, from 1; 0 for none.
        seconds: kill all after this time instead.
    """

    ranks: int
    asynchronous: bool
    fault: str = "none"
    rank: int = 0
    point: int = 0
    seconds: float = 0.0

    @property
    def ends_the_run(self) -> bool:
        """Whether the fault ends the run."""
        return self.fault in ("kill", "kill all", "torn", "power cut")


class Switch:
    """Counts the points of this process, and injects the fault at the chosen one.

    Attributes:
        count: points passed.
        phase: current phase of the run, for the report.
        before_saving: points passed before the first save.
        armed: whether points count yet.
    """

    def __init__(self, case: Case, rank: int, report: Callable[..., None]) -> None:
        self.count, self.phase, self.before_saving, self.armed = 0, "lock", 0, False
        self._case, self._rank, self._report = case, rank, report
        self._unflushed: set[int] = set()  # inodes
        self._lock = threading.RLock()

    def install(self) -> None:
        create = files.OutputFile.__init__

        def create_with_small_buffer(file: files.OutputFile, *arguments: Any) -> None:
            create(file, *arguments)
            file._buffered = io.BufferedWriter(file._buffered.detach(), BUFFER_BYTES)

        files.OutputFile.__init__ = create_with_small_buffer
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable) -> Callable:
        def wrapped(*arguments, **options):
            if self._strikes():
                self._report(struck=self.phase, unflushed=sorted(self._unflushed))
                self._strike(name, call, arguments)
            if self.armed and name == "write":
                self._unflushed.add(os.fstat(arguments[0]).st_ino)
            result = call(*arguments, **options)
            if name == "fsync":
                self._unflushed.discard(os.fstat(arguments[0]).st_ino)
            return result

        return wrapped

    def _strikes(self) -> bool:
        with self._lock:
            if not self.armed:
                return False
            self.count += 1
            return self.count == self._case.point and self._rank == self._case.rank

    def _strike(self, name: str, call: Callable, arguments: tuple) -> None:
        fault = self._case.fault
        if fault == "torn" and name == "write":
            descriptor, data = arguments
            call(descriptor, data[: len(data) // 2])
        if fault in ("kill", "torn", "power cut"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "kill all":
            os.killpg(0, signal.SIGKILL)
        if fault in ("full disk", "I/O error"):
            code = errno.ENOSPC if fault == "full disk" else errno.EIO
            raise OSError(code, os.strerror(code))
