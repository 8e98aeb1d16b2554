"""The directory format of checkpoints: what makes one complete, and how one comes into being atomically.

```
ROOT/latest_checkpointed_iteration.txt     "release" or an iteration number; written last
ROOT/release/ or ROOT/iter_0000010/
    .metadata  *.distcp                    PyTorch distributed checkpoint
    manifest.json                          sizes and checksums of all files, and facts about the content
ROOT/.release.partial/                     a checkpoint that is being written, or whose writer died
```
A directory is written under a hidden name beside its place, flushed to disk, given its manifest and only then renamed.
So a directory without a manifest is not a checkpoint, and a crash at any moment leaves either nothing or all of it.
This module imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.checkpoint.checksum import file_checksum

RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_HASH_THREADS = 4


def iteration_name(iteration: int) -> str:
    """Directory name of a training checkpoint: 10 -> ``iter_0000010``."""
    return f"iter_{iteration:07d}"


def checkpoint_name(value: str | int) -> str:
    """Directory name that a tracker value points to: ``release`` or ``iter_...``."""
    return RELEASE if value == RELEASE else iteration_name(int(value))


def read_tracker(root: str | os.PathLike[str]) -> str | int | None:
    """What the tracker file holds: ``"release"``, an iteration number, or None where there is no tracker.

    Raises:
        UserError: if the file holds anything else.
    """
    path = Path(root) / TRACKER
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if text == RELEASE:
        return RELEASE
    if text.isdigit():
        return int(text)
    raise UserError(f"{path} holds {text[:40]!r}; it must hold an iteration number or {RELEASE!r}")


def write_tracker(root: str | os.PathLike[str], value: str | int) -> None:
    """Point the tracker of ``root`` to ``"release"`` or an iteration; atomic, and on disk when this returns."""
    write_atomically(Path(root) / TRACKER, str(value).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by rename, so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def resolve_checkpoint(root: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that the tracker in ``root`` points to.

    Raises:
        UserError: if ``root``, the tracker or the directory is missing, naming the step of the guide that makes it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"checkpoint directory {root} does not exist; convert the weights first (step 2: mm-convert)")
    value = read_tracker(root)
    if value is None:
        raise UserError(
            f"{root} has no {TRACKER}, so it holds no finished checkpoint; convert the weights first "
            "(step 2: mm-convert) or wait for training to save one"
        )
    path = root / checkpoint_name(value)
    if not path.is_dir():
        raise UserError(f"{root / TRACKER} points to {path.name}, which is missing; restore it or correct the tracker")
    return path


def partial_name(target: Path) -> Path:
    """Where ``target`` lies until it is complete."""
    return target.with_name(f".{target.name}.partial")


def prepare_directory(target: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> Path:
    """Make the directory in which ``target`` is to be written; for one process, the others wait until it returns.

    Args:
        target: final place.
        overwrite: accept that ``target`` exists; it stays in place until ``finish_directory``.
        resume: keep what an earlier writer left; otherwise it is removed.

    Raises:
        UserError: if ``target`` exists and ``overwrite`` is false.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it, or name another directory")
    partial = partial_name(target)
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def finish_directory(
    partial: Path,
    target: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
    checksums: Mapping[str, str] | None = None,
) -> None:
    """Flush ``partial`` to disk, write its manifest and rename it to ``target``; for one process, after all wrote.

    Args:
        partial: what ``prepare_directory`` returned.
        target: final place.
        metadata: JSON-able facts about the content, kept under ``metadata`` in the manifest.
        overwrite: replace an existing ``target``.
        checksums: checksums that are known already, by relative file name; all others are computed here.
    """
    target, known = Path(target), dict(checksums or {})
    (partial / MANIFEST).unlink(missing_ok=True)
    names = _files_below(partial)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        found = pool.map(lambda name: known.get(name) or file_checksum(partial / name), names)
        known = dict(zip(names, found, strict=True))
        list(pool.map(lambda name: _sync_file(partial / name), names))
    files = {name: {"size": (partial / name).stat().st_size, "checksum": known[name]} for name in names}
    manifest = {"format": MANIFEST_FORMAT, "files": files, "metadata": dict(metadata)}
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    for directory in {(partial / name).parent for name in names}:
        _sync_directory(directory)
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        if not overwrite:
            raise UserError(f"{target} exists; pass --overwrite to replace it, or name another directory")
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def commit_directory(
    target: str | os.PathLike[str], metadata: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Path]:
    """Give a temporary directory to write into; it becomes ``target`` when the block ends without an error.

    Args:
        target: final place.
        metadata: facts for the manifest; may be filled inside the block.
        overwrite: replace an existing ``target``.
    """
    partial = prepare_directory(target, overwrite=overwrite)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_directory(partial, target, metadata, overwrite=overwrite)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        UserError: if it is missing or unreadable: then the directory is no complete checkpoint.
    """
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise UserError(f"checkpoint directory {path} does not exist")
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} has no {MANIFEST}, so it is no complete checkpoint; make it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); make the checkpoint again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{file} is no manifest of a checkpoint; make the checkpoint again")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(
            f"{file} has format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}; make it again"
        )
    return manifest


def verify_directory(path: str | os.PathLike[str], *, checksums: bool = False) -> dict[str, Any]:
    """Check that a checkpoint directory is complete; returns its manifest.

    Args:
        path: a checkpoint directory.
        checksums: also read all files and compare their checksums; sizes are always compared.

    Raises:
        UserError: naming the files that are missing, of another size, or of another content.
    """
    path = Path(path)
    manifest = read_manifest(path)
    faults = []
    for name, facts in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            faults.append(f"{name} is missing")
            continue
        if size != facts["size"]:
            faults.append(f"{name} has {size} bytes instead of {facts['size']}")
    if checksums and not faults:
        names = list(manifest["files"])
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = pool.map(lambda name: file_checksum(path / name), names)
            faults += [
                f"{name} has another checksum than recorded"
                for name, checksum in zip(names, found, strict=True)
                if checksum != manifest["files"][name]["checksum"]
            ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} is damaged: {'; '.join(faults[:3])}{more}; restore these files or make it again")
    return manifest


def _files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    # Some network file systems refuse to open or sync a directory; the rename itself has happened then.
    with contextlib.suppress(OSError):
        _sync_file(path)
