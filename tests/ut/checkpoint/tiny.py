"""Tiny random Qwen3-VL models for the tests of conversion."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch


def random_config(
    rng: random.Random,
    *,
    moe: bool | None = None,
    square: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tie: bool | None = None,
) -> dict[str, Any]:
    """A random ``config.json`` content, as transformers' ``to_dict`` gives it.

    Args:
        moe: with experts or dense; random when None.
        square: 2 for 2I == H, 1 for I == H, so that shapes do not tell the two expert layouts apart.
        text, vision: fields that override the random ones.
        tie: tied embeddings; random when None.
    """
    moe = rng.random() < 0.7 if moe is None else moe
    head_dim, kv_heads = rng.choice([8, 16]), rng.choice([1, 2, 3])
    width = rng.choice([24, 32, 40])
    layers = rng.choice([2, 3])
    text_config: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": kv_heads * rng.choice([1, 2, 4]),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": rng.choice([61, 96]),
        "intermediate_size": rng.choice([20, 48]),
        "attention_bias": False,
        "max_position_embeddings": 256,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [head_dim // 2 - 2, 1, 1],
            "mrope_interleaved": True,
        },
        "rope_theta": 10000.0,
    }
    if moe:
        text_config |= {
            "num_experts": rng.choice([3, 4]),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": width // square if square else rng.choice([8, 28, 48]),
            "decoder_sparse_step": rng.choice([1, 1, 2]),
            "mlp_only_layers": rng.choice([[], [], [0]]),
        }
    heads = rng.choice([2, 3])
    vision_config: dict[str, Any] = {
        "depth": 3,
        "hidden_size": heads * 8,
        "num_heads": heads,
        "intermediate_size": rng.choice([12, 28]),
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 16,
        "out_hidden_size": width,
        "deepstack_visual_indexes": rng.choice([[0], [0, 2], [1, 2]]),
    }
    text_config |= text or {}
    vision_config |= vision or {}
    vision_config["out_hidden_size"] = text_config["hidden_size"]
    tie = rng.random() < 0.4 if tie is None else tie
    return _config_class(moe)(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=tie,
        image_token_id=50,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    ).to_dict()


def _config_class(moe: bool) -> type:
    if moe:
        from transformers import Qwen3VLMoeConfig

        return Qwen3VLMoeConfig
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig


def build_hf_model(config: dict[str, Any], *, device: str = "cpu", seed: int = 0) -> torch.nn.Module:
    """The transformers model of ``config``, with random weights from ``seed``."""
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    moe = config["model_type"] == "qwen3_vl_moe"
    config_object = _config_class(moe).from_dict(config)
    torch.manual_seed(seed)
    with torch.device(device):
        return (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config_object)


def write_hf_directory(
    directory: Path,
    config: dict[str, Any],
    *,
    layout: str = "hub",
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 3,
    seed: int = 0,
    any_bits: bool = False,
) -> dict[str, torch.Tensor]:
    """Write config, weights and a few processor files; returns the tensors in the published layout.

    Weights are written by safetensors itself in ``shards`` files (1: one file without an index). With ``any_bits``
    they are any bits whatever: NaN of every kind, infinities, -0 and denormals among them.
    """
    import json

    from safetensors.torch import save_file

    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
    from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
    from mindspeed_mm.models.state_dict import hf_shapes

    directory.mkdir(parents=True)
    model_config = Qwen3VLConfig.from_config(config)
    generator = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if not any_bits:
            return (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        size = (*shape[:-1], shape[-1] * dtype.itemsize)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype)

    hub = {
        name: values(shape)
        for name, shape in hf_shapes(weight_rules(model_config, expert_layout="hub")).items()
    }
    written = {
        name: tensor.transpose(1, 2).contiguous() if layout == "v5" and ".mlp.experts." in name else tensor
        for name, tensor in hub.items()
    }
    (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).split(".")[-1]}))
    (directory / "generation_config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"not": "a real tokenizer"}')
    if shards == 1:
        save_file(written, directory / "model.safetensors", metadata={"format": "pt"})
        return hub
    names = sorted(written)
    weight_of: dict[str, str] = {}
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[part::shards]
        save_file({name: written[name] for name in chosen}, directory / file, metadata={"format": "pt"})
        weight_of |= dict.fromkeys(chosen, file)
    total = sum(tensor.nbytes for tensor in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return hub
