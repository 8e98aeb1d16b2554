"""What lies in a save directory: left-overs of interrupted saves, and checkpoints that are no longer wanted.

Both are for one process, while no other writes there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    RELEASE,
    TRACKER,
    iteration_name,
    read_tracker,
)
from mindspeed_mm.checkpoint.files import remove, temporary_name

_COMPLETE = re.compile(r"iter_(\d{7,})")
PROBE = ".probe-"
"""Begins the name of a file by which processes see whether they share a directory."""
_LEFT_OVER = re.compile(r"\.(iter_\d{7,})\.(partial|replaced|deleted)")


def clean(root: Path) -> list[str]:
    """Remove what interrupted saves have left in ``root``, and put back a checkpoint that was being replaced.

    What ``mm-convert`` leaves is its own to continue, and stays.

    Returns:
        A line for each thing done.
    """
    done = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(PROBE):
            remove(path)
        match = _LEFT_OVER.fullmatch(path.name)
        if match is None:
            continue
        target = root / match.group(1)
        if match.group(2) == "replaced" and not target.exists():
            os.rename(path, target)
            done.append(f"{target.name} is back in its place: the save that was to replace it was interrupted")
        else:
            remove(path)
            done.append(f"removed {path.name}, left by an interrupted save")
    remove(temporary_name(root / TRACKER))
    return done


def complete_iterations(root: Path) -> list[int]:
    """Iterations of all complete training checkpoints in ``root``, in order."""
    return sorted(
        int(match.group(1))
        for path in root.iterdir()
        if (match := _COMPLETE.fullmatch(path.name)) and (path / MANIFEST).is_file()
    )


def retire(root: Path, *, newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Delete old checkpoints of this run; call after the newest is complete and the tracker names it.

    Args:
        root: the ``--save`` directory.
        newest: iteration saved last. Later ones are of another course of the run, and are left alone.
        keep_last: how many to keep, ``newest`` included.
        keep_every: keep those of iterations that are multiples of this, too.

    Returns:
        The iterations deleted.
    """
    old = [iteration for iteration in complete_iterations(root) if iteration <= newest][:-keep_last]
    tracked = read_tracker(root)
    unwanted = [
        iteration
        for iteration in old
        if iteration != tracked and tracked not in (None, RELEASE) and (not keep_every or iteration % keep_every)
    ]
    for iteration in unwanted:
        path = root / iteration_name(iteration)
        hidden = path.with_name(f".{path.name}.deleted")
        os.rename(path, hidden)  # at once no checkpoint any more, however long its removal takes
        remove(hidden)
    return unwanted
