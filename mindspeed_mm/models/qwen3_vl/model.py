"""Qwen3-VL: vision tower, projector, text decoder and loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_mm.backend.activation_offload import host_offload, synchronizer
from mindspeed_mm.backend.kernels.compiled import check_compiler
from mindspeed_mm.backend.kernels.registry import (
    attention_kernel,
    combine_kernel,
    expert_kernel,
    expert_kernel_name,
    rms_norm_kernel,
    rotary_kernel,
    token_permuter,
)
from mindspeed_mm.backend.megatron import prepare_megatron
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch, VisionBatch
from mindspeed_mm.interfaces.media import PixelNorm
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy, recompute_selectively
from mindspeed_mm.models.layers.moe import MoELayer, RouterLoad
from mindspeed_mm.models.layers.specs import (
    Kernels,
    decoder_layer_spec,
    rms_norm_spec,
    text_config,
    vision_config,
    vision_layer_spec,
)
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.text import TextDecoder
from mindspeed_mm.models.qwen3_vl.vision import ImageEncoder, VisionEncoder, VisionProjector


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBuildOptions:
    """What a user may choose about a model whose geometry is given.

    Attributes:
        text_attention: name of the text attention; None for the device's best.
        vision_attention: likewise for vision.
        fused_experts: grouped expert products instead of the reference loop.
        loss_chunk_size: supervised positions whose logits exist at a time; None for all.
        freeze_vision_encoder: train nothing of the vision encoder.
        freeze_vision_projector: train no merger.
        freeze_text_decoder: train nothing of the text decoder.
        recompute: ``none``, ``full`` or ``selective``, for vision blocks that train and for decoder layers; see
            :class:`~mindspeed_mm.models.layers.activation_checkpoint.ActivationCheckpointPolicy`.
        recompute_method: of ``full``; ``uniform`` or ``block``.
        recompute_num_layers: of ``full``.
        offload_activations: keep on the host what the decoder layers keep for backward.
        synchronize_vision_layers: wait for the device after each vision block.
        synchronize_text_layers: wait for the device after each decoder layer.
        router_load: return the routers' load, which a loss that balances experts is made of.
        compile_small_operators: norms, rotary positions and SwiGLU of grouped experts by torch.compile.
    """

    text_attention: str | None = None
    vision_attention: str | None = None
    fused_experts: bool = True
    loss_chunk_size: int | None = None
    freeze_vision_encoder: bool = False
    freeze_vision_projector: bool = False
    freeze_text_decoder: bool = False
    recompute: Literal["none", "full", "selective"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    offload_activations: bool = False
    synchronize_vision_layers: bool = False
    synchronize_text_layers: bool = False
    router_load: bool = False
    compile_small_operators: bool = False


class ModelOutput(NamedTuple):
    """What the model makes of a micro-batch.

    Attributes:
        loss: fp32 scalar, ``sum(token_weight * cross_entropy)``.
        token_losses: fp32 [S], cross-entropy of each supervised token, outside autograd.
        router_load: summed over the sparse layers; None where it was not asked for, or there is none.
    """

    loss: Tensor
    token_losses: Tensor
    router_load: RouterLoad | None


VisionHandover = Callable[[Tensor, Sequence[Tensor], VisionBatch], tuple[Tensor, Sequence[Tensor]]]
"""(embeddings, deepstack embeddings, their batch) -> those that belong to the tokens here."""


def _keep(embeddings: Tensor, deepstack: Sequence[Tensor], vision: VisionBatch) -> tuple[Tensor, Sequence[Tensor]]:
    return embeddings, deepstack


class Qwen3VLModel(nn.Module):
    """The whole model over one packed micro-batch.

    Attributes:
        exchange_vision: hands the tokens here their vision embeddings; context parallelism replaces it.
    """

    def __init__(self, image_encoder: ImageEncoder, text_decoder: TextDecoder) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_decoder = text_decoder
        self.exchange_vision: VisionHandover = _keep

    def forward(self, batch: Batch, loss_weight: Tensor | None = None) -> ModelOutput | Tensor:
        """Loss of a micro-batch, or its logits where ``token_weight`` is None.

        Args:
            batch: T packed tokens, S of them supervised.
            token_weight: fp32 [S]: the loss is ``sum(token_weight * cross_entropy)``, so that 1 / (supervised tokens
                of the whole step) gives the token mean whatever the split over micro-batches and ranks.

        Returns:
            The losses, or the logits [S, V] of the supervised positions.
        """
        embeddings, deepstack = self.exchange_vision(*self.image_encoder(batch.vision), batch.vision)
        decoder = self.text_decoder
        hidden, load = decoder(batch, embeddings, deepstack)
        predicting = hidden.index_select(0, batch.label_index)
        tied = decoder.tied_weight
        if loss_weight is None:
            return decoder.output_layer(predicting, tied_weight=tied)
        loss, token_losses = decoder.output_layer(predicting, batch.labels, loss_weight, tied_weight=tied)
        return ModelOutput(loss, token_losses, load)

    def wrap_units(self) -> list[nn.Module]:
        """The parts to shard by themselves, in the order in which forward runs them; the loss head comes last.

        Embeddings that serve the output layer too are wanted from the beginning of forward to its end: they are no
        unit, but stay with what is gathered once per step.
        """
        projector, decoder = self.image_encoder.vision_projector, self.text_decoder
        mergers = [projector.merger, *projector.deepstack_mergers]
        return [
            *self.image_encoder.vision_encoder.layers,
            *mergers,
            *([] if decoder.model_config.tie_word_embeddings else [decoder.embedding]),
            *decoder.layers,
            decoder.output_layer,
        ]

    def root_group_modules(self) -> list[nn.Module]:
        """The decoder layers' norms and routers: many tensors, and next to nothing of a layer's memory."""
        found = []
        for layer in self.text_decoder.layers:
            attention = layer.self_attention
            found += [layer.input_layernorm, attention.q_layernorm, attention.k_layernorm, layer.pre_mlp_layernorm]
            if isinstance(layer.mlp, MoELayer):
                found.append(layer.mlp.router)
        return found

    def reset_buffers(self) -> None:
        """Fill all constant buffers again after the model was moved off the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_buffers"):
                module.reset_buffers()


