"""Floating-point operations of a micro-batch's forward and backward pass: what TFLOP/s and MFU are computed from.

What counts is said in :mod:`mindspeed_mm.models.layers.flops`; attention is causal in text and full within images.

Legend: N patches, M merged patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.flops import decoder_flops, product_flops, segment_lengths
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Counts for one model, of which some parts may be frozen.

    Attributes:
        model_config: of the model.
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
            segment_lengths(batch.cu_seqlens_host),
            patches=[] if vision.is_dummy else segment_lengths(vision.cu_seqlens_host),
            target_tokens=batch.num_target_tokens,
        )

    def of_lengths(self, tokens: Sequence[int], *, patches: Sequence[int], target_tokens: int) -> float:
        """Likewise, of the tokens of each sample, the patches of each image, and the number of target tokens."""
        return (self._vision(patches) + self._text(tokens, target_tokens)) / 1e12

    def _vision(self, patches: Sequence[int]) -> float:
        vision, count = self.model_config.vision, sum(patches)
        width, trains = vision.hidden_size, self.train_vision
        block = count * (4 * width**2 + 2 * width * vision.intermediate_size)
        attention = 2 * width * sum(length**2 for length in patches)
        wide = width * vision.merge_unit
        mergers = (1 + len(vision.deepstack_visual_indexes)) * (count // vision.merge_unit)
        return (
            product_flops(count * vision.patch_dim * width, inputs=False, weights=trains)
            + vision.depth * (product_flops(block, inputs=trains, weights=trains)
                              + product_flops(attention, inputs=trains, weights=trains))
            # a merger's first product follows its own norm
            + product_flops(mergers * wide * (wide + vision.out_hidden_size), inputs=trains or self.train_projector,
                            weights=self.train_projector)
        )  # fmt: skip

    def _text(self, tokens: Sequence[int], target_tokens: int) -> float:
        return decoder_flops(
            self.model_config.text,
            tokens,
            target_tokens=target_tokens,
            trains=self.train_text,
            runs_backward=self.train_text or self.train_projector or self.train_vision,
            train_experts=self.train_experts,
        )
