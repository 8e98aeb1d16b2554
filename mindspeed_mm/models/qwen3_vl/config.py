"""Model config of Qwen3-VL, read once from the Hugging Face ``config.json``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import reading, reason, shorten, shown
from mindspeed_mm.models.layers.config import (
    DecoderConfig,
    Field,
    check_fields,
    check_section,
    read_config_json,
    unknown_fields,
)

logger = logging.getLogger(__name__)
SUPPORTED_MODEL_TYPES = ("qwen3_vl_moe", "qwen3_vl")


@dataclasses.dataclass(frozen=True)
class Qwen3VLVisionConfig:
    """Vision tower. Names follow ``vision_config``; widths are in channels."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    hidden_act: str
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    num_position_embeddings: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float = 10000.0
    layernorm_epsilon: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that are merged into one text token."""
        return self.spatial_merge_size**2

    @property
    def grid_per_side(self) -> int:
        """Side length of the square grid of learned position embeddings."""
        return round(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLTextConfig(DecoderConfig):
    """Text decoder."""

    rope_type: str
    mrope_section: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """A whole model: text decoder, vision tower and the token ids that join them."""

    model_type: str
    text: Qwen3VLTextConfig
    vision: Qwen3VLVisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 in a dense model."""
        return self.text.num_experts

    @property
    def num_experts_per_token(self) -> int:
        """Experts that a token goes to."""
        return self.text.num_experts_per_token

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output layer is the word embeddings."""
        return self.text.tie_word_embeddings

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings."""
        return self.text.vocab_size

    @property
    def initializer_range(self) -> float:
        """Standard deviation of initial weights."""
        return self.text.initializer_range

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Qwen3VLConfig:
        """Read ``directory/config.json``.

        A file that has every field is read as it is, in either of the two spellings in use (``num_experts`` and
        ``rope_scaling`` as published, ``num_local_experts`` and ``rope_parameters`` as transformers 5 writes them).
        One that leaves some to their defaults goes through transformers' ``AutoConfig``, which takes seconds.

        Raises:
            UserError: if the file is missing, is not JSON, or describes another kind of model.
        """
        path, raw = read_config_json(directory)
        model_type = raw["model_type"]
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise UserError(
                f"{path} has model_type {shown(model_type)}; this project trains {' and '.join(SUPPORTED_MODEL_TYPES)}"
            )
        try:
            return cls._checked(raw, str(path))
        except KeyError:
            logger.warning(
                "%s lacks %s: transformers' defaults are taken", path, ", ".join(_missing(raw)),
                extra={"all_ranks": False},
            )
            return cls.from_config(_with_defaults(path), source=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config") -> Qwen3VLConfig:
        """Build from ``config.to_dict()`` of a transformers Qwen3-VL config.

        Raises:
            UserError: naming ``source`` if a value is missing or inconsistent.
        """
        try:
            return cls._checked(config, source)
        except KeyError as error:
            raise UserError(f"{source} lacks the field {error}; is it a Qwen3-VL config?") from error

    @classmethod
    def _checked(cls, config: Mapping[str, Any], source: str) -> Qwen3VLConfig:
        """Raises KeyError for a field that is missing."""
        _check_types(config, source)
        _check_fixed(config, source)
        with reading(source, "take the config.json of the checkpoint again"):
            try:
                model_config = cls._read(config)
            except KeyError as error:
                missing = error
            else:
                model_config.validate(source)
                return model_config
        raise missing

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> Qwen3VLConfig:
        """Raises KeyError for a field that is missing."""
        text, vision = config["text_config"], config["vision_config"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        moe = config["model_type"] == "qwen3_vl_moe"
        return cls(
            model_type=config["model_type"],
            text=Qwen3VLTextConfig(
                num_layers=text["num_hidden_layers"],
                hidden_size=text["hidden_size"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                # transformers' defaults
                head_dim=text.get("head_dim") or (text["hidden_size"] // text["num_attention_heads"] if moe else 128),
                vocab_size=text["vocab_size"],
                intermediate_size=text["intermediate_size"],
                hidden_act=text["hidden_act"],
                rms_norm_eps=text["rms_norm_eps"],
                rope_type=rope["rope_type"],
                rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
                mrope_section=tuple(rope["mrope_section"]),
                max_position_embeddings=text["max_position_embeddings"],
                tie_word_embeddings=bool(config["tie_word_embeddings"]),
                initializer_range=text["initializer_range"],
                **(_moe_fields(text) if moe else {}),
            ),
            vision=Qwen3VLVisionConfig(
                depth=vision["depth"],
                hidden_size=vision["hidden_size"],
                num_heads=vision["num_heads"],
                intermediate_size=vision["intermediate_size"],
                hidden_act=vision["hidden_act"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                in_channels=vision["in_channels"],
                num_position_embeddings=vision["num_position_embeddings"],
                out_hidden_size=vision["out_hidden_size"],
                deepstack_visual_indexes=tuple(vision["deepstack_visual_indexes"]),
            ),
            image_token_id=config["image_token_id"],
            video_token_id=config["video_token_id"],
            vision_start_token_id=config["vision_start_token_id"],
            vision_end_token_id=config["vision_end_token_id"],
        )

    def validate(self, source: str) -> None:
        """Refuse what no Qwen3-VL model can be.

        Raises:
            UserError: naming ``source``, the field and its value.
        """
        text, vision = self.text, self.vision
        tokens = {name: getattr(self, name) for name in _SECTIONS[""] if name.endswith("_token_id")}
        highest = max(tokens, key=lambda name: tokens[name])
        indexes = vision.deepstack_visual_indexes
        rules = [
            (text.num_heads % text.num_kv_heads == 0,
             f"num_attention_heads {text.num_heads} is not a multiple of num_key_value_heads {text.num_kv_heads}"),
            (tokens[highest] < text.vocab_size,
             f"{highest} is {tokens[highest]}, but a token id must be below vocab_size {text.vocab_size}"),
            (text.head_dim > 0, f"hidden_size {text.hidden_size} is less than num_attention_heads {text.num_heads}"),
            (len(text.mrope_section) == 3,
             f"mrope_section {shown(text.mrope_section)} must have 3 entries: of time, height and width"),
            (sum(text.mrope_section) * 2 == text.head_dim,
             f"mrope_section {shown(text.mrope_section)} must add up to head_dim / 2 = {text.head_dim // 2}"),
            (vision.hidden_size % vision.num_heads == 0 and vision.head_dim % 4 == 0,
             f"vision hidden_size {vision.hidden_size} over {vision.num_heads} heads gives no head width "
             "divisible by 4"),
            (vision.grid_per_side**2 == vision.num_position_embeddings,
             f"num_position_embeddings {vision.num_position_embeddings} is not a square number"),
            (vision.out_hidden_size == text.hidden_size,
             f"vision out_hidden_size {vision.out_hidden_size} differs from text hidden_size {text.hidden_size}"),
            (all(0 <= index < vision.depth for index in indexes),
             f"deepstack_visual_indexes {shown(indexes)} must lie below depth {vision.depth}"),
            (list(indexes) == sorted(set(indexes)),
             f"deepstack_visual_indexes {shown(indexes)} must be in ascending order and not repeat"),
            (len(indexes) <= text.num_layers,
             f"{len(indexes)} deepstack outputs need as many text layers, not {text.num_layers}"),
            (len(text.mlp_only_layers) <= text.num_layers,
             f"mlp_only_layers has {len(text.mlp_only_layers)} entries, more than num_hidden_layers {text.num_layers}"),
            (self.model_type != "qwen3_vl_moe" or 0 < text.num_experts_per_token <= text.num_experts,
             f"num_experts_per_tok {text.num_experts_per_token} must lie in 1..num_experts {text.num_experts}"),
            (self.model_type != "qwen3_vl_moe" or text.moe_intermediate_size > 0,
             "moe_intermediate_size is 0, but the model has experts"),
        ]
        for holds, message in rules:
            if not holds:
                raise UserError(f"{source}: {message}")


_LAYERS, _HEADS, _EXPERTS, _PATCH = (Field(int, high=high) for high in (10_000, 1 << 20, 100_000, 1 << 12))
_WIDTH, _EPSILON = Field(int), Field(float, low=1e-30, high=1e30)
_THETA, _SCALE = Field(float, low=1e-30, high=1e30, nullable=True), Field(float, low=0, high=1e30)
_TOKEN_ID, _NAME, _FLAG = Field(int, low=0), Field(str), Field(bool)
_LAYER_INDEXES = Field(list, low=0, high=10_000)
_SECTIONS: dict[str, dict[str, Field]] = {
    "": {
        "image_token_id": _TOKEN_ID, "video_token_id": _TOKEN_ID, "vision_start_token_id": _TOKEN_ID,
        "vision_end_token_id": _TOKEN_ID, "tie_word_embeddings": _FLAG,
    },
    "text_config": {
        "num_hidden_layers": _LAYERS, "hidden_size": _WIDTH, "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS, "head_dim": dataclasses.replace(_WIDTH, nullable=True), "vocab_size": _WIDTH,
        "intermediate_size": _WIDTH, "hidden_act": _NAME, "rms_norm_eps": _EPSILON, "rope_theta": _THETA,
        "max_position_embeddings": _WIDTH, "attention_bias": _FLAG, "initializer_range": _SCALE,
        # a dense model may say that it has 0 experts
        **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"),
                        dataclasses.replace(_EXPERTS, low=0)),
        "moe_intermediate_size": dataclasses.replace(_WIDTH, low=0), "decoder_sparse_step": _LAYERS,
        "mlp_only_layers": dataclasses.replace(_LAYER_INDEXES, nullable=True), "router_aux_loss_coef": _SCALE,
    },
    "vision_config": {
        "depth": _LAYERS, "hidden_size": _WIDTH, "num_heads": _HEADS, "intermediate_size": _WIDTH, "hidden_act": _NAME,
        "patch_size": _PATCH, "temporal_patch_size": _PATCH, "spatial_merge_size": _PATCH, "in_channels": _PATCH,
        "num_position_embeddings": _WIDTH, "out_hidden_size": _WIDTH, "deepstack_visual_indexes": _LAYER_INDEXES,
    },
}
"""Every field that is read, by section of the file."""
_ROPE = {"rope_type": _NAME, "rope_theta": _THETA, "mrope_section": Field(list, low=0)}


def _check_types(config: Mapping[str, Any], source: str) -> None:
    """Check the types and the ranges of the fields that the file has.

    Raises:
        UserError: naming ``source``, the field, its value and what it must be.
    """
    for name, fields in _SECTIONS.items():
        section = config.get(name) if name else config
        if name and name not in config:
            continue  # transformers fills it in
        check_section(section, source=source, name=name)
        check_fields(section, fields, source=source, name=name)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get("text_config", {}).get(key)
        if rope is not None:
            name = f"text_config.{key}"
            check_section(rope, source=source, name=name)
            check_fields(rope, _ROPE, source=source, name=name)


_OPTIONAL = ("head_dim", "rope_theta", "num_experts", "num_local_experts", "decoder_sparse_step", "mlp_only_layers",
             "router_aux_loss_coef", "attention_bias")
_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")


def _missing(config: Mapping[str, Any]) -> list[str]:
    """Fields that a file should have."""
    optional = {*_OPTIONAL, *(() if config["model_type"] == "qwen3_vl_moe" else _OF_EXPERTS)}
    found = [
        f"{name}.{key}" if name else key
        for name, fields in _SECTIONS.items()
        for key in fields.keys() - optional - (config.get(name, {}) if name else config).keys()
    ]
    return sorted(found) or ["text_config.rope_parameters"]


# Fields with the values that mean what is computed here
_PLAIN: dict[str, tuple[Any, ...]] = {"quantization_config": ()}
_ROPE_FIXED = {
    "rope_type": ("default",), "type": ("default", "mrope"), "mrope_interleaved": (True,),
    "partial_rotary_factor": (1,),
}
_VISION_ROPE_FIXED = {"rope_type": ("axial", "default"), "type": ("axial", "default"), "rope_theta": (10_000,)}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": _PLAIN,
    "text_config": {
        **_PLAIN, "hidden_act": ("silu",), "norm_topk_prob": (True,), "attention_dropout": (0,), "is_causal": (True,),
        "attention_bias": (False,), "use_sliding_window": (False,), "partial_rotary_factor": (1,),
    },
    "text_config.rope_parameters": _ROPE_FIXED,
    "text_config.rope_scaling": _ROPE_FIXED,
    "vision_config": {
        **_PLAIN, "hidden_act": ("gelu_pytorch_tanh", "gelu", "silu"), "attention_dropout": (0,), "is_causal": (False,),
        "rope_theta": (10_000,), "in_channels": (3,),
    },
    "vision_config.rope_parameters": _VISION_ROPE_FIXED,
    "vision_config.rope_scaling": _VISION_ROPE_FIXED,
}
_REMEDIES = {
    "quantization_config": "take the checkpoint that is not quantized; if its weights are plain, remove the field"
}
# two names of one value, of which transformers takes one or the other
_SAME = {
    "text_config": (("rope_parameters", "rope_scaling"), ("num_experts", "num_local_experts")),
    "vision_config": (
        ("rope_parameters", "rope_scaling"), ("num_heads", "num_attention_heads"), ("depth", "num_hidden_layers"),
    ),
}


def _check_fixed(config: Mapping[str, Any], source: str) -> None:
    """Refuse a model that is computed in another way than this project does, or whose file contradicts itself.

    Raises:
        UserError: naming ``source``, the field, its value and what it must be.
    """
    for name, fields in _FIXED.items():
        section: Any = config
        for part in name.split(".") if name else ():
            section = section.get(part) or {}
            check_section(section, source=source, name=name)
        for key, values in fields.items():
            value = section.get(key)
            if value is None or value in values:
                continue
            where = f"{name}.{key}" if name else key
            needed = f"only {shown(values[0])} is computed here" if values else "only plain weights are trained here"
            raise UserError(f"{source}: {where} is {shown(value)}; {needed}: {_REMEDIES.get(key, 'use another model')}")
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    kinds = text.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{source}: text_config.layer_types is {shown(kinds)}; only full_attention is computed here: "
                        "use another model")
    theta, rope = text.get("rope_theta"), text.get("rope_parameters") or text.get("rope_scaling") or {}
    pairs = [
        (f"{name}.{one}", section.get(one), f"{name}.{other}", section.get(other))
        for name, section in (("text_config", text), ("vision_config", vision)) for one, other in _SAME[name]
    ]
    pairs.append(("text_config.rope_theta", theta, "its rope parameters", rope.get("rope_theta")))
    if vision.get("hidden_size") and vision.get("num_heads"):
        width = vision["hidden_size"] // vision["num_heads"]
        pairs.append(("vision_config.head_dim", vision.get("head_dim"), "hidden_size / num_heads", width))
    tied = text.get("tie_word_embeddings")
    # version 5 of transformers writes its own true into sparse models, and takes the outer one; version 4 takes this
    if config.get("model_type") != "qwen3_vl_moe" or tied is not True:
        outer = config.get("tie_word_embeddings")
        pairs.append(("tie_word_embeddings", outer, "text_config.tie_word_embeddings", tied))
    for one, value, other, its in pairs:
        if _differ(value, its):
            raise UserError(f"{source}: {one} is {shown(value)}, but {shown(its)} according to {other}; "
                            "remove the wrong one")


# beside the fields above, those that decide nothing in training
_WITHOUT_EFFECT = {
    "": {"text_config", "vision_config"},
    "text_config": {"rope_parameters", "rope_scaling", "layer_types", "sliding_window", "max_window_layers",
                    "output_router_logits"},
    "vision_config": {"rope_parameters", "rope_scaling", "head_dim", "num_attention_heads", "num_hidden_layers",
                      "initializer_range"},
}


def ignored_fields(directory: str | Path) -> list[str]:
    """Lines that name fields of ``directory/config.json`` from which a user may expect an effect that they do not have.

    Raises:
        UserError: if the file cannot be read.
    """
    path, content = read_config_json(directory)
    text = content.get("text_config", {})
    unknown: list[str] = []
    for name in _FIXED:
        section: Any = content
        for part in name.split(".") if name else ():
            section = section.get(part) or {}
        read = _ROPE if name.startswith("text_config.") else _SECTIONS.get(name, {})
        copies = {key for key in text if not name and section.get(key) == text[key]}  # some tools look for them there
        unknown += unknown_fields(section, {*read, *_FIXED[name], *_WITHOUT_EFFECT.get(name, ()), *copies}, name=name)
    lines = []
    if unknown:
        lines.append(f"{path}: these fields have no effect: {shorten(', '.join(unknown), 400)}")
    if text.get("output_router_logits"):
        lines.append(f"{path}: text_config.output_router_logits has no effect; --moe-aux-loss-coeff adds the "
                     "load-balancing loss")
    return lines


def _differ(one: Any, other: Any) -> bool:
    """Whether two values contradict each other; objects do in the fields that both have."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return any(_differ(one[key], other[key]) for key in one.keys() & other.keys())
    return one is not None and other is not None and one != other


def _with_defaults(path: Path) -> dict[str, Any]:
    """The config file with transformers' defaults for the fields that it leaves out."""
    from transformers import AutoConfig  # here, because it takes seconds and is rarely needed

    try:
        config = AutoConfig.from_pretrained(
            str(path.parent), local_files_only=True, trust_remote_code=False
        ).to_dict()
    except Exception as error:  # transformers raises many types for a config that it cannot read
        raise UserError(f"{path} cannot be read by transformers: {reason(error)}") from error
    rope = config["text_config"].get("rope_parameters") or config["text_config"].get("rope_scaling") or {}
    # transformers' own default for a config that names no sections
    config["text_config"]["rope_parameters"] = {"mrope_section": (24, 20, 20), "rope_type": "default", **rope}
    return config


def _moe_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        "num_experts_per_token": text["num_experts_per_tok"],
        "moe_intermediate_size": text["moe_intermediate_size"],
        "decoder_sparse_step": text.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(text.get("mlp_only_layers") or ()),
        "router_aux_loss_coef": text.get("router_aux_loss_coef", 0.0),
    }
