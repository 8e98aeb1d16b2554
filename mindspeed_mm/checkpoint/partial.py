"""Partial checkpoints: some of the model's parameters, over a base that the manifest names and that loading checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mindspeed_mm.checkpoint.directory import (
    HEADER_BYTES,
    MANIFEST,
    find_checkpoint,
    is_count,
    is_huggingface,
    read_manifest,
)
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX, read_entries
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import INDEX_BYTES, is_directory, open_regular, read_bytes, reading, shorten
from mindspeed_mm.models.lora import LORA_KEY

BASE_KEY = "base"
"""Key of the manifest's metadata; only partial checkpoints have it."""
_KINDS = {"huggingface": "a Hugging Face directory", "checkpoint": "a checkpoint"}
_SAMPLES, _SAMPLE_BYTES = 4, 1024
"""Of each tensor in a Hugging Face directory, spread over it."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that a partial checkpoint is laid over.

    Attributes:
        kind: Hugging Face directory or distributed checkpoint.
        path: its directory.
        digest: of a checkpoint's manifest, which has the checksums of all files; of a Hugging Face directory's weight
            files by name, size, header and a sample of the values of each tensor.
    """

    kind: Literal["huggingface", "checkpoint"]
    path: str
    digest: str

    @classmethod
    def of(cls, directory: str | Path, option: str) -> Base:
        """Describe a Hugging Face directory, a checkpoint directory, or one with a tracker file.

        Args:
            directory: to describe.
            option: that named it, for messages.

        Raises:
            UserError: if it is none of these.
        """
        path = Path(directory)
        if is_huggingface(path):
            return cls("huggingface", str(path.resolve()), _digest_of_weights(path))
        path = find_checkpoint(path, option)
        with reading(str(path / MANIFEST), f"{option} needs a complete checkpoint"):
            content = read_bytes(path / MANIFEST, limit=INDEX_BYTES)
        return cls("checkpoint", str(path.resolve()), hashlib.sha256(content).hexdigest())

    @classmethod
    def recorded(cls, manifest: Mapping[str, Any]) -> Base | None:
        """The base of a checkpoint; None for one that holds the whole model.

        Raises:
            UserError: if the manifest describes it in another way than ``Base`` does.
        """
        if BASE_KEY not in manifest["metadata"]:
            return None
        base = manifest["metadata"][BASE_KEY]
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(base, dict) or base.keys() != fields or not all(isinstance(v, str) for v in base.values()):
            raise UserError(f"{MANIFEST}: base must have the texts {', '.join(sorted(fields))} and is "
                            f"{shorten(base, 100)}; restore the checkpoint")
        if base["kind"] not in _KINDS:
            raise UserError(f"{MANIFEST}: the kind of base must be one of {', '.join(_KINDS)} and is "
                            f"{shorten(base['kind'], 40)}; restore the checkpoint")
        return cls(**base)


def find_base(manifest: Mapping[str, Any], checkpoint: Path, *, moved_to: str | None, option: str) -> Base | None:
    """The base of a checkpoint, at its present path and unchanged; None for a checkpoint of the whole model.

    Args:
        manifest: of the checkpoint.
        checkpoint: its directory, for messages.
        moved_to: where the base is now; None for where it was.
        option: that names ``moved_to``.

    Raises:
        UserError: if the base is missing, has changed or is another one, or if the checkpoint has none.
    """
    recorded = Base.recorded(manifest)
    if recorded is None:
        if moved_to is not None:
            raise UserError(f"{option} {moved_to}: {checkpoint} holds the whole model; leave the option out")
        return None
    path = Path(moved_to or recorded.path)
    if not is_directory(path):
        raise UserError(
            f"{checkpoint} holds a part of the model, and its base {shorten(path)} does not exist; name the base by "
            f"{option} DIR"
        )
    found = Base.of(path, option)
    if (found.kind, found.digest) != (recorded.kind, recorded.digest):
        raise UserError(
            f"{path} is not the base of {checkpoint}, or has changed since; the base was {_KINDS[recorded.kind]}, "
            f"{shorten(recorded.path)}; name that by {option} DIR"
        )
    return found


def refuse_lora(manifest: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint of a LoRA run where one of a whole model is expected.

    Raises:
        UserError: naming the commands for it.
    """
    if LORA_KEY in manifest["metadata"]:
        raise UserError(f"{checkpoint} holds LoRA adapters; merge_lora of mm-convert adds them to the base model, "
                        "lora_to_hf writes them for PEFT, vLLM and SGLang, and verify_lora compares them")


def model_of_base(base: Base | None, named: str) -> str:
    """The directory whose weights a partial checkpoint is laid over: a Hugging Face directory, if that can be known.

    Args:
        base: of the checkpoint; None for one of the whole model.
        named: Hugging Face directory of the run, from which a converted checkpoint is taken to be made.
    """
    if base is None or base.kind == "huggingface":
        return named if base is None else base.path
    try:
        converted = read_manifest(base.path)["metadata"].get("kind") == "converted"
    except (UserError, AttributeError):  # it has moved
        return named
    return named if converted else base.path


def check_expert_layout(layout: str, manifest: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a layout for a checkpoint that has no Hugging Face directory as its base.

    Raises:
        UserError: if ``layout`` is not ``auto`` and would have no effect.
    """
    base = Base.recorded(manifest)
    if layout != "auto" and (base is None or base.kind != "huggingface"):
        raise UserError(
            f"--expert-layout {layout} is for Hugging Face weights, and {checkpoint} has none as its base; leave it out"
        )


def base_of_run(start: Path, *, moved_to: str | None, option: str) -> tuple[Base, set[str]]:
    """The base of a run's partial checkpoints.

    Args:
        start: Hugging Face directory or checkpoint that the run started from.
        moved_to: see :func:`find_base`.
        option: likewise.

    Returns:
        The base, and the parameters that ``start`` holds over it: they differ from the base, so that the run's own
        checkpoints must hold them too, trained or not.

    Raises:
        UserError: as :func:`find_base`.
    """
    if is_huggingface(start):
        return Base.of(start, option), set()
    manifest = read_manifest(start)
    base = find_base(manifest, start, moved_to=moved_to, option=option)
    if base is None:
        return Base.of(start, option), set()
    names = read_entries(start, manifest)
    return base, {name.removeprefix(MODEL_PREFIX) for name in names if name.startswith(MODEL_PREFIX)}


def _digest_of_weights(directory: Path) -> str:
    """Tells apart models of equal shapes, such as fine-tuned ones, without reading all values."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with reading(str(path)), os.fdopen(open_regular(path, limit=1 << 62), "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, file.read(8)
            if int.from_bytes(length, "little") > min(size, HEADER_BYTES):
                raise UserError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
            header = file.read(int.from_bytes(length, "little"))
            digest.update(os.fsencode(f"{path.name}\n{size}\n") + length + header)
            for start, end in _data_offsets(header, path, size):
                for part in range(_SAMPLES):
                    offset = start + (end - start) * part // _SAMPLES
                    file.seek(8 + len(header) + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


def _data_offsets(header: bytes, path: Path, size: int) -> list[tuple[int, int]]:
    """First and last byte of each tensor; this module does without torch, which ``safetensors_io`` imports."""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        pairs = sorted((first, last) for first, last in (entry["data_offsets"] for entry in entries.values()))
        if any(not is_count(first) or not is_count(last) or not first <= last <= size for first, last in pairs):
            raise ValueError("offsets outside the file")
        return pairs
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header; download it again") from error
