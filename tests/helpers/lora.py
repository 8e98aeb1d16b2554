"""A Hugging Face model with PEFT's adapters, and our model with the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import Adapter, LoraOptions
from mindspeed_mm.models.parameter_rules import ParameterRule, Settings, apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.mcore_model import model_like

PREFIX = "base_model.model."


def adapted_by_peft(hf_model: Any, options: LoraOptions, *, seed: int = 1, spread: float = 0.2) -> Any:
    """The model within PEFT, with random factors, none of them zero."""
    import peft

    model_config = Qwen3VLConfig.from_config(hf_model.config.to_dict())
    adapters = SPEC.adapters(model_config, options)
    experts = [a.module for a in adapters if a.is_experts]
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        use_rslora=options.use_rslora,
        lora_dropout=0.0,
        target_modules=[a.module for a in adapters if not a.is_experts] or ["none"],
        target_parameters=experts or None,
        rank_pattern=dict.fromkeys(experts, options.expert_r),
    )
    if not config.target_modules - {"none"}:
        config.target_modules = set()
    model = peft.get_peft_model(hf_model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def of_peft(adapters: Sequence[Adapter], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Our names -> PEFT's factors, or their gradients.

    Args:
        adapters: of the model.
        get: gives a tensor of PEFT's by its name, without the name of the adapter.
    """
    found = {}
    for adapter in adapters:
        name_a, name_b = adapter.names
        module = PREFIX + adapter.module
        if not adapter.is_experts:
            found[name_a], found[name_b] = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
            continue
        holder, _, weight = module.rpartition(".")
        holder += ".base_layer" if weight == "gate_up_proj" else ""
        experts = adapter.source[1][0]
        flat_a, flat_b = get(f"{holder}.lora_A.weight"), get(f"{holder}.lora_B.weight")
        found[name_a] = flat_a.view(experts, adapter.rank, -1).transpose(1, 2)  # row e * r + j
        found[name_b] = flat_b.view(-1, adapter.rank, experts).permute(2, 0, 1)  # column j * E + e
    return found


def factors_of(model: Any, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The factors of a PEFT model under our names."""
    parameters = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    return of_peft(adapters, lambda name: parameters[name].detach())


def gradients_of(model: Any, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Their gradients."""
    parameters = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    return of_peft(adapters, lambda name: parameters[name].grad)


def adapted_at_random(
    hf_model: Any, options: LoraOptions, *, dtype: str, spread: float = 0.2, **keywords: Any
) -> tuple[Qwen3VLModel, Settings]:
    """Our model with random factors, none of them zero, and a base that is kept in ``dtype``."""
    model_config = Qwen3VLConfig.from_config(hf_model.config.to_dict())
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: torch.randn(shape, generator=generator) * spread
        for adapter in SPEC.adapters(model_config, options) for name, shape in adapter.shapes.items()
    }
    model, _ = adapted_like(hf_model, factors, options, **keywords)
    rules = [ParameterRule(pattern="*", source="test", frozen_only=True, dtype=dtype)]
    settings = SPEC.parameter_settings(model_config, rules, lora=options)
    apply_settings(model, settings)
    return model, settings


def adapted_like(
    hf_model: Any, factors: Mapping[str, Tensor], options: LoraOptions, choices: ModelBuildOptions | None = None,
    **keywords: Any,
) -> tuple[Qwen3VLModel, Qwen3VLConfig]:
    """Our model with the weights of ``hf_model``, which has no adapters, and these factors."""
    model, model_config = model_like(hf_model, choices, **keywords)
    adapters = SPEC.adapters(model_config, options)
    attach_adapters(model, adapters, SPEC.weight_rules(model_config, expert_layout="hub"))
    apply_settings(model, SPEC.parameter_settings(model_config, lora=options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.copy_(factors[name])
    return model, model_config
