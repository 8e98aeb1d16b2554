"""The directory format of checkpoints: names, tracker, manifest, verification, and atomic commit.

```
ROOT/latest_checkpointed_iteration.txt     "release" or an iteration number; written last
ROOT/release/ or ROOT/iter_0000010/
    .metadata  *.distcp                    PyTorch distributed checkpoint
    manifest.json                          sizes and checksums of all files, and facts about the content
ROOT/.iter_0000010.partial/                a checkpoint being written, or left by an interrupted save
ROOT/.iter_0000010.replaced/               the previous checkpoint of this name, while a new one is renamed into place
```
A checkpoint is written to a hidden directory, flushed to disk, completed by its manifest and only then renamed. A
directory without a manifest is not a checkpoint, and a crash at any moment leaves either all of it or nothing.
This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import (
    DIRECTORY_MODE,
    FILE_MODE,
    file_checksum,
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
METADATA = ".metadata"
PROGRESS_FILE = "progress.json"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_HF_CONFIG = "config.json"
_HASH_THREADS = 4


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A file that its writer has flushed to disk, with its checksum.

    Attributes:
        size: in bytes.
        checksum: of the whole file.
        chunks: (offset, length, checksum) of each chunk; empty if these are not known.
    """

    size: int
    checksum: str
    chunks: Sequence[tuple[int, int, str]] = ()


def iteration_name(iteration: int) -> str:
    """Directory name of a training checkpoint: 10 -> ``iter_0000010``."""
    return f"iter_{iteration:07d}"


def checkpoint_name(value: str | int) -> str:
    """Directory name that a tracker value points to: ``release`` or ``iter_...``."""
    return RELEASE if value == RELEASE else iteration_name(int(value))


def read_tracker(root: str | os.PathLike[str]) -> str | int | None:
    """Content of the tracker file: ``"release"``, an iteration number, or None if there is no tracker.

    Raises:
        UserError: if the file has any other content.
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
    """Point the tracker of ``root`` to ``"release"`` or an iteration, atomically and flushed to disk."""
    write_atomically(Path(root) / TRACKER, str(value).encode())


def resolve_checkpoint(root: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that the tracker in ``root`` points to.

    Raises:
        UserError: if ``root``, the tracker or the directory is missing, naming the step of the guide that creates it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"checkpoint directory {root} does not exist; convert the weights first (step 2: mm-convert)")
    value = read_tracker(root)
    if value is None:
        raise UserError(
            f"{root} has no {TRACKER}, so it has no finished checkpoint; convert the weights first "
            "(step 2: mm-convert) or wait for training to save one"
        )
    path = root / checkpoint_name(value)
    if not path.is_dir() and replaced_name(path).is_dir():
        return replaced_name(path)  # a save was killed between the two renames
    if not path.is_dir():
        raise UserError(f"{root / TRACKER} points to {path.name}, which is missing; restore it or correct the tracker")
    return path


def partial_name(target: Path) -> Path:
    """Path of ``target`` until it is complete."""
    return target.with_name(f".{target.name}.partial")


def replaced_name(target: Path) -> Path:
    """Path of the previous ``target`` while a new one is renamed into place."""
    return target.with_name(f".{target.name}.replaced")


def prepare_directory(target: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> Path:
    """Make the directory in which ``target`` is written. Called by one rank, before any rank writes.

    Args:
        target: final path.
        overwrite: accept an existing ``target``; it stays until ``finish_directory``.
        resume: keep the files of an interrupted writer; otherwise they are removed.

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
    """Flush ``partial`` to disk, write its manifest and rename it to ``target``. Called by one rank, after all wrote.

    Args:
        partial: as returned by ``prepare_directory``.
        target: final path.
        metadata: JSON-able facts about the content, stored under ``metadata`` in the manifest.
        overwrite: replace an existing ``target``.
        written: files whose writer has flushed and checksummed them, by relative name; all others are flushed and read
            here.

    Raises:
        UserError: if a file of ``written`` is missing or of another size; if ``target`` exists and may not be replaced.
    """
    target, known = Path(target), dict(written or {})
    (partial / MANIFEST).unlink(missing_ok=True)
    _check_written(partial, known)
    names = sorted({*_files_below(partial), *known})  # a network file system may list late what others wrote
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        entries = list(pool.map(lambda name: known.get(name) or _flush_and_checksum(partial / name), names))
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
                f"{partial / name} was written by another rank and is not visible here; the directory must be on a "
                "file system that all machines share"
            ) from None
        if size != entry.size:
            raise UserError(f"{partial / name} has {size} bytes, not {entry.size}; is another process writing it?")


