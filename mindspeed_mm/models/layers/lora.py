"""Adapters in a model: added to its layers, and filled with their initial values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from mindspeed_mm.models.layers.linear import AdaptableLinear, LinearAdapters
from mindspeed_mm.models.layers.moe import Experts
from mindspeed_mm.models.lora import Adapter
from mindspeed_mm.models.state_dict import WeightRule


def attach_adapters(model: nn.Module, adapters: Sequence[Adapter], rules: Sequence[WeightRule]) -> None:
    """Add adapters to a model, in place, with uninitialised fp32 factors on the device of their base weights.

    Args:
        model: not yet sharded, on the meta device or another.
        adapters: of the model.
        rules: of the model, in the published expert layout.
    """
    by_base: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_base[adapter.base].append(adapter)
    rule_of = {rule.target: rule for rule in rules}
    for base, of_base in by_base.items():
        module = model.get_submodule(base.rpartition(".")[0])
        if isinstance(module, Experts):
            module.add_adapter(of_base[0])
        elif isinstance(module, AdaptableLinear):
            module.adapters = LinearAdapters(of_base, rule_of[base], device=module.weight.device)
        else:
            raise TypeError(f"{base} belongs to a {type(module).__name__}, which takes no adapters")
