"""Broken model directories and converted checkpoints, read as training and ``mm-convert`` read them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from mindspeed_mm.checkpoint.directory import TRACKER, checkpoint_to_load, resolve_checkpoint, verify_directory
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.huggingface import read_headers
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.models.qwen3_vl.processor import read_image_settings
from mindspeed_mm.models.spec import spec_of
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.outcomes import Outcomes
from tests.helpers.tiny_recipe import write_recipe


def read_model(directory: Path) -> None:
    """The model's config, its processor, and the headers of its weights."""
    spec = spec_of(directory)
    config = spec.read_config(directory)
    spec.facts(config)
    read_image_settings(directory, min_pixels=1024, max_pixels=4096, vision=config.vision)
    read_headers(directory)


def read_checkpoint(root: Path) -> None:
    """The checkpoint that the tracker names, with all its checksums."""
    path, manifest = checkpoint_to_load(root, plain=False)
    Progress.read(path, manifest)
    reader = CheckpointReader(path, manifest, check="all")
    verify_directory(path, checksums=True)
    assert reader.tensors


def _damage(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_text(json.dumps(mutate_value(json.loads(content), rng)))
    else:
        path.write_bytes(mutate_bytes(content, rng))


def _fuzz(good: Path, names: list[str], count: int, seed: int, read: Callable[[Path], object]) -> Outcomes:
    outcomes = Outcomes()
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        name = names[index % len(names)]
        content = (good / name).read_bytes()
        _damage(good / name, rng)
        outcomes.run(f"{name}, seed {seed}, input {index}", lambda: read(good))
        (good / name).write_bytes(content)
    return outcomes


def fuzz_models(directory: Path, count: int, seed: int) -> Outcomes:
    """Damage the files of a model directory."""
    good = write_recipe(directory, records=2) / "checkpoint"
    weights = "model-00001-of-00001.safetensors"
    shutil.move(good / "model.safetensors", good / weights)
    index = {"metadata": {}, "weight_map": dict.fromkeys(_names_of(good / weights), weights)}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    read_model(good)
    names = ["config.json", "preprocessor_config.json", "model.safetensors.index.json", "config.json",
             weights]
    return _fuzz(good, names, count, seed, read_model)


def _names_of(path: Path) -> list[str]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def fuzz_checkpoints(directory: Path, count: int, seed: int) -> Outcomes:
    """Damage the files of a checkpoint: tracker, manifest, ``.metadata``, chunks."""
    source = write_recipe(directory, records=2) / "checkpoint"
    root = directory / "dcp"
    hf_to_dcp(source, root)
    read_checkpoint(root)
    release = resolve_checkpoint(root).relative_to(root)
    names = [TRACKER, f"{release}/manifest.json", f"{release}/.metadata", f"{release}/manifest.json"]
    return _fuzz(root, names, count, seed, read_checkpoint)


KINDS: dict[str, Callable[[Path, int, int], Outcomes]] = {"models": fuzz_models, "checkpoints": fuzz_checkpoints}
