"""Linear layers for megatron-core's specs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Linear(nn.Linear):
    """The column- and row-parallel slots on one tensor-parallel rank: ``y = x W^T + b`` -> ``(y, None)``.

    The bias is added within the product instead of being returned (``skip_bias_add``), which saves a pass over the
    activations in every layer of the vision tower.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **slot_arguments: Any
    ) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> ([..., output_size], None)."""
        return F.linear(hidden, self.weight, self.bias), None
