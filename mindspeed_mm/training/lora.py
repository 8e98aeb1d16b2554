"""The adapters of a run: added to the model, filled at its start, and exported with each checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mindspeed_mm.checkpoint.adapter_formats import adapter_bytes, write_adapter
from mindspeed_mm.checkpoint.adapters import AdapterDirectory
from mindspeed_mm.checkpoint.directory import ADAPTER
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import Adapter, LoraOptions, describe, is_adapter
from mindspeed_mm.models.parameter_rules import ParameterRule
from mindspeed_mm.models.spec import ModelConfig, ModelSpec
from mindspeed_mm.training.initialization import copy_adapters, initialize_adapters

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoraRun:
    """The adapters of a run.

    Attributes:
        options: of the run.
        adapters: all of the model.
        spec: of the model.
        model_config: of the model.
    """

    options: LoraOptions
    adapters: tuple[Adapter, ...]
    spec: ModelSpec
    model_config: ModelConfig

    @classmethod
    def of(
        cls, args: TrainingArgs, spec: ModelSpec, model_config: ModelConfig, rules: list[ParameterRule]
    ) -> LoraRun | None:
        """The adapters that the flags describe; None for full fine-tuning.

        Raises:
            UserError: see :meth:`ModelSpec.adapters`.
        """
        options = LoraOptions.from_args(args)
        if options is None:
            return None
        return cls(options, spec.adapters(model_config, options, rules), spec, model_config)

    def attach(self, model: nn.Module) -> None:
        """Add the adapters, uninitialised, to a model that is not yet sharded; says what is adapted."""
        rules = self.spec.weight_rules(self.model_config, expert_layout="hub")
        attach_adapters(model, self.adapters, rules)
        for line in describe(self.adapters, rules, self.spec.adapter_groups):
            logger.info(line)

    def initialize(self, model: nn.Module, *, seed: int, init_from: str | None) -> None:
        """Fill the adapters of a sharded model: from a PEFT directory, or so that they change nothing yet.

        Raises:
            UserError: if the directory has other adapters than the run.
        """
        if init_from is None:
            initialize_adapters(model, self.adapters, seed=seed)
            logger.info(f"initialized the adapters (--seed {seed}): A at random, B with zeros")
            return
        copy_adapters(model, self.adapters, self.open(init_from).read)
        logger.info(f"loaded the adapters of {init_from}")

    def open(self, directory: str) -> AdapterDirectory:
        """The adapters of a PEFT directory (``--lora-init-from``).

        Raises:
            UserError: if it cannot be read, or has other adapters than the run.
        """
        source = AdapterDirectory(Path(directory), self.spec, self.model_config)
        theirs = {a.module: a for a in source.adapters}
        ours = {a.module: a for a in self.adapters}
        for module in theirs.keys() ^ ours.keys():
            holder = directory if module in theirs else "--lora-target-modules"
            raise UserError(
                f"--lora-init-from {directory}: only {holder} adapts {module}; name the same weights in "
                "--lora-target-modules"
            )
        for module, adapter in ours.items():
            other = theirs[module]
            # an rsLoRA scale is written as alpha, whose root of the rank may come back with another last bit
            if other.rank != adapter.rank or not math.isclose(other.scale, adapter.scale, rel_tol=1e-9):
                raise UserError(
                    f"--lora-init-from {directory}: {module} has rank {other.rank} and scale {other.scale:g}, and the "
                    f"flags give rank {adapter.rank} and scale {adapter.scale:g}; set --lora-r, --lora-expert-r, "
                    "--lora-alpha and --lora-use-rslora so that they agree (scale = alpha / rank)"
                )
        return source

    def is_all_that_is_saved(self, names: Collection[str]) -> bool:
        """Whether a PEFT directory has all that checkpoints hold over their base; says so if it has not.

        Args:
            names: of the parameters in the checkpoints.
        """
        in_full = sum(not is_adapter(name) for name in names)
        if in_full:
            logger.warning(
                f"checkpoints get no {ADAPTER} directory for PEFT, which could not hold the {in_full} parameters that "
                "were trained in full; make a whole model of a checkpoint with mm-convert merge_lora"
            )
        return not in_full

    def export(self, checkpoint: Path, *, base: str) -> None:
        """Write the PEFT directory into a checkpoint whose tensors are on disk; ``base``: what it is laid over."""
        reader = CheckpointReader(checkpoint)
        directory = checkpoint / ADAPTER
        directory.mkdir()
        weights = {
            name: shape for rule in self.spec.weight_rules(self.model_config, expert_layout="hub")
            for name, shape in rule.sources
        }
        write_adapter(
            directory, self.adapters, lambda name: reader.read(MODEL_PREFIX + name), base=base, weights=weights
        )

    @property
    def export_bytes(self) -> int:
        """Size of the PEFT directory."""
        return adapter_bytes(self.adapters, "peft")

    def recorded(self) -> Mapping[str, Any]:
        """What checkpoints record."""
        return self.options.recorded()
