"""The published Qwen3-VL models' ``config.json``, as far as the model config reads it."""

from __future__ import annotations

from typing import Any

SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

# by name: (layers, hidden size, query heads, key/value heads, MLP width, width of each of 128 experts, vision tower)
MODELS: dict[str, tuple[int, int, int, int, int, int | None, dict[str, Any]]] = {
    "2B": (28, 2048, 16, 8, 6144, None, SMALL_VISION),
    "4B": (36, 2560, 32, 8, 9728, None, SMALL_VISION),
    "8B": (36, 4096, 32, 8, 12288, None, LARGE_VISION),
    "32B": (64, 5120, 64, 8, 25600, None, LARGE_VISION),
    "30B": (48, 2048, 32, 4, 6144, 768, LARGE_VISION),
    "235B": (94, 4096, 64, 4, 12288, 1536, LARGE_VISION),
}
TIED = ("2B", "4B")
DIRECTORIES = {
    "8B": "Qwen3-VL-8B-Instruct", "32B": "Qwen3-VL-32B-Instruct", "30B": "Qwen3-VL-30B-A3B-Instruct",
    "235B": "Qwen3-VL-235B-A22B-Instruct",
}


def published_config(name: str, *, layers: int | None = None, blocks: int | None = None) -> dict[str, Any]:
    """``config.json`` of a model of :data:`MODELS`.

    Args:
        name: key.
        layers: text layers instead of its own; as many deepstack outputs are left as there are layers at most.
        blocks: vision blocks instead of its own.
    """
    depth, hidden, heads, kv_heads, inner, expert_inner, vision = MODELS[name]
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_inner}
    sparse = expert_inner is not None
    layers, blocks = layers or depth, blocks or vision["depth"]
    kind = "qwen3_vl_moe" if sparse else "qwen3_vl"
    return {
        "architectures": [f"Qwen3VL{'Moe' if sparse else ''}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": name in TIED,
        "text_config": {
            "model_type": f"{kind}_text", "num_hidden_layers": layers, "hidden_size": hidden,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": 151936,
            "intermediate_size": inner, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "max_position_embeddings": 262144, "attention_bias": False, "initializer_range": 0.02,
            **(experts if sparse else {}),
        },
        "vision_config": {
            "model_type": kind, "num_heads": 16, "hidden_act": "gelu_pytorch_tanh", "patch_size": 16,
            "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "num_position_embeddings": 2304,
            "out_hidden_size": hidden, **vision, "depth": blocks,
            "deepstack_visual_indexes": [i for i in vision["deepstack_visual_indexes"] if i < blocks][:layers],
        },
    }


def config_30b(**text: Any) -> dict[str, Any]:
    """That of Qwen3-VL-30B-A3B; ``text`` replaces fields of ``text_config``."""
    config = published_config("30B")
    config["text_config"].update(text)
    return config
