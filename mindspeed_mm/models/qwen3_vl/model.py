"""Qwen3-VL: vision tower, projector, text decoder and loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.registry import attention_kernel
from mindspeed_mm.backend.megatron import prepare_megatron
from mindspeed_mm.interfaces.batch import Batch, VisionBatch
from mindspeed_mm.interfaces.media import PixelNorm
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy, recompute_selectively
from mindspeed_mm.models.layers.attention import CoreAttention
from mindspeed_mm.models.layers.rotary import TextRotary
from mindspeed_mm.models.layers.specs import decoder_kernels
from mindspeed_mm.models.model import Model, ModelOutput, ParallelPlan
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.text import TextDecoder
from mindspeed_mm.models.qwen3_vl.vision import (
    ImageEncoder,
    VisionEncoder,
    VisionProjector,
    vision_config,
    vision_layer_spec,
)
from mindspeed_mm.models.spec import ModelBuildOptions

VisionHandover = Callable[[Tensor, Sequence[Tensor], VisionBatch], tuple[Tensor, Sequence[Tensor]]]
"""(embeddings, deepstack embeddings, their batch) -> those of the tokens on this rank."""


def _keep(embeddings: Tensor, deepstack: Sequence[Tensor], vision: VisionBatch) -> tuple[Tensor, Sequence[Tensor]]:
    return embeddings, deepstack


class Qwen3VLModel(Model):
    """The whole model over one packed micro-batch.

    Attributes:
        exchange_vision: gives this rank the vision embeddings of its tokens; context parallelism replaces it.
    """

    def __init__(self, model_config: Qwen3VLConfig, image_encoder: ImageEncoder, text_decoder: TextDecoder) -> None:
        super().__init__()
        self.model_config = model_config
        self.image_encoder = image_encoder
        self.text_decoder = text_decoder
        self.exchange_vision: VisionHandover = _keep

    def forward(self, batch: Batch, loss_weight: Tensor | None = None) -> ModelOutput | Tensor:
        """See :class:`~mindspeed_mm.models.model.Model`."""
        embeddings, deepstack = self.exchange_vision(*self.image_encoder(batch.vision), batch.vision)
        hidden, load = self.text_decoder(batch, embeddings, deepstack)
        return self.text_decoder.output(hidden, load, batch, loss_weight)

    def parallel_plan(self) -> ParallelPlan:
        """See :class:`~mindspeed_mm.models.model.Model`.

        Tied embeddings are needed from the beginning of forward to its end: they are not a wrap unit, but are gathered
        once per step.
        """
        projector, decoder, config = self.image_encoder.vision_projector, self.text_decoder, self.model_config
        return ParallelPlan(
            wrap_units=[
                *self.image_encoder.vision_encoder.layers,
                projector.merger,
                *projector.deepstack_mergers,
                *([] if config.tie_word_embeddings else [decoder.embedding]),
                *decoder.layers,
                decoder.output_layer,
            ],
            root_group=decoder.root_group(),
            moe_layers=decoder.moe_layers(),
            attention=[module for module in self.modules() if isinstance(module, CoreAttention)],
            set_vision_exchange=functools.partial(setattr, self, "exchange_vision"),
        )


def build_model(
    model_config: Qwen3VLConfig,
    options: ModelBuildOptions,
    *,
    pixel_norm: PixelNorm,
    device: str,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> Qwen3VLModel:
    """Assemble the model from megatron-core specs, with uninitialised parameters.

    Called under ``torch.device("meta")`` it allocates nothing.

    Args:
        model_config: from the Hugging Face config.
        options: implementations and how activations are kept.
        pixel_norm: how uint8 pixels become the tower's input.
        device: kind of device (``Backend.name``) whose kernels are plugged in.
        dtype: of the parameters.
        compute_dtype: of forward and backward, by which kernels are chosen.

    Raises:
        UserError: if an implementation is not available on the device, or the config has something unsupported.
    """
    prepare_megatron()
    text, vision = model_config.text, model_config.vision
    kernels = decoder_kernels(text, options, device=device, dtype=compute_dtype)
    rotary = TextRotary(text.head_dim, text.rope_theta, text.mrope_section)
    text_decoder = TextDecoder(text, kernels, rotary, options=options, device=device, dtype=dtype)
    vision_attention = attention_kernel(options.vision_attn_implementation, device=device)
    vision_kernels = dataclasses.replace(kernels, attention=vision_attention)
    of_vision = vision_config(vision, dtype)
    encoder = VisionEncoder(vision, of_vision, vision_layer_spec(vision_kernels), pixel_norm)
    encoder.policy = ActivationCheckpointPolicy.from_options(
        options, device=device, synchronize_per_layer=options.vision_synchronize_per_layer, activation_offload=False
    )
    if options.recompute_granularity == "selective":
        recompute_selectively(encoder.layers)
    return Qwen3VLModel(model_config, ImageEncoder(encoder, VisionProjector(vision, of_vision)), text_decoder)
