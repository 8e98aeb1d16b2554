"""Normalisation layers for megatron-core's specs. Legend: H hidden width."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.elementwise import RMSNormKernel


class RMSNorm(nn.Module):
    """RMSNorm slot; the kernel comes with the spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, kernel: RMSNormKernel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.kernel = kernel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.kernel(hidden, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm slot."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