def _flush_and_checksum(path: Path) -> WrittenFile:
    sync_file(path)
    return WrittenFile(path.stat().st_size, file_checksum(path))


def _manifest_entry(file: WrittenFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": file.size, "checksum": file.checksum}
    if file.chunks:
        entry["items"] = [list(chunk) for chunk in file.chunks]
    return entry


def _manifest_text(files: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """JSON with one line per file, which may have thousands of chunks."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
    facts = json.dumps(dict(metadata), indent=1)
    return f'{{\n "format": {MANIFEST_FORMAT},\n "metadata": {facts},\n "files": {{\n{lines}\n }}\n}}\n'


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        UserError: if it is missing or unreadable, so that the directory is not a complete checkpoint.
    """
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise UserError(f"checkpoint directory {path} does not exist")
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} has no {MANIFEST}, so it is not a complete checkpoint; create it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); create the checkpoint again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{file} is not a manifest of a checkpoint; create the checkpoint again")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(
            f"{file} has format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}; create it again"
        )
    return manifest


def verify_directory(path: str | os.PathLike[str], *, checksums: bool = False) -> dict[str, Any]:
    """Check that a checkpoint directory is complete; returns its manifest.

    Args:
        path: a checkpoint directory.
        checksums: also read all files and compare their checksums; sizes are always compared.

    Raises:
        UserError: naming missing files, and files whose size or checksum differs.
    """
    manifest = read_manifest(path)
    verify_files(Path(path), manifest["files"], checksums=checksums)
    return manifest


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, checksums: bool = True) -> None:
    """Check some files of a checkpoint directory.

    Args:
        path: the directory.
        files: their manifest entries, by name.
        checksums: also read them and compare their checksums; sizes are always compared.

    Raises:
        UserError: naming missing files, and files whose size or checksum differs.
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


def is_huggingface(path: Path) -> bool:
    """Whether a directory looks like a Hugging Face model directory."""
    return (path / _HF_CONFIG).is_file() and not (path / METADATA).exists()


def find_checkpoint(path: Path, option: str) -> Path:
    """The checkpoint directory that ``path`` is, or that its tracker file points to.

    Args:
        path: as given by the user.
        option: command-line option that gave it, for messages.

    Raises:
        UserError: if it is none, saying what the path is instead.
    """
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; name a checkpoint, or the directory of its tracker file")
    if not path.is_dir():
        raise UserError(f"{option} {path} is a file; name the checkpoint's directory")
    if (path / TRACKER).is_file():
        return resolve_checkpoint(path)
    if is_huggingface(path):
        raise UserError(f"{option} {path} is a Hugging Face directory; name a distributed checkpoint")
    if not any((path / name).exists() for name in (MANIFEST, METADATA)):
        if partial_name(path / RELEASE).is_dir():
            raise UserError(f"{option} {path} holds an unfinished conversion; run the same hf_to_dcp command again")
        raise UserError(
            f"{option} {path} has neither {TRACKER} nor {MANIFEST}, so it is not a checkpoint; name .../{RELEASE}, "
            ".../iter_XXXXXXX, or the directory of the tracker file"
        )
    return path


def check_huggingface(path: Path, option: str) -> None:
    """Refuse a distributed checkpoint where a Hugging Face directory is expected.

    Raises:
        UserError: if ``path`` is a distributed checkpoint.
    """
    if not (path / _HF_CONFIG).exists() and any((path / name).exists() for name in (TRACKER, METADATA)):
        raise UserError(f"{option} {path} is a distributed checkpoint; name a Hugging Face directory")
