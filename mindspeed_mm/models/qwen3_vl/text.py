"""Text decoder.

Legend: T tokens of the packed sequence, H hidden width, M merged patches, V vocabulary, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.attention import Segments
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy, run_layers
from mindspeed_mm.models.layers.attention import PackedSequence, RotaryAngles
from mindspeed_mm.models.layers.loss_head import LossHead
from mindspeed_mm.models.layers.moe import MoELayer, RouterLoad
from mindspeed_mm.models.layers.rotary import TextRotary
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLTextConfig


class Embedding(nn.Module):
    """Word embeddings; ``word_embeddings.weight`` [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return self.word_embeddings(input_ids)


class TextDecoder(nn.Module):
    """Embeddings, decoder layers with deepstack additions, final norm and the loss head."""

    def __init__(
        self,
        model_config: Qwen3VLTextConfig,
        config: TransformerConfig,
        layer_specs: Sequence[ModuleSpec],
        final_norm: ModuleSpec,
        *,
        loss_chunk_size: int | None,
    ) -> None:
        """``loss_chunk_size``: see :class:`LossHead`."""
        super().__init__()
        self.model_config = model_config
        self.embedding = Embedding(model_config.vocab_size, model_config.hidden_size, dtype=config.params_dtype)
        self.rotary = TextRotary(model_config.head_dim, model_config.rope_theta, model_config.mrope_section)
        self.layers = nn.ModuleList(
            build_module(spec, config=config, layer_number=index + 1) for index, spec in enumerate(layer_specs)
        )
        self.final_layernorm = build_module(
            final_norm, config=config, hidden_size=model_config.hidden_size, eps=model_config.rms_norm_eps
        )
        self.output_layer = LossHead(
            model_config.hidden_size,
            model_config.vocab_size,
            chunk_size=loss_chunk_size,
            dtype=config.params_dtype,
            tied=model_config.tie_word_embeddings,
        )
        self.policy = ActivationCheckpointPolicy()

    @property
    def tied_weight(self) -> Tensor | None:
        """[V, H] word embeddings where the output layer is made of them, else None."""
        return self.embedding.word_embeddings.weight if self.model_config.tie_word_embeddings else None

    def keep_router_load(self) -> None:
        """From now on the routers' load is part of what forward returns."""
        for layer in self.layers:
            if isinstance(layer.mlp, MoELayer):
                layer.mlp.router.keeps_routing = True

    def forward(
        self, batch: Batch, embeddings: Tensor, deepstack: Sequence[Tensor]
    ) -> tuple[Tensor, RouterLoad | None]:
        """Hidden states after the final norm.

        Args:
            batch: the packed micro-batch.
            embeddings: [M, H] that replace the placeholders' word embeddings.
            deepstack: each [M, H]; the i-th is added at the placeholders after layer i.

        Returns:
            ([T, H], the routers' load summed over the layers, or None where it is not kept).
        """
        hidden = self.embedding(batch.input_ids)
        if batch.vision.is_dummy:
            # The vision tower takes part in every micro-batch, so that all ranks run the same collectives.
            hidden = hidden + sum((state.sum() for state in deepstack), embeddings.sum()) * 0
            deepstack = ()
        else:
            hidden = hidden.index_copy(0, batch.vision.placeholder_index, embeddings.to(hidden.dtype))
        angles = RotaryAngles(*self.rotary(batch.position_ids, hidden.dtype))
        segments = Segments(batch.cu_seqlens, batch.cu_seqlens_host, batch.max_seqlen)
        packed = PackedSequence(segments=segments, angles=angles)
        counted = batch.input_ids.shape[0] - batch.padding

        def step(index: int, hidden: Tensor) -> tuple[Tensor, ...]:
            return run_layer(self.layers[index], hidden, packed, counted=counted)

        def add_deepstack(index: int, hidden: Tensor) -> Tensor:
            if index >= len(deepstack):
                return hidden
            addition = deepstack[index].to(hidden.dtype).unsqueeze(1)
            return hidden.index_add(0, batch.vision.placeholder_index, addition)

        hidden, *loads = run_layers(self.layers, hidden.unsqueeze(1), step, self.policy, between=add_deepstack)
        load = RouterLoad(sum(loads[0::2]), sum(loads[1::2])) if loads else None
        return self.final_layernorm(hidden.squeeze(1)), load


def run_layer(layer: nn.Module, hidden: Tensor, packed: PackedSequence, *, counted: int) -> tuple[Tensor, ...]:
    """One decoder layer: [T, 1, H] -> [T, 1, H], and the two tensors of its router's load where that is kept.

    Args:
        layer: megatron-core's.
        hidden: what it takes.
        packed: what its attention needs to know.
        counted: leading tokens that the load counts; those after them are padding.
    """
    load = None
    try:
        hidden, _ = layer(hidden, packed_seq_params=packed)
    finally:
        # also where recomputation stops half-way, or the router would hold on to its graph
        if isinstance(layer.mlp, MoELayer):
            load = layer.mlp.router.take_load(counted)
    return (hidden,) if load is None else (hidden, *load)
