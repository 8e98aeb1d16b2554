"""The ``--save`` directory of a run: its disk space, clean-up after interrupted saves, and retention.

This module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from mindspeed_mm.checkpoint.best import BEST_FILE, BestSoFar
from mindspeed_mm.checkpoint.directory import (
    BEST_TRACKER,
    MANIFEST,
    RELEASE,
    RUN_KEY,
    TRACKER,
    iteration_name,
    read_best_tracker,
    read_manifest,
    read_tracker,
)
from mindspeed_mm.checkpoint.files import remove, temporary_name
from mindspeed_mm.checkpoint.partial import Base
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, reading, shorten

_COMPLETE = re.compile(r"iter_(\d{7,})")
PROBE = ".probe-"
"""Begins the name of a file by which ranks check that they share a directory."""
_LEFTOVER = re.compile(r"\.(iter_\d{7,})\.(partial|replaced|deleted)")


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
    for name in (TRACKER, BEST_FILE, BEST_TRACKER):
        remove(temporary_name(root / name))
    return actions


def complete_iterations(root: Path) -> list[int]:
    """Iterations of all complete training checkpoints in ``root``, in order."""
    return sorted(
        int(match.group(1))
        for path in root.iterdir()
        if (match := _COMPLETE.fullmatch(path.name)) and (path / MANIFEST).is_file()
    )


def own_iterations(root: Path, best: BestSoFar, *, newest: int) -> set[int]:
    """Iterations of the ranking, up to ``newest``, of which ``root`` has a complete checkpoint of the run's own.

    The number alone does not tell: ``root`` may have those of another run, or of another branch of this one.
    """
    named = {*(iteration for iteration, _ in best.ranking), *best.only}
    return {
        iteration for iteration in complete_iterations(root)
        if iteration in named and iteration <= newest and _written_by(root / iteration_name(iteration)) in best.runs
    }


def best_on_disk(root: Path, best: BestSoFar, *, newest: int, keep: int) -> list[tuple[int, float]]:
    """(iteration, value) of the best ``keep`` of the run's own checkpoints in ``root``, up to ``newest``."""
    return best.kept(own_iterations(root, best, newest=newest), keep=keep)


def continue_best(best: BestSoFar, start: Path, *, save: str | None) -> None:
    """Take over the ranking of the checkpoint ``start`` into a run that saves into ``save``.

    In another directory nothing has been saved for the ranking alone: its values remain to compare with.
    """
    writer = _written_by(start)
    if writer is not None:
        best.add_run(writer)
    if save is None or os.path.realpath(save) != os.path.realpath(os.path.dirname(os.path.abspath(start))):
        best.only = []


