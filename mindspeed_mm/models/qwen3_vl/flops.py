"""Floating-point operations that a micro-batch's forward and backward pass need: what TFLOP/s and MFU are made of.

A product of x [n, a] with a weight [a, b] counts 2nab in forward, and as much again in backward for each of the two
gradients that are wanted: that of x where anything before it trains, that of the weight where it trains. Attention
counts its two products over the pairs of positions that see each other, causal in text and whole in pictures, and
twice that in backward. Of the experts those count that serve a token. Norms, rotary positions, softmax and lookups do
not count, and neither does what recomputation repeats.

Legend: T tokens, S supervised positions, N patches, M merged patches.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Counts for one model, of which some parts may be frozen.

    Attributes:
        geometry: of the model.
        train_vision: whether the vision encoder trains.
        train_projector: whether the mergers train.
        train_text: whether the text decoder trains.
        train_experts: whether its experts do, if the decoder trains.
    """

    model_config: Qwen3VLConfig
    train_vision: bool = True
    train_projector: bool = True
    train_text: bool = True
    train_experts: bool = True

    def __call__(self, batch: Batch) -> float:
        """Operations of a whole micro-batch, in 10^12."""
        vision = batch.vision
        return self.of_lengths(
            _lengths(batch.cu_seqlens_host),
            patches=[] if vision.is_dummy else _lengths(vision.cu_seqlens_host),
            target_tokens=batch.num_target_tokens,
        )

    def of_lengths(self, tokens: Sequence[int], *, patches: Sequence[int], target_tokens: int) -> float:
        """Likewise, of the tokens of each sample, the patches of each picture and the supervised positions."""
        return (self._vision(patches) + self._text(tokens, target_tokens)) / 1e12

    def _vision(self, patches: Sequence[int]) -> float:
        vision, count = self.model_config.vision, sum(patches)
        width, trains = vision.hidden_size, self.train_vision
        block = count * (4 * width**2 + 2 * width * vision.intermediate_size)
        attention = 2 * width * sum(length**2 for length in patches)
        wide = width * vision.merge_unit
        mergers = (1 + len(vision.deepstack_visual_indexes)) * (count // vision.merge_unit)
        return (
            _product(count * vision.patch_dim * width, inputs=False, weights=trains)
            + vision.depth * (_product(block, inputs=trains, weights=trains)
                              + _product(attention, inputs=trains, weights=trains))
            # a merger's first product follows its own norm
            + _product(mergers * wide * (wide + vision.out_hidden_size), inputs=trains or self.train_projector,
                       weights=self.train_projector)
        )  # fmt: skip

    def _text(self, tokens: Sequence[int], target_tokens: int) -> float:
        text, count = self.model_config.text, sum(tokens)
        trains, width = self.train_text, text.hidden_size
        flows = trains or self.train_projector or self.train_vision
        query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        projections = count * width * (2 * query + 2 * key)
        attention = 2 * query * sum(length * (length + 1) // 2 for length in tokens)
        total = _product(target_tokens * width * text.vocab_size, inputs=flows, weights=trains)
        for layer in range(text.num_layers):
            total += _product(projections, inputs=flows, weights=trains)
            total += _product(attention, inputs=flows, weights=flows)
            if text.is_moe_layer(layer):
                experts = count * text.num_experts_per_token * 3 * width * text.moe_intermediate_size
                total += _product(experts, inputs=flows, weights=trains and self.train_experts)
                total += _product(count * width * text.num_experts, inputs=flows, weights=trains)
            else:
                total += _product(count * 3 * width * text.intermediate_size, inputs=flows, weights=trains)
        return total


def _product(multiplications: float, *, inputs: bool, weights: bool) -> float:
    """Forward, and the gradients that are wanted."""
    return 2.0 * multiplications * (1 + inputs + weights)


def _lengths(offsets: Sequence[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(offsets)]
