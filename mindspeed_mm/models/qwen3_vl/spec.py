"""Qwen3-VL, mixture-of-experts and dense, as a model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mindspeed_mm.config.checks import ModelFacts
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.config import SUPPORTED_MODEL_TYPES, Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.grounding import BOX_SCALE, box_text, boxes_in, ref_text
from mindspeed_mm.models.spec import ModelBuildOptions, ModelSpec, ServingFacts, register

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mindspeed_mm.config.data_config import DataConfig
    from mindspeed_mm.interfaces.batch import Batch, VisionBatch
    from mindspeed_mm.interfaces.conversation import ChatTemplate, ChatTemplateOptions
    from mindspeed_mm.interfaces.media import GridTHW, MediaPatches, MediaSettings
    from mindspeed_mm.models.lora import Adapter
    from mindspeed_mm.models.matrices import Matrices
    from mindspeed_mm.models.memory import Plan, Unit
    from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel
    from mindspeed_mm.models.state_dict import ExpertLayout, WeightRule


class Qwen3VLSpec(ModelSpec):
    """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""

    model_types: ClassVar[tuple[str, ...]] = SUPPORTED_MODEL_TYPES
    collators: ClassVar[tuple[str, ...]] = ("qwen3vl",)
    chat_templates: ClassVar[tuple[str, ...]] = ("qwen3_vl_nothink", "qwen3_vl")
    thinking_templates: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    data_modules: ClassVar[tuple[str, ...]] = (
        "mindspeed_mm.models.qwen3_vl.chat_template", "mindspeed_mm.models.qwen3_vl.processor",
        "mindspeed_mm.models.qwen3_vl.grounding",
    )
    chat_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")
    media_kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    box_scale: ClassVar[int | None] = BOX_SCALE
    parts: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision_encoder": ("image_encoder.vision_encoder.*",),
        "vision_projector": ("image_encoder.vision_projector.*",),
        "text_decoder": ("text_decoder.*",),
    }
    adapter_groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": ("model.language_model.layers.*.self_attn.[qkvo]_proj.weight",),
        "mlp": tuple(f"model.language_model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "experts": ("model.language_model.layers.*.mlp.experts.*_proj",),
        "vision": ("model.visual.blocks.*.attn.*.weight", "model.visual.blocks.*.mlp.*.weight"),
        "merger": ("model.visual.merger.linear_fc?.weight", "model.visual.deepstack_merger_list.*.linear_fc?.weight"),
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

    def build_chat_template(self, tokenizer: Any, options: ChatTemplateOptions) -> ChatTemplate:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.chat_template import Qwen3VLChatTemplate

        self.check_chat_template(options.name, enable_thinking=options.enable_thinking)
        return Qwen3VLChatTemplate(tokenizer, options)

    def control_token_finder(self) -> Callable[[str], str]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.chat_template import find_control_token

        return find_control_token

    def box_text(self, box: Sequence[int], *, special_tokens: bool) -> str:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return box_text(box, special_tokens=special_tokens)

    def ref_text(self, name: str, *, special_tokens: bool) -> str:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return ref_text(name, special_tokens=special_tokens)

    def boxes_in(self, text: str) -> list[list[float]]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return boxes_in(text)

    def tool_call_text(self, content: str) -> str:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.chat_template import tool_call_text

        return tool_call_text(content)

    def tools_text(self, tools: Sequence[Any], system: str | None) -> str:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.chat_template import tools_text

        return tools_text(tools, system)

    def read_media_settings(self, config: DataConfig, model_config: Qwen3VLConfig) -> MediaSettings:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`. Video settings only where ``attr.videos`` is set."""
        from mindspeed_mm.models.qwen3_vl.processor import read_image_settings, read_video_settings

        preprocess = config.dataset_param.preprocess_parameters
        images = read_image_settings(
            preprocess.model_name_or_path,
            min_pixels=preprocess.image_min_pixels,
            max_pixels=preprocess.image_max_pixels,
            vision=model_config.vision,
        )
        images = dataclasses.replace(images, transparent_background=preprocess.transparent_background)
        named = any(attr.videos for attr in config.attributes)
        if not named and not any(attr.is_open for attr in config.attributes):
            return images
        try:
            videos = read_video_settings(
                preprocess.model_name_or_path,
                min_pixels=preprocess.video_min_pixels,
                max_pixels=preprocess.video_max_pixels,
                fps=preprocess.video_fps,
                max_frames=preprocess.video_maxlen,
                images=images,
            )
        except UserError:
            if named:
                raise
            return images  # the data may have no videos
        return dataclasses.replace(images, videos=videos)

    def load_image_processor(self, directory: str | Path) -> Any:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        try:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
        except ImportError:  # transformers 4: the variant without torchvision has the plain name there
            from transformers import Qwen2VLImageProcessor as Processor
        return Processor.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)

    def ignored_settings(self, directory: Path, config: DataConfig) -> list[str]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl import processor
        from mindspeed_mm.models.qwen3_vl.config import ignored_fields

        preprocess = config.dataset_param.preprocess_parameters
        fps = preprocess.video_fps if any(attr.videos for attr in config.attributes) else None
        return [*ignored_fields(directory), *processor.ignored_fields(preprocess.model_name_or_path, fps=fps)]

    def with_trained_limits(
        self, directory: Path, trained: Mapping[str, Any], *, source: str
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.processor import with_trained_limits

        return with_trained_limits(directory, trained, source=source)

    def serving_facts(self, model_config: Qwen3VLConfig) -> ServingFacts:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        sparse = model_config.num_experts > 0
        fields = ("rope_scaling", "rope_theta", *(("num_experts",) if sparse else ()))
        return ServingFacts(
            architecture=f"Qwen3VL{'Moe' if sparse else ''}ForConditionalGeneration",
            end_of_answer="<|im_end|>",
            end_of_text="<|endoftext|>",
            transformers4_fields=tuple(f"text_config.{name}" for name in fields),
            media_tokens={"image": "<|image_pad|>", "video": "<|video_pad|>"},
            name_pattern=r"A\d+B",  # the published names of sparse models: 30B-A3B
            named=sparse,
        )

    def check_processors(self, directory: Path, model_config: Qwen3VLConfig) -> None:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.processor import read_image_settings

        read_image_settings(directory, min_pixels=1, max_pixels=1 << 40, vision=model_config.vision)

    def special_token_ids(self, model_config: Qwen3VLConfig) -> dict[str, tuple[str, int]]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
                  "vision_end": "<|vision_end|>"}
        fields = {f"{name}_token_id": token for name, token in tokens.items()}
        return {name: (token, getattr(model_config, name)) for name, token in fields.items()}

    def placeholder_token_ids(self, model_config: Qwen3VLConfig) -> tuple[int, ...]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return model_config.image_token_id, model_config.video_token_id

    def token_positions(
        self, is_placeholder: np.ndarray, grids: Sequence[GridTHW], model_config: Qwen3VLConfig
    ) -> np.ndarray:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.positions import token_positions

        return token_positions(is_placeholder, grids, model_config.vision.spatial_merge_size)

    def collate_vision(
        self, media: Sequence[MediaPatches], placeholder_index: np.ndarray, model_config: Qwen3VLConfig
    ) -> VisionBatch:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.collator import collate_vision

        return collate_vision(media, placeholder_index, model_config.vision)

    def describe(self, model_config: Qwen3VLConfig) -> dict[str, str]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        text, vision, per_token = model_config.text, model_config.vision, model_config.num_experts_per_token
        experts = f", {text.num_experts} experts of {text.moe_intermediate_size}, {per_token} per token"
        return {
            "model": f"{model_config.model_type}{', embeddings tied' if text.tie_word_embeddings else ''}",
            "text": f"{text.num_layers} layers of width {text.hidden_size}, {text.num_heads} heads, "
            f"{text.num_kv_heads} key/value heads of {text.head_dim}{experts if text.num_experts else ''}, "
            f"vocabulary {text.vocab_size}",
            "vision": f"{vision.depth} blocks of width {vision.hidden_size}, {vision.num_heads} heads, "
            f"deepstack {list(vision.deepstack_visual_indexes)}",
        }

    def build_model(
        self,
        model_config: Qwen3VLConfig,
        options: ModelBuildOptions,
        *,
        device: str,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        media: MediaSettings | None,
    ) -> Qwen3VLModel:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.model import build_model

        return build_model(
            model_config, options, pixel_norm=media.norm, device=device, dtype=dtype, compute_dtype=compute_dtype
        )

    def weight_rules(self, model_config: Qwen3VLConfig, *, expert_layout: ExpertLayout) -> list[WeightRule]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules

        return weight_rules(model_config, expert_layout=expert_layout)

    def layer_matrices(self, model_config: Qwen3VLConfig) -> Mapping[str, Matrices]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.state_dict_adapter import layer_matrices

        return layer_matrices(model_config)

    def repeated_tensors(self, model_config: Qwen3VLConfig) -> dict[str, str]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        tied = model_config.tie_word_embeddings
        return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tied else {}

    def flop_counter(
        self, model_config: Qwen3VLConfig, *, frozen: Collection[str], adapters: Sequence[Adapter] = ()
    ) -> Callable[[Batch], float]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.flops import FlopCount

        return FlopCount(
            model_config=model_config,
            train_vision="vision_encoder" not in frozen,
            train_projector="vision_projector" not in frozen,
            train_text="text_decoder" not in frozen,
            adapters=adapters,
        )

    def memory_units(self, plan: Plan) -> list[Unit]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.memory import memory_units

        return list(memory_units(plan))

    def memory_exchanges(self, plan: Plan) -> dict[str, float]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.qwen3_vl.memory import memory_exchanges

        return memory_exchanges(plan)

    def image_patches(self, pixels: int, model_config: Qwen3VLConfig) -> int:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return pixels // model_config.vision.patch_size**2

    def merge_unit(self, model_config: Qwen3VLConfig) -> int:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return model_config.vision.merge_unit


SPEC = register(Qwen3VLSpec())
