"""Whether the checkpoints of a run will have a place, asked before anything is started. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mindspeed_mm.errors import UserError


def check_place(root: Path) -> Path:
    """See that a ``--save`` directory is there or can be made.

    Returns:
        The part of its path that exists.

    Raises:
        UserError: naming the directory or file that is in the way.
    """
    existing = root.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--save {root}: {existing} is no directory; name another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--save {root}: {existing} may not be written by this user; name another place")
    return existing


def warning_of_room(root: Path, *, nbytes: int, count: int, keep_last: int | None) -> str | None:
    """A sentence where a run's checkpoints do not fit on the disk.

    Args:
        root: the ``--save`` directory.
        nbytes: of one checkpoint.
        count: how many the run will write at most.
        keep_last: ``--keep-last``.
    """
    free = shutil.disk_usage(check_place(root)).free
    at_once = count if keep_last is None else min(count, keep_last + 1)  # one more while it is written
    if at_once * nbytes <= free:
        return None
    size = f"a checkpoint of this run takes about {nbytes / 1e9:.1f} GB"
    if nbytes > free:
        return f"--save {root} has {free / 1e9:.1f} GB free and {size}: no save will succeed"
    remedy = "--keep-last deletes old ones" if keep_last is None else "lower --keep-last"
    number = f"of which up to {at_once} will lie there at once"
    return f"--save {root} has {free / 1e9:.1f} GB free and {size}, {number}; {remedy}"
