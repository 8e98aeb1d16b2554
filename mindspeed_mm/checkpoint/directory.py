"""The directory format of checkpoints: names, tracker, manifest, verification, and atomic commit.

```
ROOT/latest_checkpointed_iteration.txt     "release" or an iteration number; written last
ROOT/best_checkpointed_iteration.txt       of the best checkpoint, which ROOT/best stands for; see best.py
ROOT/release/ or ROOT/iter_0000010/
    .metadata  *.distcp                    PyTorch distributed checkpoint
    manifest.json                          sizes and checksums of all files, and facts about the content
ROOT/.iter_0000010.partial/                a checkpoint being written, or left by an interrupted save
    .finished/                             of a conversion: its plan, and a record of each file that is on disk
ROOT/.iter_0000010.replaced/               the previous checkpoint of this name, while a new one is renamed into place
```
A checkpoint is written to a hidden directory, flushed to disk, completed by its manifest and only then renamed. A
directory without a manifest is not a checkpoint, and a crash at any moment leaves either all of it or nothing.
This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import (
    DIRECTORY_MODE,
    FILE_MODE,
    file_checksum,
    make_directory,
    remove,
    run_all,
    set_mode,
    sync_directory,
    sync_file,
    write_atomically,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import (
    INDEX_BYTES,
    inside,
    is_file,
    is_present,
    kind_of,
    parse_json,
    read_bytes,
    read_json,
    reason,
    shorten,
)

RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
BEST_TRACKER = "best_checkpointed_iteration.txt"
BEST = "best"
"""Name in a ``--save`` directory that stands for the best checkpoint, unless something of that name is there."""
METADATA = ".metadata"
PROGRESS_FILE = "progress.json"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
FINISHED = ".finished"
MEDIA_KEY = "media"
"""Entry of a training checkpoint's metadata: the run's ``MediaSettings``, of a family that takes images or videos."""
RUN_KEY = "run"
"""Entry of a training checkpoint's metadata: which run wrote it."""
MODEL_CONFIG_KEY = "model_config"
"""Entry of a checkpoint's metadata: what its weights compute, from the model's ``config.json``."""
ADAPTER = "adapter"
"""Directory in each checkpoint of a LoRA run, which PEFT loads as it is."""
ADAPTER_CONFIG = "adapter_config.json"
"""By which a directory of LoRA adapters is known, in the form of PEFT."""
_PLAN = "plan.json"
_HF_CONFIG = "config.json"
_HASH_THREADS = 4
HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file; the format's own limit."""
_TRACKER_BYTES, _MOST_DIGITS = 4096, 18
_MOST_DIMENSIONS = 64  # torch's own limit


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A file that its writer has flushed to disk, with its checksum.

    Attributes:
        size: in bytes.
        checksum: of the whole file.
        chunks: of a distributed checkpoint: (tensor, offsets in it, index of the chunk, byte offset, length, checksum).
        facts: further ones, for ``mm-convert``.
    """

    size: int
    checksum: str
    chunks: Sequence[tuple[str, Sequence[int], int, int, int, str]] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    return _read_tracker(Path(root) / TRACKER)


def read_best_tracker(root: str | os.PathLike[str]) -> str | int | None:
    """Content of the file that names the best checkpoint; else as :func:`read_tracker`."""
    return _read_tracker(Path(root) / BEST_TRACKER)


def _read_tracker(path: Path) -> str | int | None:
    try:
        text = read_bytes(path, limit=_TRACKER_BYTES).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if text == RELEASE:
        return RELEASE
    if text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS:
        return int(text)
    raise UserError(f"{path} holds {text[:40]!r}; it must hold an iteration number or {RELEASE!r}")


def write_tracker(root: str | os.PathLike[str], value: str | int) -> None:
    """Point the tracker of ``root`` to ``"release"`` or an iteration, atomically and flushed to disk."""
    write_atomically(Path(root) / TRACKER, str(value).encode())


def resolve_checkpoint(root: str | os.PathLike[str]) -> Path:
    """The checkpoint directory that the tracker in ``root`` points to, or ``root`` if it is itself a checkpoint.

    Raises:
        UserError: if ``root``, the tracker or the directory is missing, naming the step of the guide that creates it.
    """
    root = named_checkpoint(Path(root))
    if not root.is_dir():
        raise UserError(f"checkpoint directory {root} does not exist; correct --load, convert the weights (step 2: "
                        "mm-convert), or leave --load out to start from init_from_hf_path of the model file")
    value = read_tracker(root)
    if value is None and is_file(root / MANIFEST):
        return root  # a checkpoint itself, such as .../iter_0000010
    if value is None and is_adapter_directory(root):
        raise UserError(f"{root} holds LoRA adapters for PEFT; start from them with --lora-init-from, or name the "
                        f"checkpoint that holds {root.name} to resume its run")
    if value is None and is_huggingface(root):
        raise UserError(f"{root} is a Hugging Face directory; name a checkpoint that mm-convert makes of it (step 2), "
                        "or leave --load out to load the weights of init_from_hf_path as they are")
    if value is None:
        raise UserError(
            f"{root} has no {TRACKER}, so it has no finished checkpoint; correct --load, convert the weights (step 2: "
            "mm-convert), or wait for training to save one"
        )
    path = root / checkpoint_name(value)
    if not path.is_dir() and replaced_name(path).is_dir():
        return replaced_name(path)  # a save was killed between the two renames
    if not path.is_dir():
        raise UserError(f"{root / TRACKER} points to {path.name}, which is missing; restore it or correct the tracker")
    return path


def named_checkpoint(path: Path) -> Path:
    """``path``, or the checkpoint directory that it stands for: ``SAVE/best`` for the best one in ``SAVE``."""
    if path.name != BEST or is_present(path):
        return path
    value = read_best_tracker(path.parent)
    return path if value is None else path.parent / checkpoint_name(value)


def checkpoint_to_load(load: str | os.PathLike[str], *, plain: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of ``--load`` and its manifest.

    Args:
        load: directory of a tracker file, or a checkpoint.
        plain: it may also be one of torch's without a manifest (``--check-load none``).

    Raises:
        UserError: if it is missing or incomplete.
    """
    path = find_checkpoint(Path(load), "--load") if plain else resolve_checkpoint(load)
    return path, verify_directory(path, plain=plain)


