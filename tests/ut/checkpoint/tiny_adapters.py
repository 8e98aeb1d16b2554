"""Random LoRA adapters of tiny models, and a checkpoint of a LoRA run that holds them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor

from mindspeed_mm.checkpoint.adapter_formats import write_adapter
from mindspeed_mm.checkpoint.directory import MODEL_CONFIG_KEY, iteration_name, write_tracker
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base
from mindspeed_mm.models.lora import LORA_KEY, Adapter, LoraOptions
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.spec import get_spec
from mindspeed_mm.models.state_dict import hf_shapes
from tests.helpers.checkpoint_directory import commit_directory

PEFT_FORMS = ("peft", "peft-transformers4") if transformers.__version__ >= "5" else ("peft-transformers4", "peft")
"""The form that PEFT reads with the installed transformers, and the other one."""


def options(**changes: Any) -> LoraOptions:
    """Ranks that are no multiples of 8 and differ, so that nothing fits by accident."""
    return LoraOptions(**{"targets": ("all",), "r": 6, "alpha": 12.0, "expert_r": 3, **changes})


class TinyAdapters:
    """Random adapters of a model."""

    def __init__(
        self, config: Mapping[str, Any], lora: LoraOptions | None = None, *, seed: int = 0, size: float = 0.1
    ) -> None:
        """``config``: of ``config.json``; ``size``: standard deviation of the factors."""
        self.model_config = Qwen3VLConfig.from_config(dict(config))
        self.spec = get_spec(self.model_config.model_type)
        self.options = lora or options()
        self.adapters = self.spec.adapters(self.model_config, self.options)
        generator = torch.Generator().manual_seed(seed)
        self.factors = {
            name: torch.randn(shape, generator=generator) * size
            for adapter in self.adapters for name, shape in adapter.shapes.items()
        }
        self.rules = self.spec.weight_rules(self.model_config, expert_layout="hub")
        self.weights = hf_shapes(self.rules)

    def write(self, directory: Path, form: str = "peft") -> Path:
        """A directory of adapters."""
        directory.mkdir(parents=True)
        write_adapter(directory, self.adapters, self.factors.__getitem__, form=form, base=None, weights=self.weights)
        return directory

    def save(
        self, root: Path, base: Path, *, others: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """A checkpoint of a LoRA run, with a tracker file; ``others``: parameters that trained in full."""
        target = root / iteration_name(7)
        base_facts = dataclasses.asdict(Base.of(base, "--load"))
        metadata = {
            **(metadata or {}), "iteration": 7, BASE_KEY: base_facts, LORA_KEY: self.options.recorded(),
            MODEL_CONFIG_KEY: dataclasses.asdict(self.model_config),
        }
        tensors = {MODEL_PREFIX + name: tensor for name, tensor in (self.factors | dict(others or {})).items()}
        with warnings.catch_warnings(), commit_directory(target, metadata) as partial:
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial))
        write_tracker(root, 7)
        return target

    def deltas(self) -> dict[str, Tensor]:
        """Name of each adapted Hugging Face tensor in the published layout -> what is added to it, in fp32."""
        return {adapter.source[0]: delta(adapter, *(self.factors[name] for name in adapter.names))
                for adapter in self.adapters}


def delta(adapter: Adapter, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """[out, in], or of experts [E, in, out]."""
    if adapter.is_experts:
        return torch.einsum("eir,eor->eio", lora_a, lora_b) * adapter.scale
    return lora_b @ lora_a * adapter.scale


def edit_config(directory: Path, **fields: Any) -> None:
    """Set fields of ``adapter_config.json``."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
