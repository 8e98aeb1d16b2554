"""The ``--save`` directory of a run: its lock, its disk space, clean-up after interrupted saves, and retention.

The lock admits one run at a time: a second run would take the first one's save in flight for the leftover of an
interrupted one and remove it. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    RELEASE,
    TRACKER,
    iteration_name,
    read_manifest,
    read_tracker,
)
from mindspeed_mm.checkpoint.files import FILE_MODE, make_directory, remove, set_mode, temporary_name
from mindspeed_mm.checkpoint.partial import Base
from mindspeed_mm.errors import UserError

LOCK = ".lock"
LOCK_SECONDS = 5.0
"""Time for a process that was stopped or killed to end."""
_LATER = (errno.EACCES, errno.EAGAIN, errno.ENOENT, errno.ESTALE)
"""Another process holds the lock, or has just released it and removed the file."""
_COMPLETE = re.compile(r"iter_(\d{7,})")
PROBE = ".probe-"
"""Begins the name of a file by which ranks check that they share a directory."""
_LEFTOVER = re.compile(r"\.(iter_\d{7,})\.(partial|replaced|deleted)")


class SaveLock:
    """Held from ``acquire`` until ``release``, or until the process ends in any way.

    It is a POSIX record lock: unlike a ``flock``, it is not inherited by a data worker that outlives its parent.
    """

    def __init__(self, root: Path) -> None:
        """``root``: the ``--save`` directory. Does not lock it yet."""
        self._root, self._path = root, root / LOCK
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
                        f"--save {self._root} is being written by another run ({self._holder()}); wait until that has "
                        f"ended, name another directory, or, if that host is lost for good, remove {self._path}"
                    )
                time.sleep(0.1)
        except OSError as error:
            return (
                f"--save {self._root} could not be locked ({error.strerror or error}): make sure that no second run "
                "saves there"
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
            return self._path.read_text(errors="replace").strip() or "unknown: the lock file is empty"
        return "unknown: the lock file cannot be read"


def remove_leftovers(root: Path) -> list[str]:
    """Remove leftovers of interrupted saves in ``root``, and restore a checkpoint that was being replaced.

    Called by one rank, while no other writes there. Leftovers of ``mm-convert`` stay, as it resumes from them.

    Returns:
        A line for each action.
    """
    actions = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(PROBE):
            remove(path)
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        target = root / match.group(1)
        if match.group(2) == "replaced" and not target.exists():
            os.rename(path, target)
            actions.append(f"restored {target.name}: the save that was to replace it was interrupted")
        else:
            remove(path)
            actions.append(f"removed {path.name}, left by an interrupted save")
    remove(temporary_name(root / TRACKER))
    return actions


def complete_iterations(root: Path) -> list[int]:
    """Iterations of all complete training checkpoints in ``root``, in order."""
    return sorted(
        int(match.group(1))
        for path in root.iterdir()
        if (match := _COMPLETE.fullmatch(path.name)) and (path / MANIFEST).is_file()
    )


def delete_old_checkpoints(root: Path, *, newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete old checkpoints of this run. Called by one rank, after the tracker points to the newest.

    Args:
        root: the ``--save`` directory.
        newest: iteration saved last. Later ones belong to another lineage of the run and are kept.
        keep_last: number of checkpoints to keep, including ``newest``.
        keep_every: also keep those whose iteration is a multiple of this. The bases of partial checkpoints that are
            kept are kept too.

    Returns:
        The deleted iterations.
    """
    old = [iteration for iteration in complete_iterations(root) if iteration <= newest][:-keep_last]
    tracked = read_tracker(root)
    deleted = [
        iteration
        for iteration in old
        if iteration != tracked and tracked not in (None, RELEASE) and (not keep_every or iteration % keep_every)
    ]
    bases = _bases(root, [iteration for iteration in complete_iterations(root) if iteration not in deleted])
    deleted = [iteration for iteration in deleted if (root / iteration_name(iteration)).resolve() not in bases]
    for iteration in deleted:
        path = root / iteration_name(iteration)
        hidden = path.with_name(f".{path.name}.deleted")
        os.rename(path, hidden)  # no checkpoint any more, however long its removal takes
        remove(hidden)
    return deleted


def _bases(root: Path, iterations: Sequence[int]) -> set[Path]:
    """Directories without which some of these checkpoints could not be loaded."""
    bases = set()
    for iteration in iterations:
        with contextlib.suppress(UserError):  # a damaged manifest: not to be loaded in any case
            base = Base.recorded(read_manifest(root / iteration_name(iteration)))
            bases |= {Path(base.path)} if base is not None else set()
    return bases


def check_writable(root: Path) -> Path:
    """Check that a ``--save`` directory exists or can be made.

    Returns:
        The existing part of its path.

    Raises:
        UserError: naming the file or directory that prevents it.
    """
    existing = root.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--save {root}: {existing} is not a directory; name another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--save {root}: {existing} is not writable by this user; name another directory")
    return existing


def disk_space_warning(root: Path, *, nbytes: int, count: int, keep_last: int | None) -> str | None:
    """A warning if the checkpoints of a run do not fit on the disk, else None.

    Args:
        root: the ``--save`` directory.
        nbytes: of one checkpoint.
        count: of checkpoints that the run will write, at most.
        keep_last: ``--keep-last``.
    """
    free = shutil.disk_usage(check_writable(root)).free
    at_once = count if keep_last is None else min(count, keep_last + 1)  # one more while it is written
    if at_once * nbytes <= free:
        return None
    size = f"a checkpoint of this run takes about {nbytes / 1e9:.1f} GB"
    if nbytes > free:
        return f"--save {root} has {free / 1e9:.1f} GB free and {size}: no save will succeed"
    remedy = "--keep-last deletes old ones" if keep_last is None else "lower --keep-last"
    number = f"of which up to {at_once} will exist at the same time"
    return f"--save {root} has {free / 1e9:.1f} GB free and {size}, {number}; {remedy}"
