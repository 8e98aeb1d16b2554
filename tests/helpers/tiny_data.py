"""A small data set on disk: images of several sizes, text-only records in between, several turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.data import ChatDataset, TrainLoader, build_datasets, build_train_loader
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_config import tiny_config
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer

SIZES = ((64, 48), (32, 32), (96, 33), (200, 120))


def write_checkpoint(directory: Path) -> Path:
    """Tokenizer and image processor files, as the data pipeline reads them from a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(directory)
    processor = {"size": {"shortest_edge": 1024, "longest_edge": 1 << 20}, "patch_size": 16, "merge_size": 2,
                 "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def checkpoint_config(directory: Path) -> Qwen3VLConfig:
    """The tiny model config with the token ids of the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return tiny_config(**{f"{key}_token_id": tokenizer.token_to_id(f"<|{name}|>") for key, name in names.items()})


def make_records(image_dir: Path, count: int) -> list[dict[str, Any]]:
    """Write images into ``image_dir`` and return records: every third is text only, every fourth has two turns."""
    image_dir.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    records = []
    for index in range(count):
        images = []
        if index % 3:
            path = image_dir / f"{index:04d}.png"
            width, height = SIZES[index % len(SIZES)]
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
            images.append(str(path))
        messages = [
            {"role": "user", "content": "<image>\n" * len(images) + f"What is number {index}?"},
            {"role": "assistant", "content": f"The digit is {index}."},
        ]
        if index % 4 == 0:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, there is one."}]
        records.append({"images": images, "messages": messages})
    return records


def make_config(root: Path, *, dataset: str, basic: dict | None = None, loader: dict | None = None,
                preprocess: dict | None = None, attr: dict | None = None) -> DataConfig:
    """A typed configuration; the dictionaries override single fields."""
    return validate_config(
        {
            "dataset_param": {
                "dataset_type": "huggingface",
                "preprocess_parameters": {
                    "model_name_or_path": str(root / "checkpoint"), "image_max_pixels": 16384,
                    "image_min_pixels": 1024, **(preprocess or {}),
                },
                "basic_parameters": {
                    "dataset_dir": str(root), "dataset": dataset, "cache_dir": str(root / "cache"), **(basic or {})
                },
                "attr": {"images": "images", "messages": "messages", **(attr or {})},
            },
            "dataloader_param": {"pin_memory": False, **(loader or {})},
        },
        DataConfig,
        source="data.json",
    )


def build_tiny(config: DataConfig, *, seq_length: int = 512, seed: int = 0) -> tuple[ChatDataset, ChatDataset | None]:
    """``build_datasets`` for Qwen3-VL with the tiny model config."""
    model_config = checkpoint_config(Path(config.dataset_param.preprocess_parameters.model_name_or_path))
    media = SPEC.read_media_settings(config, model_config)
    return build_datasets(config, spec=SPEC, media=media, seq_length=seq_length, seed=seed)


def tiny_loader(
    config: DataConfig, *, seq_length: int, seed: int, dataset: ChatDataset | None = None, **options: Any
) -> TrainLoader:
    """``build_train_loader`` for Qwen3-VL, over ``dataset`` or the one that ``config`` names."""
    if dataset is None:
        dataset, _ = build_tiny(config, seq_length=seq_length, seed=seed)
    model_config = checkpoint_config(Path(config.dataset_param.preprocess_parameters.model_name_or_path))
    return build_train_loader(
        dataset, config, spec=SPEC, model_config=model_config, seq_length=seq_length, seed=seed, **options
    )


def write_dataset(root: Path, count: int = 12) -> Path:
    """A checkpoint, images and ``data.json`` below ``root``; returns the JSON file."""
    write_checkpoint(root / "checkpoint")
    path = root / "data.json"
    path.write_text(json.dumps(make_records(root / "images", count)))
    return path
