"""Floating-point operations of layers that families share.

A product of x [n, a] with a weight [a, b] counts 2nab in forward, and 2nab in backward for each of the two gradients
that are computed: that of x if anything before it trains, that of the weight if it trains. Attention counts its two
products over the pairs of positions that see each other, and twice that in backward. Of the experts, those that serve a
token count. An adapter of rank r counts its two products and both gradients of each, 2nr(a + b) a time, without that of
x if nothing before it trains. Norms, rotary positions, softmax and lookups do not count, and neither does
recomputation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from mindspeed_mm.models.layers.config import DecoderConfig
from mindspeed_mm.models.lora import Adapter

AdaptedWeights = Mapping[str, tuple[int, int]]
"""Name of a parameter of the mcore model -> for its adapters the sums of rank x input width and rank x output width."""


def adapted_weights(adapters: Sequence[Adapter]) -> AdaptedWeights:
    """The adapters by the parameter that they adapt."""
    found: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        inputs, outputs = found.get(adapter.base, (0, 0))
        output_width = adapter.source[1][2 if adapter.is_experts else 0]
        found[adapter.base] = inputs + adapter.rank * adapter.inputs, outputs + adapter.rank * output_width
    return found


class FlopSum:
    """Adds up the products of a model in the order of its forward pass.

    Attributes:
        total: operations so far.
        reached: whether something before the next product trains, so that backward computes the gradient of its input.
    """

    def __init__(self, adapted: AdaptedWeights) -> None:
        self._adapted = adapted
        self.total, self.reached = 0.0, False

    def product(self, name: str, rows: float, inputs: int, outputs: int, *, trains: bool) -> None:
        """Of ``rows`` with the weight ``name`` [inputs, outputs], and with its adapters."""
        self.total += product_flops(rows * inputs * outputs, inputs=self.reached, weights=trains)
        of_a, of_b = self._adapted.get(name, (0, 0))
        if of_b:
            self.total += product_flops(rows * of_a, inputs=self.reached, weights=True)
            self.total += product_flops(rows * of_b, inputs=True, weights=True)
        self.reached |= trains or of_b > 0

    def attention(self, multiplications: float) -> None:
        """Both products of attention, which have no weights."""
        self.total += product_flops(multiplications, inputs=self.reached, weights=self.reached)


def product_flops(multiplications: float, *, inputs: bool, weights: bool) -> float:
    """Forward, and the gradients of ``inputs`` and ``weights`` that are computed."""
    return 2.0 * multiplications * (1 + inputs + weights)


def segment_lengths(cu_seqlens: Sequence[int]) -> list[int]:
    """Lengths of the segments between ``cu_seqlens``."""
    return [end - start for start, end in itertools.pairwise(cu_seqlens)]


def decoder_flops(
    flops: FlopSum,
    config: DecoderConfig,
    lengths: Sequence[int],
    *,
    prefix: str,
    target_tokens: int,
    trains: bool,
    train_experts: bool = True,
) -> None:
    """Add the operations of a decoder with its loss head in a micro-batch.

    Args:
        flops: sum that has those of what comes before the decoder.
        config: of the decoder.
        lengths: tokens of each sample.
        prefix: of its parameters' names.
        target_tokens: of the micro-batch.
        trains: whether the decoder's weights train.
        train_experts: whether its experts' do, if the decoder's do.
    """
    count, width = sum(lengths), config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops.reached |= trains  # the word embeddings
    for index in range(config.num_layers):
        layer = f"{prefix}.layers.{index}"
        flops.product(f"{layer}.self_attention.linear_qkv.weight", count, width, query + 2 * key, trains=trains)
        flops.attention(2 * query * pairs)
        flops.product(f"{layer}.self_attention.linear_proj.weight", count, query, width, trains=trains)
        if config.is_moe_layer(index):
            rows, inner = count * config.num_experts_per_token, config.moe_intermediate_size
            flops.product(f"{layer}.mlp.router.weight", count, width, config.num_experts, trains=trains)
            first, second, mlp_trains = "experts.gate_up_proj", "experts.down_proj", trains and train_experts
        else:
            rows, inner, mlp_trains = count, config.intermediate_size, trains
            first, second = "linear_fc1.weight", "linear_fc2.weight"
        flops.product(f"{layer}.mlp.{first}", rows, width, 2 * inner, trains=mlp_trains)
        flops.product(f"{layer}.mlp.{second}", rows, inner, width, trains=mlp_trains)
    flops.product(f"{prefix}.output_layer.weight", target_tokens, width, config.vocab_size, trains=trains)
