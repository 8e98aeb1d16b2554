"""The map between Hugging Face tensors of Qwen3-VL and the parameters of the mcore model.

Shapes in this file: V vocabulary, H text width, D width of one attention head, E experts, I expert width, F dense MLP
width; ``hidden``, ``heads`` and ``inner`` are the vision tower's width, attention heads and MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mindspeed_mm.models.matrices import Matrices
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from mindspeed_mm.models.state_dict import (
    ExpertLayout,
    FuseQKV,
    InterleaveQKV,
    StackRows,
    TransposeExperts,
    WeightRule,
    copy_rule,
)


def weight_rules(model_config: Qwen3VLConfig, *, expert_layout: ExpertLayout) -> list[WeightRule]:
    """All rules of a model: each mcore parameter and each Hugging Face tensor occurs exactly once.

    Args:
        model_config: a MoE or dense Qwen3-VL model; with tied embeddings there is no output layer on either side.
        expert_layout: layout of the experts on the Hugging Face side; without effect on a dense model.

    Raises:
        ValueError: if ``expert_layout`` is neither "hub" nor "v5".
    """
    if expert_layout not in ("hub", "v5"):
        raise ValueError(f"expert_layout is {expert_layout!r}; choose hub or v5")
    return [
        *_text_rules(model_config.text, expert_layout),
        *_vision_rules(model_config.vision),
    ]


def _text_rules(text: Qwen3VLTextConfig, expert_layout: ExpertLayout) -> Iterator[WeightRule]:
    width, vocabulary = text.hidden_size, text.vocab_size
    ours, theirs = "text_decoder", "model.language_model"
    yield copy_rule(f"{ours}.embedding.word_embeddings.weight", f"{theirs}.embed_tokens.weight", (vocabulary, width))
    for layer in range(text.num_layers):
        to, source = f"{ours}.layers.{layer}", f"{theirs}.layers.{layer}"
        yield copy_rule(f"{to}.input_layernorm.weight", f"{source}.input_layernorm.weight", (width,))
        yield from _text_attention_rules(text, f"{to}.self_attention", f"{source}.self_attn")
        yield copy_rule(f"{to}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight", (width,))
        if text.is_moe_layer(layer):
            yield from _expert_rules(text, f"{to}.mlp", f"{source}.mlp", expert_layout)
        else:
            yield from _dense_rules(text, f"{to}.mlp", f"{source}.mlp")
    yield copy_rule(f"{ours}.final_layernorm.weight", f"{theirs}.norm.weight", (width,))
    if not text.tie_word_embeddings:
        yield copy_rule(f"{ours}.output_layer.weight", "lm_head.weight", (vocabulary, width))


def _text_attention_rules(text: Qwen3VLTextConfig, to: str, source: str) -> Iterator[WeightRule]:
    width, head_dim = text.hidden_size, text.head_dim
    q_rows, kv_rows = text.num_heads * head_dim, text.num_kv_heads * head_dim
    fuse = FuseQKV(groups=text.num_kv_heads, queries=text.num_heads // text.num_kv_heads, head_dim=head_dim)
    yield WeightRule(
        target=f"{to}.linear_qkv.weight",
        target_shape=(q_rows + 2 * kv_rows, width),
        sources=(
            (f"{source}.q_proj.weight", (q_rows, width)),
            (f"{source}.k_proj.weight", (kv_rows, width)),
            (f"{source}.v_proj.weight", (kv_rows, width)),
        ),
        transform=fuse,
    )
    yield copy_rule(f"{to}.linear_proj.weight", f"{source}.o_proj.weight", (width, q_rows))
    yield copy_rule(f"{to}.q_layernorm.weight", f"{source}.q_norm.weight", (head_dim,))
    yield copy_rule(f"{to}.k_layernorm.weight", f"{source}.k_norm.weight", (head_dim,))


def _expert_rules(text: Qwen3VLTextConfig, to: str, source: str, expert_layout: ExpertLayout) -> Iterator[WeightRule]:
    experts, width, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    yield copy_rule(f"{to}.router.weight", f"{source}.gate.weight", (experts, width))
    for name, shape in (("gate_up_proj", (experts, width, 2 * inner)), ("down_proj", (experts, inner, width))):
        target, hf_name = f"{to}.experts.{name}", f"{source}.experts.{name}"
        if expert_layout == "hub":
            yield copy_rule(target, hf_name, shape)
        else:
            swapped = (shape[0], shape[2], shape[1])
            yield WeightRule(target, shape, ((hf_name, swapped),), TransposeExperts())


def _dense_rules(text: Qwen3VLTextConfig, to: str, source: str) -> Iterator[WeightRule]:
    width, inner = text.hidden_size, text.intermediate_size
    yield WeightRule(
        target=f"{to}.linear_fc1.weight",
        target_shape=(2 * inner, width),
        sources=((f"{source}.gate_proj.weight", (inner, width)), (f"{source}.up_proj.weight", (inner, width))),
        transform=StackRows((inner, inner)),
    )
    yield copy_rule(f"{to}.linear_fc2.weight", f"{source}.down_proj.weight", (width, inner))


def _vision_rules(vision: Qwen3VLVisionConfig) -> Iterator[WeightRule]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    ours, theirs = "image_encoder.vision_encoder", "model.visual"
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    # The convolution's kernel equals its stride, so it is a product with the flattened kernel.
    yield copy_rule(
        f"{ours}.patch_embed.proj.weight",
        f"{theirs}.patch_embed.proj.weight",
        (hidden, math.prod(kernel)),
        source_shape=(hidden, *kernel),
    )
    yield copy_rule(f"{ours}.patch_embed.proj.bias", f"{theirs}.patch_embed.proj.bias", (hidden,))
    yield copy_rule(
        f"{ours}.pos_embed.weight", f"{theirs}.pos_embed.weight", (vision.num_position_embeddings, hidden)
    )
    for block in range(vision.depth):
        to, source = f"{ours}.layers.{block}", f"{theirs}.blocks.{block}"
        yield from _norm_rules(f"{to}.input_layernorm", f"{source}.norm1", hidden)
        for kind, tail in (("weight", (hidden,)), ("bias", ())):
            shape = (3 * hidden, *tail)
            yield WeightRule(
                target=f"{to}.self_attention.linear_qkv.{kind}",
                target_shape=shape,
                sources=((f"{source}.attn.qkv.{kind}", shape),),
                transform=InterleaveQKV(heads=vision.num_heads, head_dim=vision.head_dim),
            )
        yield from _linear_rules(f"{to}.self_attention.linear_proj", f"{source}.attn.proj", hidden, hidden)
        yield from _norm_rules(f"{to}.pre_mlp_layernorm", f"{source}.norm2", hidden)
        yield from _linear_rules(f"{to}.mlp.linear_fc1", f"{source}.mlp.linear_fc1", inner, hidden)
        yield from _linear_rules(f"{to}.mlp.linear_fc2", f"{source}.mlp.linear_fc2", hidden, inner)

    merged = hidden * vision.merge_unit
    projector = "image_encoder.vision_projector"
    # The last merger normalises single patches, the deepstack ones the merged group.
    mergers = [(f"{projector}.merger", f"{theirs}.merger", hidden)]
    for index in range(len(vision.deepstack_visual_indexes)):
        name = f"{index}"
        mergers.append(
            (f"{projector}.deepstack_mergers.{name}", f"{theirs}.deepstack_merger_list.{name}", merged)
        )
    for to, source, norm_width in mergers:
        yield from _norm_rules(f"{to}.norm", f"{source}.norm", norm_width)
        yield from _linear_rules(f"{to}.linear_fc1", f"{source}.linear_fc1", merged, merged)
        yield from _linear_rules(f"{to}.linear_fc2", f"{source}.linear_fc2", vision.out_hidden_size, merged)


def _norm_rules(to: str, source: str, width: int) -> Iterator[WeightRule]:
    for kind in ("weight", "bias"):
        yield copy_rule(f"{to}.{kind}", f"{source}.{kind}", (width,))


def _linear_rules(to: str, source: str, rows: int, columns: int) -> Iterator[WeightRule]:
    yield copy_rule(f"{to}.weight", f"{source}.weight", (rows, columns))
    yield copy_rule(f"{to}.bias", f"{source}.bias", (rows,))


def layer_matrices(model_config: Qwen3VLConfig) -> dict[str, Matrices]:
    """The weight matrices of all layers and mergers, routers included: name of the mcore parameter -> matrices in it.

    q, k and v, gate and up, and all experts are matrices of their own, also where the Hugging Face model keeps them in
    one tensor.
    """
    text, vision = model_config.text, model_config.vision
    found: dict[str, Matrices] = {}
    queries = text.num_heads // text.num_kv_heads * text.head_dim
    for layer in range(text.num_layers):
        to = f"text_decoder.layers.{layer}"
        found[f"{to}.self_attention.linear_qkv.weight"] = Matrices(
            (queries, text.head_dim, text.head_dim), groups=text.num_kv_heads
        )
        found[f"{to}.self_attention.linear_proj.weight"] = Matrices()
        if text.is_moe_layer(layer):
            inner = text.moe_intermediate_size
            found[f"{to}.mlp.router.weight"] = Matrices()
            found[f"{to}.mlp.experts.gate_up_proj"] = Matrices((inner, inner), by_columns=True, transposed=True)
            found[f"{to}.mlp.experts.down_proj"] = Matrices(transposed=True)
        else:
            found[f"{to}.mlp.linear_fc1.weight"] = Matrices((text.intermediate_size,) * 2)
            found[f"{to}.mlp.linear_fc2.weight"] = Matrices()
    encoder, projector = "image_encoder.vision_encoder", "image_encoder.vision_projector"
    for block in range(vision.depth):
        to = f"{encoder}.layers.{block}"
        found[f"{to}.self_attention.linear_qkv.weight"] = Matrices((vision.head_dim,) * 3, groups=vision.num_heads)
        for name in ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            found[f"{to}.{name}.weight"] = Matrices()
    mergers = ["merger", *(f"deepstack_mergers.{index}" for index in range(len(vision.deepstack_visual_indexes)))]
    found |= {f"{projector}.{merger}.linear_fc{index}.weight": Matrices() for merger in mergers for index in (1, 2)}
    return found
