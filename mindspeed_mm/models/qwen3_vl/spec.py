"""Qwen3-VL, mixture-of-experts and dense, as a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

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


SPEC = register(Qwen3VLSpec())
