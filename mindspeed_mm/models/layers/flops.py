"""Floating-point operations of layers that families share.

A product of x [n, a] with a weight [a, b] counts 2nab in forward, and 2nab in backward for each of the two gradients
that are computed: that of x if anything before it trains, that of the weight if it trains. Attention counts its two
products over the pairs of positions that see each other, and twice that in backward. Of the experts, those that serve a
token count. Norms, rotary positions, softmax and lookups do not count, and neither does recomputation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mindspeed_mm.models.layers.config import DecoderConfig


def product_flops(multiplications: float, *, inputs: bool, weights: bool) -> float:
    """Forward, and the gradients of ``inputs`` and ``weights`` that are computed."""
    return 2.0 * multiplications * (1 + inputs + weights)


def segment_lengths(cu_seqlens: Sequence[int]) -> list[int]:
    """Lengths of the segments between ``cu_seqlens``."""
    return [end - start for start, end in itertools.pairwise(cu_seqlens)]


def decoder_flops(
    config: DecoderConfig,
    lengths: Sequence[int],
    *,
    target_tokens: int,
    trains: bool,
    runs_backward: bool,
    train_experts: bool = True,
) -> float:
    """Operations of a decoder with its loss head in a micro-batch.

    Args:
        config: of the decoder.
        lengths: tokens of each sample.
        target_tokens: of the micro-batch.
        trains: whether the decoder's parameters train.
        runs_backward: whether autograd runs through it: it trains, or something before it does.
        train_experts: whether its experts train, if the decoder does.
    """
    count, width = sum(lengths), config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = count * width * (2 * query + 2 * key)
    attention = 2 * query * sum(length * (length + 1) // 2 for length in lengths)
    total = product_flops(target_tokens * width * config.vocab_size, inputs=runs_backward, weights=trains)
    for layer in range(config.num_layers):
        total += product_flops(projections, inputs=runs_backward, weights=trains)
        total += product_flops(attention, inputs=runs_backward, weights=runs_backward)
        if config.is_moe_layer(layer):
            experts = count * config.num_experts_per_token * 3 * width * config.moe_intermediate_size
            total += product_flops(experts, inputs=runs_backward, weights=trains and train_experts)
            total += product_flops(count * width * config.num_experts, inputs=runs_backward, weights=trains)
        else:
            mlp = count * 3 * width * config.intermediate_size
            total += product_flops(mlp, inputs=runs_backward, weights=trains)
    return total
