"""The model's parameters, and the units in which FSDP2 gathers and frees them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLTextConfig, Qwen3VLVisionConfig
from mindspeed_mm.tools.memory.plan import Plan

Kind = Literal["root", "vision", "merger", "embedding", "decoder", "experts", "head"]
Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor: its name in the model, its shape before sharding, and whether it trains."""

    name: str
    shape: tuple[int, ...]
    trains: bool


@dataclasses.dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and freed together.

    Attributes:
        kind: what they are.
        index: of the layer, from 0.
        parameters: the tensors, with the shapes that all ``holders`` hold together.
        holders: processes that each hold an equal part.
        axis: along which they are cut.
    """

    kind: Kind
    index: int
    parameters: tuple[Parameter, ...]
    holders: int
    axis: int = 0

    def _part(self, shape: tuple[int, ...]) -> int:
        """Numbers in the largest part; FSDP2 gives every process that much, padded."""
        axis = self.axis if len(shape) > self.axis else 0
        return math.prod(-(-size // self.holders) if at == axis else size for at, size in enumerate(shape))

    def shard(self, *, training_only: bool = False) -> int:
        """Numbers that a process holds."""
        return sum(self._part(p.shape) for p in self.parameters if p.trains or not training_only)

    def gathered(self, *, training_only: bool = False) -> int:
        """Numbers in the gathered parameters, padding included."""
        return self.shard(training_only=training_only) * self.holders

    @property
    def trains(self) -> bool:
        """Whether any of it trains."""
        return any(parameter.trains for parameter in self.parameters)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _vision_block(vision: Qwen3VLVisionConfig) -> Shapes:
    width = vision.hidden_size
    return {
        **_layer_norm("input_layernorm", width),
        **_linear("self_attention.linear_proj", width, width, bias=True),
        **_linear("self_attention.linear_qkv", width, 3 * width, bias=True),
        **_layer_norm("pre_mlp_layernorm", width),
        **_linear("mlp.linear_fc1", width, vision.intermediate_size, bias=True),
        **_linear("mlp.linear_fc2", vision.intermediate_size, width, bias=True),
    }


def _merger(vision: Qwen3VLVisionConfig, *, norm_after_merge: bool) -> Shapes:
    merged = vision.hidden_size * vision.merge_unit
    return {
        **_layer_norm("norm", merged if norm_after_merge else vision.hidden_size),
        **_linear("linear_fc1", merged, merged, bias=True),
        **_linear("linear_fc2", merged, vision.out_hidden_size, bias=True),
    }


def _experts(text: Qwen3VLTextConfig) -> Shapes:
    experts, width, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    return {
        "mlp.experts.gate_up_proj": (experts, width, 2 * inner),
        "mlp.experts.down_proj": (experts, inner, width),
    }


def _decoder_layer(text: Qwen3VLTextConfig, layer: int) -> Shapes:
    """Without experts."""
    width, query, key = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes = {
        "input_layernorm.weight": (width,),
        **_linear("self_attention.linear_proj", query, width, bias=False),
        **_linear("self_attention.linear_qkv", width, query + 2 * key, bias=False),
        "self_attention.q_layernorm.weight": (text.head_dim,),
        "self_attention.k_layernorm.weight": (text.head_dim,),
        "pre_mlp_layernorm.weight": (width,),
    }
    if text.is_moe_layer(layer):
        return {**shapes, "mlp.router.weight": (text.num_experts, width)}
    return {
        **shapes,
        **_linear("mlp.linear_fc1", width, 2 * text.intermediate_size, bias=False),
        **_linear("mlp.linear_fc2", text.intermediate_size, width, bias=False),
    }


def checkpoint_bytes(plan: Plan, *, moments: bool) -> int:
    """Bytes of a training checkpoint: fp32 parameters and, if ``moments``, AdamW's two of those that train."""
    whole = dataclasses.replace(plan, world_size=1, sharding_size=1, expert_size=1, context_size=1)
    return sum(
        4 * math.prod(parameter.shape) * (3 if parameter.trains and moments else 1)
        for unit in units_of(whole)
        for parameter in unit.parameters
    )


def _small(shapes: Shapes, wanted: bool) -> Shapes:
    """Norms and routers, or all but these."""
    return {name: shape for name, shape in shapes.items() if ("norm" in name or "router" in name) is wanted}


def units_of(plan: Plan) -> list[Unit]:
    """All units in the order in which forward runs them, the root first: it is gathered once per step."""
    return list(_units(plan))


def _units(plan: Plan) -> Iterator[Unit]:
    text, vision, everyone = plan.model_config.text, plan.model_config.vision, plan.sharding_size
    tied = text.tie_word_embeddings

    def unit(kind: Kind, index: int, prefix: str, shapes: Shapes, *, trains: bool, spread: int = 1) -> Unit:
        parameters = tuple(
            Parameter(f"{prefix}.{name}", (shape[0] // spread, *shape[1:]), trains) for name, shape in shapes.items()
        )
        return Unit(kind, index, parameters, everyone // spread, axis=int(spread > 1))

    encoder, projector, decoder = "image_encoder.vision_encoder", "image_encoder.vision_projector", "text_decoder"
    embedding = {"word_embeddings.weight": (text.vocab_size, text.hidden_size)}
    patches = {
        **_linear("patch_embed.proj", vision.patch_dim, vision.hidden_size, bias=True),
        "pos_embed.weight": (vision.num_position_embeddings, vision.hidden_size),
    }
    root = [
        unit("root", 0, encoder, patches, trains=plan.train_vision),
        unit("root", 0, decoder, {"final_layernorm.weight": (text.hidden_size,)}, trains=plan.train_text),
        *([unit("root", 0, f"{decoder}.embedding", embedding, trains=plan.train_text)] if tied else []),
    ]
    small = [
        unit("root", 0, f"{decoder}.layers.{index}", _small(_decoder_layer(text, index), True), trains=plan.train_text)
        for index in range(text.num_layers if plan.small_in_root else 0)
    ]
    yield Unit("root", 0, tuple(parameter for part in (*root, *small) for parameter in part.parameters), everyone)
    for index in range(vision.depth):
        yield unit("vision", index, f"{encoder}.layers.{index}", _vision_block(vision), trains=plan.train_vision)
    mergers = ["merger", *(f"deepstack_mergers.{index}" for index in range(len(vision.deepstack_visual_indexes)))]
    for index, name in enumerate(mergers):
        shapes = _merger(vision, norm_after_merge=index > 0)
        yield unit("merger", index, f"{projector}.{name}", shapes, trains=plan.train_projector)
    if not tied:
        yield unit("embedding", 0, f"{decoder}.embedding", embedding, trains=plan.train_text)
    for index in range(text.num_layers):
        prefix, shapes = f"{decoder}.layers.{index}", _decoder_layer(text, index)
        shapes = _small(shapes, False) if plan.small_in_root else shapes
        experts = _experts(text) if text.is_moe_layer(index) else {}
        if experts and plan.expert_size > 1:
            yield unit("decoder", index, prefix, shapes, trains=plan.train_text)
            yield unit("experts", index, prefix, experts, trains=plan.train_text, spread=plan.expert_size)
        else:
            yield unit("decoder", index, prefix, {**shapes, **experts}, trains=plan.train_text)
    head = {} if tied else {"output_layer.weight": (text.vocab_size, text.hidden_size)}
    yield unit("head", 0, decoder, head, trains=plan.train_text)