def partial_name(target: Path) -> Path:
    """Path of ``target`` until it is complete."""
    return target.with_name(f".{target.name}.partial")


def replaced_name(target: Path) -> Path:
    """Path of the previous ``target`` while a new one is renamed into place."""
    return target.with_name(f".{target.name}.replaced")


class AtomicDirectory:
    """A directory that is written under a hidden name and renamed: absent or complete after a crash at any moment.

    Used by one process, while all ranks may write into ``partial`` between ``prepare`` and ``commit``. A conversion
    also records the files that are on disk, and takes them over if it was interrupted and has the same plan.

    Attributes:
        target: final path.
        partial: where the files are written.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """``overwrite``: accept an existing ``target``; it stays until ``commit``."""
        self.target = Path(target)
        self.partial = partial_name(self.target)
        self._overwrite = overwrite

    def prepare(self) -> Path:
        """Make the partial directory, empty.

        Raises:
            UserError: if the target exists and may not be replaced.
        """
        self.check()
        remove(self.partial)
        make_directory(self.partial)
        return self.partial

    def check(self) -> None:
        """Refuse an existing target that may not be replaced.

        Raises:
            UserError: with the remedy.
        """
        if self.target.exists() and not self._overwrite:
            raise UserError(f"{self.target} exists; pass --overwrite to replace it, or name another directory")

    def resume(self, plan: str) -> dict[str, WrittenFile]:
        """Prepare the partial directory, and keep the files that an interrupted writer of the same plan has finished.

        Args:
            plan: fingerprint of everything that determines the bytes of the files.

        Returns:
            The files that are on disk with the recorded checksum.
        """
        records = self.partial / FINISHED
        finished: dict[str, WrittenFile] = {}
        if _read_json(records / _PLAN) == plan:
            found = {path.name[:-5]: _read_json(path) for path in records.glob("*.json") if path.name != _PLAN}
            if found:
                print(f"checking {len(found)} file{'s' * (len(found) > 1)} finished by an interrupted run")
            checks = [functools.partial(_intact, self.partial / name, record) for name, record in found.items()]
            intact = run_all(checks, threads=_HASH_THREADS)
            finished = {name: WrittenFile(**found[name]) for name, good in zip(found, intact, strict=True) if good}
        if not finished:
            remove(self.partial)
        make_directory(records)
        for path in self.partial.iterdir():
            if path.name not in (FINISHED, *finished):
                remove(path)
        write_atomically(records / _PLAN, json.dumps(plan).encode())
        return finished

    def record(self, name: str, file: WrittenFile) -> WrittenFile:
        """Record a file of ``partial`` that is on disk, for ``resume``; returns it as ``resume`` would."""
        text = json.dumps(dataclasses.asdict(file))
        write_atomically(self.partial / FINISHED / f"{name}.json", text.encode())
        return WrittenFile(**json.loads(text))

    def abandon(self) -> None:
        """After an error: remove the partial directory, unless it has finished files for ``resume``."""
        if not any(path.name != _PLAN for path in (self.partial / FINISHED).glob("*.json")):
            remove(self.partial)

    def commit(self, metadata: Mapping[str, Any], written: Mapping[str, WrittenFile] | None = None) -> None:
        """Flush the partial directory to disk, write its manifest and rename it to the target.

        Args:
            metadata: JSON-able facts about the content, stored under ``metadata`` in the manifest.
            written: files whose writer has flushed and checksummed them, by relative name; all others are flushed and
                read here.

        Raises:
            UserError: if a file of ``written`` is missing or of another size, or the target may not be replaced.
        """
        partial, known = self.partial, dict(written or {})
        (partial / MANIFEST).unlink(missing_ok=True)
        _check_written(partial, known)
        # a network file system may list late what others wrote
        names = sorted({*(name for name in _files_below(partial) if not name.startswith(f"{FINISHED}/")), *known})
        rest = [name for name in names if name not in known]
        flushes = [functools.partial(_flush_and_checksum, partial / name) for name in rest]
        known.update(zip(rest, run_all(flushes, threads=_HASH_THREADS), strict=True))
        files = {name: _manifest_entry(known[name]) for name in names}
        directories = {path for name in names for path in (partial / name).parents if path.is_relative_to(partial)}
        for path, mode in [(partial / name, FILE_MODE) for name in names] + [(d, DIRECTORY_MODE) for d in directories]:
            set_mode(path, mode)
        write_atomically(partial / MANIFEST, _manifest_text(files, metadata).encode())
        for directory in directories:
            sync_directory(directory)
        self._put_in_place()

    def is_committed(self, plan: str) -> bool:
        """Whether a writer of the same plan was interrupted between ``commit`` and ``clean_up``."""
        if _read_json(self.target / FINISHED / _PLAN) != plan:
            return False
        try:
            return bool(read_manifest(self.target))
        except UserError:
            return False

    def clean_up(self) -> None:
        """Remove the records of a committed conversion, the plan last, and what the new target replaced."""
        remove(replaced_name(self.target))
        for path in sorted((self.target / FINISHED).glob("*"), key=lambda path: path.name == _PLAN):
            remove(path)
        remove(self.target / FINISHED)

    def _put_in_place(self) -> None:
        replaced = replaced_name(self.target)
        self.check()
        if not self.target.exists():
            os.rename(self.partial, self.target)
        else:
            remove(replaced)
            os.rename(self.target, replaced)
            try:
                os.rename(self.partial, self.target)
            except OSError:
                os.rename(replaced, self.target)
                raise
        sync_directory(self.target.parent)
        remove(replaced)


def _intact(path: Path, record: Any) -> bool:
    """Whether a file is the one of its record, and the record has the fields of a ``WrittenFile``."""
    fields = {"size": int, "checksum": str, "chunks": list, "facts": dict}
    if not isinstance(record, dict) or record.keys() != fields.keys():
        return False
    if any(not isinstance(record[name], kind) for name, kind in fields.items()):
        return False
    if not all(isinstance(chunk, list) and len(chunk) == 6 for chunk in record["chunks"]):
        return False
    if not is_file(path) or path.stat().st_size != record["size"]:
        return False
    return file_checksum(path) == record["checksum"]


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path, limit=INDEX_BYTES).decode(), str(path))
    except (OSError, ValueError, UserError):
        return None


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
        entry["items"] = [list(chunk[3:]) for chunk in file.chunks]
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
    if not is_present(file):
        raise UserError(f"{path} has no {MANIFEST}, so it is not a complete checkpoint; create it again")
    manifest = read_json(file, remedy="create the checkpoint again", limit=INDEX_BYTES)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(
            f"{file} has format {shorten(manifest.get('format'), 40)}, this version reads {MANIFEST_FORMAT}; create it "
            "again"
        )
    for key in ("files", "metadata"):
        if not isinstance(manifest.get(key), dict):
            raise UserError(f"{file} is not a manifest of a checkpoint: its {key} must be an object and is "
                            f"{kind_of(manifest.get(key))}; create the checkpoint again")
    for name, entry in manifest["files"].items():
        inside(file, name)  # for the message: the name is one of the manifest's
        known = isinstance(entry, dict) and isinstance(entry.get("checksum"), str) and is_count(entry.get("size"))
        if not known or not _are_items(entry.get("items", [])):
            raise UserError(f"{file}: the entry of {shorten(name)} is damaged: {shorten(entry, 100)}; create the "
                            "checkpoint again")
    return manifest


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 that fits into 62 bits, and not a boolean."""
    return type(value) is int and 0 <= value < 1 << 62


