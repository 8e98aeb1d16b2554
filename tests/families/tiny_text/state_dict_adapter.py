"""Tensors of the tiny text family: values, keys and queries in one, and up before gate.

Legend: H hidden width, I MLP width, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mindspeed_mm.models.state_dict import FuseQKV, WeightRule, copy_rule
from tests.families.tiny_text.config import TinyTextConfig


@dataclasses.dataclass(frozen=True)
class FuseVKQ:
    """[v; k; q] rows <-> mcore's fused rows."""

    fuse: FuseQKV
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[(2 * groups + heads) * D, ...] -> the same rows, by key/value head."""
        rows = self.fuse.groups * self.fuse.head_dim
        value, key, query = tensors[0].split([rows, rows, tensors[0].shape[0] - 2 * rows])
        return self.fuse.to_mcore([query, key, value])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The other way."""
        query, key, value = self.fuse.to_hf(tensor)
        return (torch.cat([value, key, query]),)


@dataclasses.dataclass(frozen=True)
class SwapHalves:
    """[up; gate] rows <-> [gate; up]."""

    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[2I, H] -> [2I, H]."""
        return torch.cat(tensors[0].chunk(2)[::-1])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The same."""
        return (self.to_mcore([tensor]),)


def weight_rules(config: TinyTextConfig) -> Iterator[WeightRule]:
    """See :meth:`mindspeed_mm.models.spec.ModelSpec.weight_rules`."""
    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    fuse = FuseQKV(config.num_kv_heads, config.num_heads // config.num_kv_heads, head_dim)
    fused, query = (config.num_heads + 2 * config.num_kv_heads) * head_dim, config.num_heads * head_dim
    yield copy_rule("decoder.embedding.word_embeddings.weight", "wte.weight", (config.vocab_size, width))
    for index in range(config.num_layers):
        ours, theirs = f"decoder.layers.{index}", f"blocks.{index}"
        yield copy_rule(f"{ours}.input_layernorm.weight", f"{theirs}.ln1.scale", (width,))
        source = (f"{theirs}.attn.vkq", (fused, width))
        yield WeightRule(f"{ours}.self_attention.linear_qkv.weight", (fused, width), (source,), FuseVKQ(fuse))
        yield copy_rule(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.attn.out", (width, query))
        yield copy_rule(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.ln2.scale", (width,))
        source = (f"{theirs}.mlp.up_gate", (2 * inner, width))
        yield WeightRule(f"{ours}.mlp.linear_fc1.weight", (2 * inner, width), (source,), SwapHalves())
        yield copy_rule(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down", (width, inner))
    yield copy_rule("decoder.final_layernorm.weight", "ln.scale", (width,))
    yield copy_rule("decoder.output_layer.weight", "unembed", (config.vocab_size, width))
