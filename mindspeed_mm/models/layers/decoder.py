"""Decoder: word embeddings, a stack of layers, final norm and loss head.

Legend: T tokens of the packed sequence, H hidden width, V vocabulary, S target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.attention import Segments
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.activation_checkpoint import (
    ActivationCheckpointPolicy,
    recompute_selectively,
    run_layers,
)
from mindspeed_mm.models.layers.attention import PackedSequence, RotaryAngles
from mindspeed_mm.models.layers.config import DecoderConfig
from mindspeed_mm.models.layers.loss_head import LossHead
from mindspeed_mm.models.layers.moe import MoELayer, RouterLoad
from mindspeed_mm.models.layers.specs import Kernels, decoder_config, decoder_layer_spec, rms_norm_spec
from mindspeed_mm.models.model import ModelOutput
from mindspeed_mm.models.spec import ModelBuildOptions


class Embedding(nn.Module):
    """Word embeddings; ``word_embeddings.weight`` [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return self.word_embeddings(input_ids)


class Decoder(nn.Module):
    """A decoder over packed sequences."""

    def __init__(
        self,
        model_config: DecoderConfig,
        kernels: Kernels,
        rotary: nn.Module,
        *,
        options: ModelBuildOptions,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        """Build from megatron-core specs.

        Args:
            model_config: of the decoder.
            kernels: that its layers use.
            rotary: (position ids, dtype) -> cos and sin [T, 1, D].
            options: the user's choices.
            device: kind of device (``Backend.name``).
            dtype: of the parameters.
        """
        super().__init__()
        config = decoder_config(model_config, dtype)
        self.model_config = model_config
        self.embedding = Embedding(model_config.vocab_size, model_config.hidden_size, dtype=dtype)
        self.rotary = rotary
        self.layers = nn.ModuleList(
            build_module(decoder_layer_spec(model_config, index, kernels), config=config, layer_number=index + 1)
            for index in range(model_config.num_layers)
        )
        self.final_layernorm = build_module(
            rms_norm_spec(kernels), config=config, hidden_size=model_config.hidden_size, eps=model_config.rms_norm_eps
        )
        self.output_layer = LossHead(
            model_config.hidden_size,
            model_config.vocab_size,
            chunk_size=options.loss_chunk_size,
            dtype=dtype,
            tied=model_config.tie_word_embeddings,
            cross_entropy=kernels.cross_entropy,
        )
        self.policy = ActivationCheckpointPolicy.from_options(
            options,
            device=device,
            synchronize_per_layer=options.text_synchronize_per_layer,
            activation_offload=options.activation_offload,
        )
        if options.recompute_granularity == "selective":
            recompute_selectively(self.layers)
        for layer in self.moe_layers():
            layer.router.keeps_probabilities = options.router_load

    @property
    def tied_weight(self) -> Tensor | None:
        """[V, H] word embeddings where they are the output layer's weight too, else None."""
        return self.embedding.word_embeddings.weight if self.model_config.tie_word_embeddings else None

    def moe_layers(self) -> list[MoELayer]:
        """The sparse feed-forward layers."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]

    def root_group(self) -> list[nn.Module]:
        """Norms and routers of the layers: many tensors, and next to nothing of a layer's memory."""
        found = []
        for layer in self.layers:
            attention = layer.self_attention
            norms = (layer.input_layernorm, attention.q_layernorm, attention.k_layernorm, layer.pre_mlp_layernorm)
            found += [norm for norm in norms if norm is not None]
            if isinstance(layer.mlp, MoELayer):
                found.append(layer.mlp.router)
        return found

    def run_layers(
        self, hidden: Tensor, batch: Batch, *, between: Callable[[int, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, RouterLoad | None]:
        """All layers and the final norm.

        Args:
            hidden: [T, H] embeddings.
            batch: the packed micro-batch.
            between: see :func:`~mindspeed_mm.models.layers.activation_checkpoint.run_layers`.

        Returns:
            ([T, H], the routers' load, or None without a sparse layer).
        """
        packed = PackedSequence(
            segments=Segments(batch.cu_seqlens, batch.cu_seqlens_host, batch.max_seqlen),
            angles=RotaryAngles(*self.rotary(batch.position_ids, hidden.dtype)),
        )
        counted = batch.input_ids.shape[0] - batch.padding

        def step(index: int, hidden: Tensor) -> tuple[Tensor, ...]:
            return _run_layer(self.layers[index], hidden, packed, counted=counted)

        hidden, *loads = run_layers(self.layers, hidden.unsqueeze(1), step, self.policy, between=between)
        load = _whole_load(loads, len(self.moe_layers()))
        return self.final_layernorm(hidden.squeeze(1)), load

    def output(
        self, hidden: Tensor, load: RouterLoad | None, batch: Batch, loss_weight: Tensor | None
    ) -> ModelOutput | Tensor:
        """See :meth:`mindspeed_mm.models.model.Model.forward`; ``hidden`` [T, H] comes from the final norm."""
        predicting = hidden.index_select(0, batch.label_index)
        tied = self.tied_weight
        if loss_weight is None:
            return self.output_layer(predicting, tied_weight=tied)
        loss, token_losses, predicted = self.output_layer(predicting, batch.labels, loss_weight, tied_weight=tied)
        return ModelOutput(loss, token_losses, load, predicted)


def _run_layer(layer: nn.Module, hidden: Tensor, packed: PackedSequence, *, counted: int) -> tuple[Tensor, ...]:
    """One decoder layer: [T, 1, H] -> [T, 1, H], and what :meth:`MoELayer.take_load` gives.

    Args:
        layer: megatron-core's.
        hidden: its input.
        packed: segments and rotary angles of the sequence.
        counted: leading tokens that the load counts; those after them are padding.
    """
    load: tuple[Tensor, ...] = ()
    try:
        hidden, _ = layer(hidden, packed_seq_params=packed)
    finally:
        # also where recomputation stops half-way, or the router would hold on to its graph
        if isinstance(layer.mlp, MoELayer):
            load = layer.mlp.take_load(counted)
    return hidden, *load


def _whole_load(loads: Sequence[Tensor], layers: int) -> RouterLoad | None:
    """The tensors of all sparse layers, one or two of each, as one load."""
    if not loads:
        return None
    each = len(loads) // layers
    return RouterLoad(torch.stack(loads[::each]), sum(loads[1::2]) if each == 2 else None)
