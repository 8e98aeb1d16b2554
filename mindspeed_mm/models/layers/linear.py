"""Linear layers, with and without adapters.

Legend: T rows, r rank of an adapter, R sum of the ranks of a layer's adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.models.lora import Adapter
from mindspeed_mm.models.state_dict import WeightRule


class LinearAdapter(nn.Module):
    """The factors of one adapter: ``lora_A`` [r, in] and ``lora_B`` [out, r]."""

    def __init__(self, adapter: Adapter, *, device: torch.device) -> None:
        super().__init__()
        for name, shape in zip(("lora_A", "lora_B"), adapter.shapes.values(), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))


class LinearAdapters(nn.ModuleDict):
    """The adapters of one layer, by :attr:`Adapter.key`: one for each Hugging Face weight that it holds.

    They are computed as one. The B of q, k and v, say, become the blocks of one matrix [out, R], whose rows the rule
    of the base weight brings into its order.
    """

    def __init__(self, adapters: list[Adapter], rule: WeightRule, *, device: torch.device) -> None:
        super().__init__({adapter.key: LinearAdapter(adapter, device=device) for adapter in adapters})
        self._scale = adapters[0].scale
        by_source = {adapter.source[0]: adapter for adapter in adapters}
        self._rule = rule
        # for each source of the rule: its adapter, or the number of rows that have none
        self._blocks = [by_source[name].key if name in by_source else shape[0] for name, shape in rule.sources]

    def forward(self, rows: Tensor, output: Tensor) -> Tensor:
        """rows [T, in], output [T, out] -> output + scale * (rows A^T) B^T; ``output`` is overwritten."""
        first = torch.cat([self[key].lora_A for key in self])
        blocks, start = [], 0
        for block in self._blocks:
            if isinstance(block, int):
                blocks.append(rows.new_zeros(block, first.shape[0]))
                continue
            lora_b = self[block].lora_B
            end = start + lora_b.shape[1]
            blocks.append(F.pad(lora_b, (start, first.shape[0] - end)))
            start = end
        second = blocks[0] if self._rule.is_copy else self._rule.transform.to_mcore(blocks)
        return output.addmm_(F.linear(rows, first), second.t(), alpha=self._scale)


class AdaptableLinear(nn.Linear):
    """``y = x W^T + b``, to which adapters can be added.

    Attributes:
        adapters: None for none.
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool = True, dtype: torch.dtype) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=dtype)
        self.adapters: LinearAdapters | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.adapters is None:
            return F.linear(hidden, self.weight, self.bias)
        rows = hidden.flatten(0, -2)
        output = self.adapters(rows, F.linear(rows, self.weight, self.bias))
        # no view where none is needed: FSDP2 warns of modules that return one
        return output if hidden.dim() == 2 else output.view(*hidden.shape[:-1], -1)


class Linear(AdaptableLinear):
    """The column- and row-parallel slots on one tensor-parallel rank: ``x`` -> ``(y, None)``.

    The bias is added within the product instead of being returned (``skip_bias_add``), which saves a pass over the
    activations in every layer of the vision tower.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **slot_arguments: Any
    ) -> None:
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[..., in] -> ([..., out], None)."""
        return super().forward(hidden), None