def build_model(
    model_config: Qwen3VLConfig,
    choices: ModelBuildOptions,
    *,
    pixel_norm: PixelNorm,
    device: str,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> Qwen3VLModel:
    """Assemble the model from megatron-core specs, with uninitialised parameters.

    Called under ``torch.device("meta")`` it allocates nothing.

    Args:
        geometry: the shape, from the Hugging Face config.
        choices: implementations and frozen parts.
        pixel_norm: how uint8 pixels become the tower's input.
        device: kind of device (``Backend.name``) whose kernels are plugged in.
        dtype: of the parameters.
        compute_dtype: what it will compute in, by which kernels are chosen.

    Raises:
        UserError: if an implementation is not available on the device, or the geometry wants something unsupported.
    """
    prepare_megatron()
    if model_config.text.attention_bias:
        raise UserError("config.json has attention_bias true; Qwen3-VL's decoder has no attention bias")
    by_compiler = choices.compile_small_operators
    if by_compiler:
        check_compiler(device=device)
    experts = expert_kernel_name(
        fused=choices.fused_experts,
        hidden_size=model_config.text.hidden_size,
        intermediate_size=model_config.text.moe_intermediate_size,
        device=device,
        dtype=compute_dtype,
    )
    kernels = Kernels(
        text_attention=attention_kernel(choices.text_attention, device=device),
        vision_attention=attention_kernel(choices.vision_attention, device=device),
        experts=expert_kernel(experts, device=device, compiled=by_compiler),
        rows=token_permuter(IndexPermuter(combine_kernel(device=device)), fused=choices.fused_experts, device=device),
        rms_norm=rms_norm_kernel(device=device, compiled=by_compiler),
        rotary=rotary_kernel(device=device, compiled=by_compiler),
    )
    of_vision, of_text = vision_config(model_config.vision, dtype), text_config(model_config.text, dtype)
    text_decoder = TextDecoder(
        model_config.text,
        of_text,
        [decoder_layer_spec(model_config.text, layer, kernels) for layer in range(model_config.text.num_layers)],
        rms_norm_spec(kernels),
        loss_chunk_size=choices.loss_chunk_size,
    )
    image_encoder = ImageEncoder(
        VisionEncoder(model_config.vision, of_vision, vision_layer_spec(kernels), pixel_norm),
        VisionProjector(model_config.vision, of_vision),
    )
    model = Qwen3VLModel(image_encoder, text_decoder)
    _freeze(model, choices)
    _set_policies(model, choices, device=device)
    return model


def _set_policies(model: Qwen3VLModel, choices: ModelBuildOptions, *, device: str) -> None:
    """Tell both stacks what to keep for backward and when to wait, and the routers what to report."""
    encoder, decoder = model.image_encoder.vision_encoder, model.text_decoder
    recompute = {
        "recompute": choices.recompute,
        "method": choices.recompute_method,
        "num_layers": choices.recompute_num_layers,
    }
    wait = synchronizer(device=device)
    encoder.policy = ActivationCheckpointPolicy(
        **recompute, after_layer=wait if choices.synchronize_vision_layers else None
    )
    decoder.policy = ActivationCheckpointPolicy(
        **recompute,
        after_layer=wait if choices.synchronize_text_layers else None,
        offload=host_offload(device=device) if choices.offload_activations else None,
    )
    if choices.recompute == "selective":
        recompute_selectively([*encoder.layers, *decoder.layers])
    if choices.router_load:
        decoder.keep_router_load()


def _freeze(model: Qwen3VLModel, choices: ModelBuildOptions) -> None:
    encoder = model.image_encoder
    parts = (
        (encoder.vision_encoder, choices.freeze_vision_encoder),
        (encoder.vision_projector, choices.freeze_vision_projector),
        (model.text_decoder, choices.freeze_text_decoder),
    )
    if all(frozen for _, frozen in parts):
        raise UserError("the model file freezes vision_encoder, vision_projector and text_decoder; unfreeze one")
    for part, frozen in parts:
        part.requires_grad_(not frozen)
    encoder.encoder_trains = not choices.freeze_vision_encoder
    encoder.projector_trains = not choices.freeze_vision_projector
