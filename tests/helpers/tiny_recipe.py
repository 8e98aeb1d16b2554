"""A whole recipe on disk that takes milliseconds per step: weights, images and the three configuration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_data import make_records, write_checkpoint

GEOMETRY_KEYS = {
    "image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}


def write_recipe(root: Path, *, records: int = 26) -> Path:
    """Make ``root`` hold weights (``checkpoint``), ``data.json`` and, with their paths filled in, the three files.

    Args:
        root: directory to write to.
        records: samples of the data set; two thirds of them have an image.

    Returns:
        ``root``.
    """
    from tokenizers import Tokenizer
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    checkpoint = write_checkpoint(root / "checkpoint")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    config = Qwen3VLMoeConfig(
        text_config={
            "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 512, "intermediate_size": 80, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "max_position_embeddings": 4096, "attention_bias": False,
            "rope_parameters": {
                "rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 56, "patch_size": 16,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 48, "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **{key: tokenizer.token_to_id(f"<|{token}|>") for key, token in GEOMETRY_KEYS.items()},
    )
    torch.manual_seed(0)
    Qwen3VLMoeForConditionalGeneration(config).float().save_pretrained(checkpoint)
    (root / "data.json").write_text(json.dumps(make_records(root / "images", records)))
    write_data_file(root, "data_tiny.json")
    model = {
        "model_id": "qwen3_vl_moe", "init_from_hf_path": str(checkpoint),
        "image_encoder": {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": False}},
        "text_decoder": {"freeze": False}, "loss_cfg": {"compute_mode": "default"},
    }
    (root / "model_tiny.json").write_text(json.dumps(model))
    (root / "fsdp2.yaml").write_text("param_dtype: fp32\n")
    return root


def write_data_file(root: Path, name: str, *, basic: dict[str, Any] | None = None, **loader: Any) -> str:
    """A data file over the recipe's samples, with some fields of its own; returns its path."""
    content = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": str(root / "checkpoint"), "image_max_pixels": 4096, "image_min_pixels": 1024,
            },
            "basic_parameters": {
                "dataset_dir": str(root), "dataset": str(root / "data.json"), "cache_dir": str(root / "cache"),
                **(basic or {}),
            },
            "attr": {"images": "images", "messages": "messages"},
        },
        "dataloader_param": {"pin_memory": False, "drop_last": False, "shuffle": True, **loader},
    }
    (root / name).write_text(json.dumps(content))
    return str(root / name)


def recipe_flags(root: Path, *, save: Path | None = None, load: Path | None = None, **flags: Any) -> list[str]:
    """A command line: 8 steps of 4 samples, unless ``flags`` (``train_iters=3``, ``no_save_rng=True``) differ."""
    values: dict[str, Any] = {
        "mm_data": root / "data_tiny.json", "mm_model": root / "model_tiny.json",
        "fsdp2_config_path": root / "fsdp2.yaml",
        "seq_length": 256, "train_iters": 8, "distributed_timeout_minutes": 2,
        "global_batch_size": 4, "micro_batch_size": 2, "lr": 3e-3,
        "lr_warmup_iters": 2, "clip_grad": 1.0, "weight_decay": 0.1, "num_workers": 0, "seed": 3, "log_interval": 1,
        "use_torch_fsdp2": True, "init_model_with_meta_device": True, "calculate_per_token_loss": True,
        "save": save, "load": load, **flags,
    }
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words
