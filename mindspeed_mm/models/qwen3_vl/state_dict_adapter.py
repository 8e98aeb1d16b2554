"""The one invertible map between Hugging Face tensors of Qwen3-VL and the parameters of the mcore model.

Every rule names one mcore parameter, the Hugging Face tensors that it is made of, and two pure functions that move the
values either way. Values are only ever moved, never computed, so both directions are exact to the bit in every dtype.

Shapes in this file: V vocabulary, H text width, D width of one attention head, E experts, I expert width, F dense MLP
width; ``hidden``, ``heads`` and ``inner`` are the vision tower's width, attention heads and MLP width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig

WEIGHT_MAP_VERSION = 1
"""Rises whenever a name, a shape or the order of rows on the mcore side changes."""

ExpertLayout = Literal["hub", "v5"]
"""How experts lie in a Hugging Face checkpoint.

``hub``: the published one, ``x @ W``: gate_up_proj [E, H, 2I] and down_proj [E, I, H].
``v5``:  what transformers 5 holds in memory and writes: gate_up_proj [E, 2I, H] and down_proj [E, H, I].
The mcore model always holds ``hub``.
"""

Shape = tuple[int, ...]
NamedShape = tuple[str, Shape]


class Transform(Protocol):
    """Moves values between the Hugging Face tensors of a rule and its mcore parameter."""

    row_wise: bool
    """Whether rows [a, b) of the mcore parameter are made of just rows [a, b) of one Hugging Face tensor."""

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors, in the order of the rule's sources -> the mcore parameter."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The mcore parameter -> Hugging Face tensors, in the order of the rule's sources."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """The same tensor on both sides; ``hf_tail`` and ``mcore_tail`` are its shapes without axis 0."""

    hf_tail: Shape
    mcore_tail: Shape
    row_wise: bool = True

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[R, *hf_tail] -> [R, *mcore_tail], no values moved."""
        return tensors[0].reshape(-1, *self.mcore_tail)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[R, *mcore_tail] -> [R, *hf_tail], no values moved."""
        return (tensor.reshape(-1, *self.hf_tail),)


@dataclasses.dataclass(frozen=True)
class TransposeExperts:
    """Expert matrices that lie the other way round on the Hugging Face side: [E, a, b] <-> [E, b, a]."""

    row_wise: bool = True

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[E, a, b] -> [E, b, a], contiguous."""
        return tensors[0].transpose(1, 2).contiguous()

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[E, b, a] -> [E, a, b], contiguous."""
        return (tensor.transpose(1, 2).contiguous(),)


@dataclasses.dataclass(frozen=True)
class StackRows:
    """Several tensors one after another along axis 0, as gate and up of a dense MLP; ``rows`` is the length of each."""

    rows: tuple[int, ...]
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[r0, ...], [r1, ...] -> [r0 + r1, ...]."""
        return torch.cat(list(tensors), dim=0)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[r0 + r1, ...] -> [r0, ...], [r1, ...], contiguous."""
        return tuple(part.contiguous() for part in tensor.split(list(self.rows), dim=0))


@dataclasses.dataclass(frozen=True)
class FuseQKV:
    """q, k, v <-> mcore's fused rows: for each key/value head its query heads, then its key, then its value.

    ``groups`` is the number of key/value heads, ``queries`` the number of query heads that share one.
    """

    groups: int
    queries: int
    head_dim: int
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """q [groups * queries * D, ...], k and v [groups * D, ...] -> [groups * (queries + 2) * D, ...]."""
        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tensors[0].shape[1:])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[groups * (queries + 2) * D, ...] -> q [groups * queries * D, ...], k and v [groups * D, ...]."""
        grouped = tensor.reshape(self.groups, (self.queries + 2) * self.head_dim, *tensor.shape[1:])
        parts = grouped.split([self.queries * self.head_dim, self.head_dim, self.head_dim], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)