def is_shape(value: Any) -> bool:
    """Whether a list, tuple or ``torch.Size`` is the shape of a tensor that torch can describe."""
    if not isinstance(value, (list, tuple)) or len(value) > _MOST_DIMENSIONS or not all(map(is_count, value)):
        return False
    # also without elements: torch computes strides from the other extents
    return math.prod(max(1, extent) for extent in value) < 1 << 60


def _are_items(items: Any) -> bool:
    """Whether these are chunks as the manifest lists them: offset, length, checksum."""
    return isinstance(items, list) and all(
        isinstance(item, list) and len(item) == 3 and is_count(item[0]) and is_count(item[1])
        and isinstance(item[2], str)
        for item in items
    )


def verify_directory(
    path: str | os.PathLike[str], *, checksums: bool = False, plain: bool = False
) -> dict[str, Any]:
    """Check that a checkpoint directory is complete; returns its manifest.

    Args:
        path: a checkpoint directory.
        checksums: also read all files and compare their checksums; sizes are always compared.
        plain: accept a checkpoint of torch's without a manifest, of which nothing can be checked; an empty manifest is
            returned.

    Raises:
        UserError: naming missing files, and files whose size or checksum differs.
    """
    if plain and is_present(Path(path) / METADATA) and not is_present(Path(path) / MANIFEST):
        return {"format": MANIFEST_FORMAT, "metadata": {}, "files": {}}
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
            status = os.stat(path / name)
        except (OSError, ValueError):  # the second: characters that no file name has
            faults.append(f"{name} is missing")
            continue
        if not stat.S_ISREG(status.st_mode):
            faults.append(f"{name} is not a regular file")
        elif status.st_size != facts["size"]:
            faults.append(f"{name} has {status.st_size} bytes instead of {facts['size']}")
    if checksums and not faults:
        found = run_all([functools.partial(file_checksum, path / name) for name in files], threads=_HASH_THREADS)
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


