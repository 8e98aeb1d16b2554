"""The published geometry of Qwen3-VL-30B-A3B."""

from __future__ import annotations

from typing import Any


def config_30b(**text: Any) -> dict[str, Any]:
    """``config.json``, as far as it is read; ``text`` replaces fields of ``text_config``."""
    return {
        "model_type": "qwen3_vl_moe", "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "tie_word_embeddings": False,
        "text_config": {
            "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "vocab_size": 151936, "intermediate_size": 6144, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 5e6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "max_position_embeddings": 262144, "attention_bias": False, "initializer_range": 0.02,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, **text,
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304,
            "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "in_channels": 3, "num_position_embeddings": 2304, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    }  # fmt: skip
