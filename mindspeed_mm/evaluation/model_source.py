"""The model of ``--model``: a Hugging Face directory, a checkpoint that is exported to one, or LoRA adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.adapters import AdapterConfig
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import (
    ADAPTER,
    BEST,
    BEST_TRACKER,
    MANIFEST,
    METADATA,
    TRACKER,
    find_checkpoint,
    is_adapter_directory,
    is_huggingface,
    iteration_name,
    read_manifest,
    verify_directory,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, is_file, is_present, read_text, shorten
from mindspeed_mm.models.lora import LORA_KEY

EXPORTS = "hf"
"""In the directory of checkpoints; where training exports to, too (``--save-hf-interval``)."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The model to evaluate, and the files that it is loaded from.

    Attributes:
        name: directory of the checkpoint, or the option's value where it names no checkpoint.
        directory: Hugging Face directory of the model, which may have to be made of ``checkpoint`` first.
        adapter: PEFT directory of LoRA adapters to add; None for none.
        checkpoint: to export; None if ``directory`` is there.
        assets: Hugging Face directory that gives the export its config, tokenizer and processor files.
    """

    name: str
    directory: str
    adapter: str | None = None
    checkpoint: str | None = None
    assets: str | None = None

    @property
    def config_directory(self) -> str:
        """A directory that has the model's ``config.json`` already."""
        return self.assets or self.directory

    def export(self) -> None:
        """Make ``directory`` of the checkpoint, with progress on the terminal; nothing if it is there.

        Raises:
            UserError: if the checkpoint cannot be exported.
        """
        if self.checkpoint is None:
            return
        print(f"exporting {self.checkpoint} to {self.directory}, which later runs use again", flush=True)
        dcp_to_hf(self.checkpoint, self.directory, self.assets or "", overwrite=True)

    def identity(self) -> str:
        """Changes when the weights change: of checksums where a manifest has them, else of sizes and times of files."""
        facts: list[Any] = [_facts(Path(self.directory))]
        if self.adapter is not None:
            facts.append(_facts(Path(self.adapter)))
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _facts(directory: Path) -> Any:
    if is_file(directory / MANIFEST):
        return sorted((name, str(entry)) for name, entry in read_manifest(directory)["files"].items())
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")])
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def find_model(
    model: str, *, adapter: str | None = None, best: bool = False, assets: str | None = None,
    export_dir: str | None = None,
) -> ModelSource:
    """Find out what ``--model`` names, without reading weights.

    Args:
        model: a Hugging Face directory; a checkpoint, or the directory of its tracker file, or ``best`` in it, as
            with ``best``; PEFT's directory of adapters; the checkpoint of a LoRA run.
        adapter: ``--adapter``, a PEFT directory, or the checkpoint of a LoRA run.
        best: take the checkpoint that ``best_checkpointed_iteration.txt`` names.
        assets: Hugging Face directory for the small files of an export; None: that of the training.
        export_dir: where an export goes; None: ``hf/`` next to the checkpoint.

    Raises:
        UserError: if it is none of these.
    """
    path = Path(model)
    if path.name == BEST and not is_present(path) and is_directory(path.parent):
        path, best = path.parent, True
    if not is_directory(path):
        raise UserError(f"--model {shorten(model)} is not a directory; name a Hugging Face directory, a checkpoint, or "
                        "a directory of LoRA adapters")
    if best and not is_file(path / BEST_TRACKER):
        raise UserError(f"--model {model}: {path} has no {BEST_TRACKER}, which names the best checkpoint; train with "
                        "--keep-best, or name a checkpoint")
    added = None if adapter is None else _adapter_of(adapter)
    if is_adapter_directory(path):
        return _over_base(model, path, assets, added)
    if is_huggingface(path) and not is_present(path / TRACKER):
        return ModelSource(model, str(path), added)
    checkpoint = find_checkpoint(path / iteration_name(_best_iteration(path)) if best else path, "--model")
    manifest = verify_directory(checkpoint, plain=False)
    name = str(checkpoint)
    if LORA_KEY in manifest["metadata"]:
        base = assets or _trained_model(manifest)
        return _over_base(name, checkpoint / ADAPTER, base, added)
    assets = assets or _trained_model(manifest)
    if assets is None or not is_file(Path(assets) / "config.json"):
        named = f"the model that it was trained from, {assets}, is not there" if assets else "it names no model"
        raise UserError(f"--model {checkpoint}: {named}; give --assets DIR, the Hugging Face directory with its "
                        "config, tokenizer and processor files")
    target = Path(export_dir) if export_dir else checkpoint.parent / EXPORTS / checkpoint.name
    if _is_export_of(target, manifest):
        return ModelSource(name, str(target), added)
    if is_present(target) and not is_file(target / MANIFEST):
        raise UserError(f"--export-dir {target} is there, and no export of a checkpoint; name another directory")
    return ModelSource(name, str(target), added, name, assets)


def _best_iteration(path: Path) -> int:
    text = read_text(path / BEST_TRACKER).strip()
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UserError(f"{path / BEST_TRACKER} holds {text[:40]!r}; it must hold an iteration number")
    return int(text)


def _trained_model(manifest: Mapping[str, Any]) -> str | None:
    """The Hugging Face directory that a checkpoint's training started from."""
    metadata = manifest["metadata"]
    for keys in (("model", "init_from_hf_path"),
                 ("data", "dataset_param", "preprocess_parameters", "model_name_or_path")):
        value: Any = metadata
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value
    return None


def _is_export_of(target: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a directory is a complete export of the checkpoint with this manifest."""
    if not is_file(target / MANIFEST) or not is_file(target / "config.json"):
        return False
    source = read_manifest(target)["metadata"].get("source")
    return isinstance(source, dict) and source.get(METADATA) == manifest["files"].get(METADATA) is not None


def _adapter_of(adapter: str) -> str:
    """The PEFT directory that ``--adapter`` names, itself or by a checkpoint of a LoRA run."""
    path = Path(adapter)
    if is_directory(path) and is_present(path / TRACKER):
        path = find_checkpoint(path, "--adapter")
    return str(path / ADAPTER if is_adapter_directory(path / ADAPTER) else path)


def _over_base(given: str, adapter: Path, base: str | None, other: str | None) -> ModelSource:
    if other is not None:
        raise UserError(f"--model {given} holds LoRA adapters, and --adapter names others; give the base model as "
                        "--model, or leave --adapter out")
    config = AdapterConfig(adapter)
    base = base or config.base
    if not base or not is_file(Path(base) / "config.json"):
        raise UserError(f"--model {given} holds LoRA adapters, and their base model {shorten(base or '')} is not "
                        f"there; give --model BASE --adapter {given}")
    return ModelSource(given, base, str(adapter))
