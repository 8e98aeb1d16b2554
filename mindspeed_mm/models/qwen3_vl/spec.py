"""Qwen3-VL, mixture-of-experts and dense, as a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mindspeed_mm.config.checks import ModelFacts
from mindspeed_mm.models.qwen3_vl.config import SUPPORTED_MODEL_TYPES, Qwen3VLConfig
from mindspeed_mm.models.spec import ModelSpec, register


class Qwen3VLSpec(ModelSpec):
    """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""

    model_types: ClassVar[tuple[str, ...]] = SUPPORTED_MODEL_TYPES
    collators: ClassVar[tuple[str, ...]] = ("qwen3vl",)
    chat_templates: ClassVar[tuple[str, ...]] = ("qwen3_vl_nothink", "qwen3_vl")
    parts: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision_encoder": ("image_encoder.vision_encoder.*",),
        "vision_projector": ("image_encoder.vision_projector.*",),
        "text_decoder": ("text_decoder.*",),
    }

    def read_config(self, directory: str | Path) -> Qwen3VLConfig:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return Qwen3VLConfig.from_pretrained(directory)

    def facts(self, model_config: Qwen3VLConfig) -> ModelFacts:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        text, vision = model_config.text, model_config.vision
        encoder = "image_encoder.vision_encoder"
        return ModelFacts(
            model_type=model_config.model_type,
            attention_heads={
                "text": (text.num_heads, text.num_kv_heads), "vision": (vision.num_heads, vision.num_heads)
            },
            num_experts=text.num_experts,
            expert_widths={
                "hidden_size": text.hidden_size, "moe_intermediate_size": text.moe_intermediate_size
            },
            options={
                f"{encoder}.num_layers": ("vision_config.depth", vision.depth),
                f"{encoder}.hidden_size": ("vision_config.hidden_size", vision.hidden_size),
                f"{encoder}.num_attention_heads": ("vision_config.num_heads", vision.num_heads),
                "text_decoder.num_layers": ("text_config.num_hidden_layers", text.num_layers),
                "text_decoder.hidden_size": ("text_config.hidden_size", text.hidden_size),
                "text_decoder.num_attention_heads": ("text_config.num_attention_heads", text.num_heads),
                "text_decoder.max_position_embeddings": (
                    "text_config.max_position_embeddings", text.max_position_embeddings
                ),
            },
        )


SPEC = register(Qwen3VLSpec())
