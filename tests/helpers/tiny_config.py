"""A small Qwen3-VL config for tests that need sizes and token ids, but no model."""

from __future__ import annotations

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig


def tiny_config(
    *,
    image_token_id: int = 90,
    video_token_id: int = 91,
    vision_start_token_id: int = 92,
    vision_end_token_id: int = 93,
) -> Qwen3VLConfig:
    """Patch 16, temporal patch 2, merge 2, a 12 x 12 position table; widths all different from each other."""
    return Qwen3VLConfig.from_config(
        {
            "model_type": "qwen3_vl_moe",
            "tie_word_embeddings": False,
            "image_token_id": image_token_id,
            "video_token_id": video_token_id,
            "vision_start_token_id": vision_start_token_id,
            "vision_end_token_id": vision_end_token_id,
            "text_config": {
                "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 16, "vocab_size": 512, "intermediate_size": 80, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
                "max_position_embeddings": 4096, "attention_bias": False, "initializer_range": 0.02,
                "num_experts": 8, "num_experts_per_tok": 2,
                "moe_intermediate_size": 20,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 56,
                "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
                "in_channels": 3, "num_position_embeddings": 144, "out_hidden_size": 48,
                "deepstack_visual_indexes": [0],
            },
        }
    )