def _written_by(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; None if its manifest does not tell."""
    with contextlib.suppress(UserError, KeyError, AttributeError):
        return read_manifest(checkpoint)["metadata"].get(RUN_KEY)
    return None


def delete_old_checkpoints(
    root: Path, *, newest: int, keep_last: int | None, keep_every: int | None, in_use: Collection[int] = (),
    best: BestSoFar | None = None, keep_best: int = 0,
) -> list[int]:
    """Delete old checkpoints of this run. Called by one rank, after the tracker points to the newest.

    Args:
        root: the ``--save`` directory.
        newest: iteration saved last. Later ones belong to another lineage of the run and are kept.
        keep_last: number of checkpoints to keep, including ``newest``; None: all but those that were saved only because
            they were among the best, and no longer are.
        keep_every: also keep those whose iteration is a multiple of this. The bases of partial checkpoints that are
            kept are kept too.
        in_use: iterations to leave for a later call.
        best: the run's best checkpoints so far; None where none are kept.
        keep_best: number of them to keep.

    Returns:
        The deleted iterations.
    """
    old = [iteration for iteration in complete_iterations(root) if iteration <= newest]
    kept: set[int | str | None] = set()
    if best is not None:
        kept = {iteration for iteration, _ in best_on_disk(root, best, newest=newest, keep=keep_best)}
        with contextlib.suppress(UserError):  # if a later one could not be recorded, it still stands for the best
            kept.add(read_best_tracker(root))
    if keep_last is not None:
        old = old[:-keep_last]
    elif best is not None:
        own = own_iterations(root, best, newest=newest)
        old = [iteration for iteration in old if iteration in own and iteration in best.only and iteration != newest]
    else:
        old = []
    tracked = read_tracker(root)
    deleted = [
        iteration
        for iteration in old
        if iteration != tracked and tracked not in (None, RELEASE) and (not keep_every or iteration % keep_every)
        and iteration not in in_use and iteration not in kept
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


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)  # not what a link leads to: where that is missing, no directory can be made
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_writable(root: Path, *, name: str = "--save") -> Path:
    """Check that a directory exists or can be made, and that something can be made in it; ``name``: of the setting.

    Returns:
        The existing part of its path.

    Raises:
        UserError: naming the file or directory that prevents it.
    """
    existing, what, remedy = root.absolute(), f"{name} {root}", "name another directory"
    with reading(what, remedy):
        while not _is_there(existing):
            existing = existing.parent
    if not is_directory(existing):
        raise UserError(f"{what}: {shorten(existing)} is not a directory; {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {existing} is not writable by this user; {remedy}")
    try:  # rights are not enough: in /proc, for one, nothing can be made
        os.rmdir(tempfile.mkdtemp(prefix=PROBE, dir=existing))
    except OSError as error:
        why = f"a directory cannot be created in {existing} ({error.strerror})"
        raise UserError(f"{what}: {why}; {remedy}") from error
    return existing


def check_new_stage(save: str, load: str | None) -> None:
    """Refuse a new stage (``--finetune``) whose checkpoints would replace those of the run that it starts from.

    Raises:
        UserError: if ``--save`` has them.
    """
    if load is None or not is_directory(save) or not _continues(save, load):
        return
    with reading(f"--save {save}", "name another directory"):
        iterations = complete_iterations(Path(save))
    if iterations:
        raise UserError(
            f"--finetune starts a new stage from --load {load}, and its checkpoints would replace those of the "
            f"first in --save {save}; save to another directory, or leave --finetune out to continue the run"
        )


def _continues(save: str, load: str) -> bool:
    """Whether ``--load`` names a training checkpoint in ``--save``, or the directory whose tracker file names one."""
    root, start = os.path.realpath(save), os.path.realpath(load)
    if root == start:
        return read_tracker(Path(root)) != RELEASE
    return root == os.path.dirname(start) and os.path.basename(start) != RELEASE


def earlier_run_warning(save: str | None, load: str | None) -> str | None:
    """A warning if ``--save`` has checkpoints of a run that ``--load`` does not continue, else None."""
    if save is None or not is_directory(save):
        return None
    if load is not None and _continues(save, load):
        return None
    with reading(f"--save {save}", "name another directory"):
        iterations = complete_iterations(Path(save))
    if not iterations:
        return None
    start = Path(save, iteration_name(iterations[-1])) if read_tracker(Path(save)) == RELEASE else save
    return (
        f"--save {save} has checkpoints of an earlier run, the last of iteration {iterations[-1]}, which those of this "
        f"run will replace as it reaches them; to continue that run: --load {start}, else name another directory"
    )


def disk_space_warning(root: Path, *, nbytes: int, count: int, keep_last: int | None, keep_best: int = 0) -> str | None:
    """A warning if the checkpoints of a run do not fit on the disk, else None.

    Args:
        root: the ``--save`` directory.
        nbytes: of one checkpoint.
        count: of checkpoints that the run will write, at most.
        keep_last: ``--keep-last``.
        keep_best: ``--keep-best``.
    """
    free = shutil.disk_usage(check_writable(root)).free
    # one more while it is written
    at_once = count + keep_best if keep_last is None else min(count + keep_best, keep_last + keep_best + 1)
    if at_once * nbytes <= free:
        return None
    size = f"a checkpoint of this run takes about {_size(nbytes)}"
    if nbytes > free:
        return f"--save {root} has {_size(free)} free and {size}: no save will succeed; free space there"
    remedy = "--keep-last deletes old ones" if keep_last is None else "lower --keep-last"
    remedy += " or --keep-best" * (keep_last is not None and keep_best > 0)
    number = f"of which up to {at_once} will exist at the same time"
    return f"--save {root} has {_size(free)} free and {size}, {number}; {remedy}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