@dataclasses.dataclass(frozen=True)
class InterleaveQKV:
    """Vision q, k, v stacked as [3, heads, D] rows <-> mcore's [heads, 3, D] rows."""

    heads: int
    head_dim: int
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[3 * heads * D, ...] -> [heads * 3 * D, ...], contiguous."""
        return _swap_leading(tensors[0], 3, self.heads, self.head_dim)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[heads * 3 * D, ...] -> [3 * heads * D, ...], contiguous."""
        return (_swap_leading(tensor, self.heads, 3, self.head_dim),)


def _swap_leading(tensor: Tensor, outer: int, inner: int, head_dim: int) -> Tensor:
    """[outer * inner * D, ...] -> [inner * outer * D, ...] with the two leading axes exchanged."""
    split = tensor.reshape(outer, inner, head_dim, *tensor.shape[1:])
    return split.transpose(0, 1).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One mcore parameter and the Hugging Face tensors that hold the same values.

    Attributes:
        target: name of the mcore parameter, without the checkpoint's ``model.`` prefix.
        target_shape: its shape.
        sources: names and shapes of the Hugging Face tensors.
        transform: how values move between the two sides.
    """

    target: str
    target_shape: Shape
    sources: tuple[NamedShape, ...]
    transform: Transform

    @property
    def row_wise(self) -> bool:
        """Whether rows [a, b) of the target are made of just rows [a, b) of its one source, on axis 0."""
        return self.transform.row_wise

    @property
    def is_copy(self) -> bool:
        """Whether both sides are the same sequence of bytes."""
        return isinstance(self.transform, Copy)

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors in the order of ``sources`` -> the mcore parameter.

        A row-wise rule also takes a range of rows of its source and gives the same range of the target.

        Raises:
            ValueError: if the tensors are not those of ``sources``.
        """
        if len(tensors) != len(self.sources):
            raise ValueError(f"{self.target} is made of {len(self.sources)} tensors, not {len(tensors)}")
        for tensor, (name, shape) in zip(tensors, self.sources, strict=True):
            self._check(name, tensor, shape)
        return self.transform.to_mcore(tensors)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The mcore parameter -> Hugging Face tensors in the order of ``sources``; a row range as in ``to_mcore``.

        Raises:
            ValueError: if the tensor has another shape than the target.
        """
        self._check(self.target, tensor, self.target_shape)
        return self.transform.to_hf(tensor)

    def _check(self, name: str, tensor: Tensor, shape: Shape) -> None:
        # A range of rows has fewer rows than the whole, and agrees in all other axes.
        same_tail = tensor.dim() == len(shape) and tuple(tensor.shape[1:]) == shape[1:]
        if not same_tail or (tensor.shape[0] != shape[0] and not (self.row_wise and tensor.shape[0] < shape[0])):
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")


def weight_map(model_config: Qwen3VLConfig, *, expert_layout: ExpertLayout) -> list[WeightRule]:
    """All rules of a model: each mcore parameter and each Hugging Face tensor occurs exactly once.

    Args:
        geometry: a MoE or dense Qwen3-VL model; with tied embeddings there is no output layer on either side.
        expert_layout: how experts lie on the Hugging Face side; without effect on a dense model.

    Raises:
        ValueError: if ``expert_layout`` is neither "hub" nor "v5".
    """
    if expert_layout not in ("hub", "v5"):
        raise ValueError(f"expert_layout is {expert_layout!r}; choose hub or v5")
    return [
        *_text_rules(model_config.text, expert_layout),
        *_vision_rules(model_config.vision),
    ]


def hf_shapes(rules: Sequence[WeightRule]) -> dict[str, Shape]:
    """Names and shapes of all Hugging Face tensors of ``rules``."""
    return {name: shape for rule in rules for name, shape in rule.sources}


def mcore_shapes(rules: Sequence[WeightRule]) -> dict[str, Shape]:
    """Names (without ``model.``) and shapes of all mcore parameters of ``rules``."""
    return {rule.target: rule.target_shape for rule in rules}


def _copy(target: str, source: str, shape: Shape, *, source_shape: Shape | None = None) -> WeightRule:
    source_shape = source_shape or shape
    return WeightRule(target, shape, ((source, source_shape),), Copy(source_shape[1:], shape[1:]))


def _text_rules(text: Qwen3VLTextConfig, expert_layout: ExpertLayout) -> Iterator[WeightRule]:
    width, vocabulary = text.hidden_size, text.vocab_size
    ours, theirs = "text_decoder", "model.language_model"
    yield _copy(f"{ours}.embedding.word_embeddings.weight", f"{theirs}.embed_tokens.weight", (vocabulary, width))
    for layer in range(text.num_layers):
        to, source = f"{ours}.layers.{layer}", f"{theirs}.layers.{layer}"
        yield _copy(f"{to}.input_layernorm.weight", f"{source}.input_layernorm.weight", (width,))
        yield from _text_attention_rules(text, f"{to}.self_attention", f"{source}.self_attn")
        yield _copy(f"{to}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight", (width,))
        if text.is_moe_layer(layer):
            yield from _expert_rules(text, f"{to}.mlp", f"{source}.mlp", expert_layout)
        else:
            yield from _dense_rules(text, f"{to}.mlp", f"{source}.mlp")
    yield _copy(f"{ours}.final_layernorm.weight", f"{theirs}.norm.weight", (width,))
    if not text.tie_word_embeddings:
        yield _copy(f"{ours}.output_layer.weight", "lm_head.weight", (vocabulary, width))


def _text_attention_rules(text: Qwen3VLTextConfig, to: str, source: str) -> Iterator[WeightRule]:
    width, head_dim = text.hidden_size, text.head_dim
    q_rows, kv_rows = text.num_heads * head_dim, text.num_kv_heads * head_dim
    fuse = FuseQKV(groups=text.num_kv_heads, queries=text.num_heads // text.num_kv_heads, head_dim=head_dim)
    for kind in ("weight", "bias") if text.attention_bias else ("weight",):
        tail = (width,) if kind == "weight" else ()
        yield WeightRule(
            target=f"{to}.linear_qkv.{kind}",
            target_shape=(q_rows + 2 * kv_rows, *tail),
            sources=(
                (f"{source}.q_proj.{kind}", (q_rows, *tail)),
                (f"{source}.k_proj.{kind}", (kv_rows, *tail)),
                (f"{source}.v_proj.{kind}", (kv_rows, *tail)),
            ),
            transform=fuse,
        )
        tail = (q_rows,) if kind == "weight" else ()
        yield _copy(f"{to}.linear_proj.{kind}", f"{source}.o_proj.{kind}", (width, *tail))
    yield _copy(f"{to}.q_layernorm.weight", f"{source}.q_norm.weight", (head_dim,))
    yield _copy(f"{to}.k_layernorm.weight", f"{source}.k_norm.weight", (head_dim,))


def _expert_rules(text: Qwen3VLTextConfig, to: str, source: str, expert_layout: ExpertLayout) -> Iterator[WeightRule]:
    experts, width, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    yield _copy(f"{to}.router.weight", f"{source}.gate.weight", (experts, width))
    for name, shape in (("gate_up_proj", (experts, width, 2 * inner)), ("down_proj", (experts, inner, width))):
        target, hf_name = f"{to}.experts.{name}", f"{source}.experts.{name}"
        if expert_layout == "hub":
            yield _copy(target, hf_name, shape)
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
    yield _copy(f"{to}.linear_fc2.weight", f"{source}.down_proj.weight", (width, inner))


def _vision_rules(vision: Qwen3VLVisionConfig) -> Iterator[WeightRule]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    ours, theirs = "image_encoder.vision_encoder", "model.visual"
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    # The convolution's kernel equals its stride, so it is a product with the flattened kernel.
    yield _copy(
        f"{ours}.patch_embed.proj.weight",
        f"{theirs}.patch_embed.proj.weight",
        (hidden, math.prod(kernel)),
        source_shape=(hidden, *kernel),
    )
    yield _copy(f"{ours}.patch_embed.proj.bias", f"{theirs}.patch_embed.proj.bias", (hidden,))
    yield _copy(
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
        yield _copy(f"{to}.{kind}", f"{source}.{kind}", (width,))


def _linear_rules(to: str, source: str, rows: int, columns: int) -> Iterator[WeightRule]:
    yield _copy(f"{to}.weight", f"{source}.weight", (rows, columns))
    yield _copy(f"{to}.bias", f"{source}.bias", (rows,))
