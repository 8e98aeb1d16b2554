"""The directory format of checkpoints: what makes one complete, and how one comes into being atomically.

```
ROOT/latest_checkpointed_iteration.txt     "release" or an iteration number; written last
ROOT/release/ or ROOT/iter_0000010/
    .metadata  *.distcp                    PyTorch distributed checkpoint
    manifest.json                          sizes and checksums of all files, and facts about the content
ROOT/.iter_0000010.partial/                a checkpoint that is being written, or whose writer died
ROOT/.iter_0000010.replaced/               the one that had this name before, while another takes its place
```
A directory is written under a hidden name beside its place, flushed to disk, given its manifest and only then renamed.
So a directory without a manifest is not a checkpoint, and a crash at any moment leaves either nothing or all of it.
This module imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.checksum import file_checksum
from mindspeed_mm.checkpoint.files import (
    DIRECTORY_MODE,
    FILE_MODE,
    make_directory,
    remove,
    set_mode,
    sync_directory,
    sync_file,
    write_atomically,
)
from mindspeed_mm.errors import UserError

RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_HASH_THREADS = 4


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A file that its writer has flushed to disk and summed.

    Attributes:
        size: in bytes.
        checksum: of the whole.
        items: (offset, length, checksum) of each part that is read by itself; empty where these are not known.
    """

    size: int
    checksum: str
    items: Sequence[tuple[int, int, str]] = ()


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
    if not path.is_dir() and replaced_name(path).is_dir():
        return replaced_name(path)  # a writer was killed while it put another in its place
    if not path.is_dir():
        raise UserError(f"{root / TRACKER} points to {path.name}, which is missing; restore it or correct the tracker")
    return path


def partial_name(target: Path) -> Path:
    """Where ``target`` lies until it is complete."""
    return target.with_name(f".{target.name}.partial")


def replaced_name(target: Path) -> Path:
    """Where ``target`` lies while another takes its place."""
    return target.with_name(f".{target.name}.replaced")


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
        remove(partial)
    make_directory(target.parent)
    make_directory(partial)
    return partial


def finish_directory(
    partial: Path,
    target: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
    written: Mapping[str, WrittenFile] | None = None,
) -> None:
    """Flush ``partial`` to disk, write its manifest and rename it to ``target``; for one process, after all wrote.

    Args:
        partial: what ``prepare_directory`` returned.
        target: final place.
        metadata: JSON-able facts about the content, kept under ``metadata`` in the manifest.
        overwrite: replace an existing ``target``.
        written: files that are on the disk and known already, by relative name; all others are flushed and summed here.

    Raises:
        UserError: if a file of ``written`` is missing or of another size; if ``target`` exists and may not be replaced.
    """
    target, known = Path(target), dict(written or {})
    (partial / MANIFEST).unlink(missing_ok=True)
    _check_written(partial, known)
    names = sorted({*_files_below(partial), *known})  # a network file system may list late what others wrote
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        entries = list(pool.map(lambda name: known.get(name) or _flush_and_sum(partial / name), names))
    files = {name: _manifest_entry(entry) for name, entry in zip(names, entries, strict=True)}
    directories = {parent for name in names for parent in (partial / name).parents if parent.is_relative_to(partial)}
    for path, mode in [(partial / name, FILE_MODE) for name in names] + [(d, DIRECTORY_MODE) for d in directories]:
        set_mode(path, mode)
    write_atomically(partial / MANIFEST, _manifest_text(files, metadata).encode())
    for directory in directories:
        sync_directory(directory)
    _put_in_place(partial, target, overwrite=overwrite)


def _put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    replaced = replaced_name(target)
    if not target.exists():
        os.rename(partial, target)
    elif overwrite:
        remove(replaced)
        os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(replaced, target)
            raise
    else:
        raise UserError(f"{target} exists; pass --overwrite to replace it, or name another directory")
    sync_directory(target.parent)
    remove(replaced)


def _check_written(partial: Path, written: Mapping[str, WrittenFile]) -> None:
    for name, entry in written.items():
        try:
            size = (partial / name).stat().st_size
        except FileNotFoundError:
            raise UserError(
                f"{partial / name} was written by another process and is not to be seen here; the directory must lie "
                "on a file system that all machines share"
            ) from None
        if size != entry.size:
            raise UserError(f"{partial / name} has {size} bytes instead of {entry.size}; does something else write it?")


def _flush_and_sum(path: Path) -> WrittenFile:
    sync_file(path)
    return WrittenFile(path.stat().st_size, file_checksum(path))


def _manifest_entry(file: WrittenFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": file.size, "checksum": file.checksum}
    if file.items:
        entry["items"] = [list(item) for item in file.items]
    return entry


def _manifest_text(files: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """JSON with a line for each file, which may have thousands of items."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
    facts = json.dumps(dict(metadata), indent=1)
    return f'{{\n "format": {MANIFEST_FORMAT},\n "metadata": {facts},\n "files": {{\n{lines}\n }}\n}}\n'


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
        remove(partial)
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
    manifest = read_manifest(path)
    verify_files(Path(path), manifest["files"], checksums=checksums)
    return manifest


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, checksums: bool = True) -> None:
    """Check some files of a checkpoint directory.

    Args:
        path: the directory.
        files: what the manifest says of them, by name.
        checksums: also read them and compare their checksums; sizes are always compared.

    Raises:
        UserError: naming the files that are missing, of another size, or of another content.
    """
    faults = []
    for name, facts in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            faults.append(f"{name} is missing")
            continue
        if size != facts["size"]:
            faults.append(f"{name} has {size} bytes instead of {facts['size']}")
    if checksums and not faults:
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = pool.map(lambda name: file_checksum(path / name), files)
            faults += [
                f"{name} has another checksum than recorded"
                for name, checksum in zip(files, found, strict=True)
                if checksum != files[name]["checksum"]
            ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} is damaged: {'; '.join(faults[:3])}{more}; restore these files or make it again")


def _files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
