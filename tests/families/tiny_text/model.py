"""The tiny text model: the shared decoder and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.backend.megatron import prepare_megatron
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.attention import CoreAttention
from mindspeed_mm.models.layers.decoder import Decoder
from mindspeed_mm.models.layers.rotary import TextRotary
from mindspeed_mm.models.layers.specs import decoder_kernels
from mindspeed_mm.models.model import Model, ModelOutput, ParallelPlan
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.families.tiny_text.config import TinyTextConfig


class TinyTextModel(Model):
    """See :class:`~mindspeed_mm.models.model.Model`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: Batch, loss_weight: Tensor | None = None) -> ModelOutput | Tensor:
        """See :class:`~mindspeed_mm.models.model.Model`."""
        hidden, load = self.decoder.run_layers(self.decoder.embedding(batch.input_ids), batch)
        return self.decoder.output(hidden, load, batch, loss_weight)

    def parallel_plan(self) -> ParallelPlan:
        """See :class:`~mindspeed_mm.models.model.Model`."""
        decoder = self.decoder
        return ParallelPlan(
            wrap_units=[decoder.embedding, *decoder.layers, decoder.output_layer],
            root_group=decoder.root_group(),
            attention=[module for module in self.modules() if isinstance(module, CoreAttention)],
        )


def build_model(
    config: TinyTextConfig, options: ModelBuildOptions, *, device: str, dtype: torch.dtype, compute_dtype: torch.dtype
) -> TinyTextModel:
    """See :meth:`mindspeed_mm.models.spec.ModelSpec.build_model`."""
    prepare_megatron()
    kernels = decoder_kernels(config, options, device=device, dtype=compute_dtype)
    rotary = TextRotary(config.head_dim, config.rope_theta, (config.head_dim // 2, 0, 0))
    return TinyTextModel(Decoder(config, kernels, rotary, options=options, device=device, dtype=dtype))
