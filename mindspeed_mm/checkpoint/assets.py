"""Everything of a Hugging Face directory besides its weights: config, tokenizer, processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.errors import UserError

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
_OWN_RECORD = "manifest.json"
_FOLDERS = ("additional_chat_templates",)  # the only folder that transformers reads besides the files
_DTYPE_KEYS = ("dtype", "torch_dtype")  # as transformers 5 and as earlier versions spell it
_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def config_dtype(directory: Path) -> torch.dtype | None:
    """The weights' type that ``config.json`` names, None where it names none."""
    config = json.loads((directory / "config.json").read_text())
    for holder in (config, config.get("text_config") or {}):
        for key in _DTYPE_KEYS:
            if (name := holder.get(key)) in _NAMES:
                return _NAMES[name]
    return None


def copy_assets(source: Path, target: Path, *, dtype: torch.dtype | None) -> None:
    """Copy all files that are no weights.

    Args:
        source: Hugging Face directory.
        target: existing directory.
        dtype: type of the weights in ``target``, if they have one; ``config.json`` is changed only where it says
            otherwise.
    """
    for path in sorted(source.iterdir()):
        name = path.name
        is_weight = path.suffix in _WEIGHT_SUFFIXES or name.endswith(".index.json")
        if path.is_file() and not is_weight and name != _OWN_RECORD and not name.startswith("."):
            shutil.copyfile(path, target / name)
        elif path.is_dir() and name in _FOLDERS:
            shutil.copytree(path, target / name, dirs_exist_ok=True)
    if dtype not in (None, config_dtype(target)):
        config = json.loads((target / "config.json").read_text())
        _set_dtype(config, str(dtype).removeprefix("torch."))
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_replaceable(target: Path, *, overwrite: bool, keep: Sequence[Path]) -> None:
    """Refuse a target that holds something which is not a model directory, or is needed.

    Args:
        target: where the result will be.
        overwrite: whether an existing model directory may be replaced.
        keep: directories that must not be lost.

    Raises:
        UserError: saying why.
    """
    resolved = target.resolve()
    for path in keep:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise UserError(f"--save_dir {target} is or holds {path}, which is read from; name another directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save_dir {target} is a file; name another directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--save_dir {target} exists; pass --overwrite to replace it, or name another directory")
    if not (target / "config.json").is_file():
        raise UserError(f"--save_dir {target} is no model directory, so it is not replaced; name another directory")


def _set_dtype(config: dict[str, Any], name: str) -> None:
    nested = [config.get(key) for key in ("text_config", "vision_config")]
    for holder in [config, *(part for part in nested if isinstance(part, dict))]:
        for key in _DTYPE_KEYS:
            if key in holder:
                holder[key] = name
    if not any(key in config for key in _DTYPE_KEYS):
        config["torch_dtype"] = name
