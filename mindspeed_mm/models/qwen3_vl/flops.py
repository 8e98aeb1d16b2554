"""Floating-point operations of a micro-batch's forward and backward pass: what TFLOP/s and MFU are computed from.

What counts is said in :mod:`mindspeed_mm.models.layers.flops`; attention is causal in text and full within images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.flops import (
    AdaptedWeights,
    FlopSum,
    adapted_weights,
    decoder_flops,
    segment_lengths,
)
from mindspeed_mm.models.lora import Adapter
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Counts for one model, of which some parts may be frozen or have adapters.

    Attributes:
        model_config: of the model.
        train_vision: whether the vision encoder's weights train.
        train_projector: whether the mergers' do.
        train_text: whether the text decoder's do.
        train_experts: whether its experts' do, if the decoder's do.
        adapters: of a LoRA run.
    """

    model_config: Qwen3VLConfig
    train_vision: bool = True
    train_projector: bool = True
    train_text: bool = True
    train_experts: bool = True
    adapters: Sequence[Adapter] = ()

    def __call__(self, batch: Batch) -> float:
        """Operations of a whole micro-batch, in 10^12."""
        vision = batch.vision
        return self.of_lengths(
            segment_lengths(batch.cu_seqlens_host),
            patches=[] if vision.is_dummy else segment_lengths(vision.cu_seqlens_host),
            target_tokens=batch.num_target_tokens,
        )

    def of_lengths(self, tokens: Sequence[int], *, patches: Sequence[int], target_tokens: int) -> float:
        """Likewise, of the tokens of each sample, the patches of each image, and the number of target tokens."""
        flops = FlopSum(self._adapted)
        self._add_vision(flops, patches)
        decoder_flops(
            flops, self.model_config.text, tokens, prefix="text_decoder", target_tokens=target_tokens,
            trains=self.train_text, train_experts=self.train_experts,
        )  # fmt: skip
        return flops.total / 1e12

    @functools.cached_property
    def _adapted(self) -> AdaptedWeights:
        return adapted_weights(self.adapters)

    def _add_vision(self, flops: FlopSum, patches: Sequence[int]) -> None:
        vision, count, trains = self.model_config.vision, sum(patches), self.train_vision
        width, inner = vision.hidden_size, vision.intermediate_size
        encoder, projector = "image_encoder.vision_encoder", "image_encoder.vision_projector"
        pairs = sum(length**2 for length in patches)
        flops.product(f"{encoder}.patch_embed.proj.weight", count, vision.patch_dim, width, trains=trains)
        for index in range(vision.depth):
            block = f"{encoder}.layers.{index}"
            flops.product(f"{block}.self_attention.linear_qkv.weight", count, width, 3 * width, trains=trains)
            flops.attention(2 * width * pairs)
            flops.product(f"{block}.self_attention.linear_proj.weight", count, width, width, trains=trains)
            flops.product(f"{block}.mlp.linear_fc1.weight", count, width, inner, trains=trains)
            flops.product(f"{block}.mlp.linear_fc2.weight", count, inner, width, trains=trains)
        merged, wide, before = count // vision.merge_unit, width * vision.merge_unit, flops.reached
        deepstack = (f"deepstack_mergers.{index}" for index in range(len(vision.deepstack_visual_indexes)))
        for name in ("merger", *deepstack):
            flops.reached = before or self.train_projector  # its first product follows its own norm
            for linear, outputs in (("linear_fc1", wide), ("linear_fc2", vision.out_hidden_size)):
                weight = f"{projector}.{name}.{linear}.weight"
                flops.product(weight, merged, wide, outputs, trains=self.train_projector)
        flops.reached |= before or any(base.startswith(projector) for base in self._adapted)
