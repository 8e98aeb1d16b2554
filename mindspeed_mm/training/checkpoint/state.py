"""What a training checkpoint holds: parameters, AdamW's moments, random generators, and where the run stands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.checkpoint import directory
from mindspeed_mm.training.optimizer import initialise_state

PROGRESS_FILE = "progress.json"
MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples consumed by them.
        schedule: state of the learning-rate schedule, None before the first step.
        seed: that decided the order of the samples.
        samples_per_epoch: length of that order.
    """

    iteration: int = 0
    consumed_samples: int = 0
    schedule: dict[str, Any] | None = None
    seed: int | None = None
    samples_per_epoch: int | None = None

    @staticmethod
    def is_training(path: Path) -> bool:
        """Whether ``path`` was written by training; a converted checkpoint (``release``) was not."""
        return (path / PROGRESS_FILE).is_file()

    @classmethod
    def read(cls, path: Path) -> Progress:
        """From a checkpoint directory; a converted one starts at iteration 0."""
        return cls(**json.loads((path / PROGRESS_FILE).read_text())) if cls.is_training(path) else cls()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.<name>`` -> parameter, sharded as it is."""
    return {MODEL + name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimizer.<parameter name>.<exp_avg | exp_avg_sq | step>`` -> tensor."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def rng_state(backend: Backend, rank: int) -> dict[str, Tensor]:
    """``rng.<rank>.<device>`` -> uint8 state of this rank's generators."""
    return {f"{RNG}{rank}.{device}": state for device, state in backend.rng_state().items()}


def save_checkpoint(
    root: Path,
    *,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    backend: Backend,
    with_rng: bool,
    metadata: Mapping[str, Any],
) -> Path:
    """Write ``root/iter_XXXXXXX`` and point the tracker at it. Called by all ranks together.

    Args:
        root: the ``--save`` directory.
        progress: where the run stands.
        model: sharded model.
        optimizer: None to leave its state out (``--no-save-optim``).
        backend: whose generators are saved.
        with_rng: whether to save them (``--no-save-rng`` leaves them out).
        metadata: recorded in the manifest.

    Returns:
        The directory written.

    Raises:
        UserError: on all ranks, if writing failed; the previous checkpoint is untouched.
    """
    rank = dist.get_rank()
    target = Path(root) / directory.iteration_name(progress.iteration)
    state = model_state(model)
    if optimizer is not None:
        state.update(optimizer_state(model, optimizer))
    if with_rng:
        state.update(rng_state(backend, rank))
    temporary = _on_main(lambda: directory.prepare_directory(target, overwrite=True))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary))

    def commit() -> None:
        (Path(temporary) / PROGRESS_FILE).write_text(json.dumps(dataclasses.asdict(progress), indent=1))
        directory.finish_directory(temporary, target, metadata=dict(metadata), overwrite=True)
        directory.write_tracker(root, progress.iteration)

    _on_main(commit)
    return target


def _on_main(action: Any) -> Any:
    """Run on rank 0 and hand its result, or its failure, to every rank, so that none waits for a rank that raised."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, UserError) as error:
            outcome[1] = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(f"the checkpoint could not be written: {outcome[1]}")
    return outcome[0]


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    backend: Backend,
    with_rng: bool,
) -> Progress:
    """Read a checkpoint directory into the model, in place. Called by all ranks together.

    Args:
        path: ``release`` or ``iter_XXXXXXX`` directory.
        model: sharded, with storage.
        optimizer: None to leave its state as it is (``--no-load-optim``, or a converted checkpoint).
        backend: whose generators are restored.
        with_rng: whether to restore them.

    Raises:
        UserError: if the checkpoint is of another model, with the first differences; or lacks what was asked for.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = model_state(model)
    _compare(path, state, {name: entry for name, entry in stored.items() if name.startswith(MODEL)})
    if optimizer is not None:
        if not any(name.startswith(OPTIMIZER) for name in stored):
            raise UserError(
                f"{path} holds no optimizer state (saved with --no-save-optim?); "
                "add --no-load-optim to start AdamW's moments from zero"
            )
        initialise_state(optimizer)
        moments = optimizer_state(model, optimizer)
        _compare(path, moments, {name: entry for name, entry in stored.items() if name.startswith(OPTIMIZER)})
        state.update(moments)
    generators = rng_state(backend, dist.get_rank()) if with_rng else {}
    if with_rng and not any(name.startswith(RNG) for name in stored):
        raise UserError(f"{path} holds no random generator state (saved with --no-save-rng?); add --no-load-rng")
    # a rank or a kind of device that the saving run did not have keeps the state that --seed gave it
    state.update({name: tensor for name, tensor in generators.items() if name in stored})
    dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    if with_rng:
        backend.set_rng_state({name.rsplit(".", 1)[1]: tensor for name, tensor in generators.items()})
    return Progress.read(path)


def _compare(path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose names or shapes are not the model's."""
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    reshaped = [
        f"{name} {tuple(entry.size)} instead of {tuple(wanted[name].shape)}"
        for name, entry in sorted(stored.items())
        if name in wanted and isinstance(entry, TensorStorageMetadata) and tuple(entry.size) != wanted[name].shape
    ]
    for kind, names in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes:", reshaped)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{path} is a checkpoint of another model: it {kind} {', '.join(names[:3])}{more}; "
                "convert the weights that model_name_or_path and the model JSON describe"
            )