def is_adapter_directory(path: Path) -> bool:
    """Whether a directory holds LoRA adapters in the form of PEFT, and no model beside them."""
    return is_present(path / ADAPTER_CONFIG) and not is_present(path / _HF_CONFIG)


def find_checkpoint(path: Path, option: str) -> Path:
    """The checkpoint directory that ``path`` is, or that its tracker file points to.

    Args:
        path: as given by the user.
        option: command-line option that gave it, for messages.

    Raises:
        UserError: if it is none, saying what the path is instead.
    """
    path = named_checkpoint(path)
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; name a checkpoint, or the directory of its tracker file")
    if not path.is_dir():
        raise UserError(f"{option} {path} is a file; name the checkpoint's directory")
    if is_present(path / TRACKER):
        return resolve_checkpoint(path)
    if is_adapter_directory(path):
        raise UserError(f"{option} {path} holds LoRA adapters and not a checkpoint; lora_hf_to_dcp of mm-convert makes "
                        "one of them, merge_lora a whole model")
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
    """Refuse a distributed checkpoint, or LoRA adapters alone, where a Hugging Face directory is expected.

    Raises:
        UserError: if ``path`` is one of these.
    """
    if is_adapter_directory(path):
        raise UserError(f"{option} {path} holds LoRA adapters and not a model; lora_hf_to_dcp of mm-convert takes "
                        "them, and merge_lora adds them to a model")
    if not (path / _HF_CONFIG).exists() and any((path / name).exists() for name in (TRACKER, METADATA)):
        raise UserError(f"{option} {path} is a distributed checkpoint; name a Hugging Face directory")
