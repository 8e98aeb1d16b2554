"""Our model with the weights of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.interfaces.media import PixelNorm
from mindspeed_mm.models.parameter_rules import ParameterRule, Settings, apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel, build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.models.state_dict import ExpertLayout

PIXEL_NORM = PixelNorm(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale_factor=1 / 255)


def memory_layout() -> ExpertLayout:
    """Which way round the installed transformers holds experts in memory."""
    import transformers

    return "v5" if int(transformers.__version__.split(".")[0]) >= 5 else "hub"


def to_mcore(model_config: Qwen3VLConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Hugging Face names -> under ours."""
    rules = weight_rules(model_config, expert_layout=memory_layout())
    return {rule.target: rule.to_mcore([tensors[name] for name, _ in rule.sources]) for rule in rules}


def model_like(
    hf_model: Any, choices: ModelBuildOptions | None = None, *, device: str = "cpu",
    compute_dtype: torch.dtype = torch.float32, frozen: Sequence[str] = (),
) -> tuple[Qwen3VLModel, Qwen3VLConfig]:
    """Build our model for ``hf_model``'s config, with ``device``'s kernels for ``compute_dtype``, and its weights.

    ``frozen``: parts that do not train.
    """
    model_config = Qwen3VLConfig.from_config(hf_model.config.to_dict())
    model = build_model(
        model_config, choices or ModelBuildOptions(), pixel_norm=PIXEL_NORM, device=device, compute_dtype=compute_dtype
    )
    weights = to_mcore(model_config, hf_model.state_dict())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    apply_settings(model, part_settings(model_config, frozen))
    return model.to(device), model_config


def part_settings(
    model_config: Qwen3VLConfig, frozen: Sequence[str] = (), *, dtype: str = "fp32", muon: bool = False
) -> Settings:
    """Settings of all parameters where some parts do not train, and are kept in ``dtype``."""
    globs = [glob for part in frozen for glob in SPEC.parts[part]]
    rules = [ParameterRule(pattern=glob, source="test", trainable=False, dtype=dtype) for glob in globs]
    return SPEC.parameter_settings(model_config, rules, muon=muon)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())
