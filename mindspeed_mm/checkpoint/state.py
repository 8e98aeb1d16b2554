"""State in a training checkpoint: parameters, AdamW's moments, random generators, and progress of the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.checkpoint.dcp_format import MODEL_PREFIX
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import PROGRESS_FILE, verify_directory
from mindspeed_mm.checkpoint.loader import Check, compare, load_tensors, raise_on_all_ranks
from mindspeed_mm.checkpoint.shards import chunks_to_write, total_bytes
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.optimizer import initialise_state

OPTIMIZER_PREFIX, RNG_PREFIX = "optimizer.", "rng."


@dataclasses.dataclass
class Progress:
    """Progress of a run.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples consumed by them.
        schedule: state of the learning-rate schedule, None before the first step.
        seed: that decided the order of the samples.
        samples_per_epoch: number of samples in that order.
    """

    iteration: int = 0
    consumed_samples: int = 0
    schedule: dict[str, Any] | None = None
    seed: int | None = None
    samples_per_epoch: int | None = None

    @staticmethod
    def is_training(path: Path) -> bool:
        """Whether ``path`` is a training checkpoint and not a converted one (``release``)."""
        return (path / PROGRESS_FILE).is_file()

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Read from a checkpoint directory; a converted one starts at iteration 0.

        Raises:
            UserError: if the file is damaged, or was written by a newer version.
        """
        if not cls.is_training(path):
            return cls()
        try:
            return cls(**json.loads((path / PROGRESS_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            reason = f"{path / PROGRESS_FILE} cannot be read ({error})"
            raise UserError(f"{reason}; restore it, or load another checkpoint") from error


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.<name>`` -> parameter, sharded as it is."""
    return {MODEL_PREFIX + name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimizer.<parameter name>.<exp_avg | exp_avg_sq | step>`` -> tensor."""
    return {
        f"{OPTIMIZER_PREFIX}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def rng_state(backend: Backend, rank: int) -> dict[str, Tensor]:
    """``rng.<rank>.<device>`` -> uint8 state of this rank's generators."""
    return {f"{RNG_PREFIX}{rank}.{device}": state for device, state in backend.rng_state().items()}


class TrainingState:
    """The state that a run saves; a ``manager.SavedState``."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, backend: Backend, *, with_rng: bool
    ) -> None:
        """
        Args:
            model: sharded model.
            optimizer: None to skip its state (``--no-save-optim``).
            backend: of the generators.
            with_rng: whether to save the generators' state; False for ``--no-save-rng``.
        """
        self._model, self._optimizer, self._backend, self._with_rng = model, optimizer, backend, with_rng

    def shared(self) -> dict[str, Tensor]:
        """Parameters and AdamW's state."""
        optimizer = {} if self._optimizer is None else optimizer_state(self._model, self._optimizer)
        return {**model_state(self._model), **optimizer}

    def own(self) -> dict[str, Tensor]:
        """Random generators of this rank."""
        return rng_state(self._backend, dist.get_rank()) if self._with_rng else {}

    def expected_bytes(self) -> int:
        """Bytes that this rank will write, also before AdamW has created its state."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            state[name] = parameter.detach()
            if self._optimizer is not None and parameter.requires_grad:
                state.update({f"{name}.{moment}": parameter.detach() for moment in ("exp_avg", "exp_avg_sq")})
        return total_bytes(chunks_to_write(state, {}, rank=dist.get_rank()))


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    backend: Backend,
    with_rng: bool,
    check: Check = "read",
) -> Progress:
    """Load a checkpoint directory into the model, in place. Called by all ranks.

    Args:
        path: ``release`` or ``iter_XXXXXXX`` directory.
        model: sharded, with storage.
        optimizer: None to keep its state (``--no-load-optim``, or a converted checkpoint).
        backend: of the generators.
        with_rng: whether to restore the generators' state.
        check: which checksums to compare (``--check-load``).

    Raises:
        UserError: on all ranks, if the checkpoint is incomplete or damaged, is of another model, or lacks the requested
            state.
    """
    with raise_on_all_ranks():
        reader = DcpReader(path, verify_directory(path))
        tensors = _tensors_to_load(reader, model, optimizer, backend, with_rng=with_rng)
        progress = Progress.read(path)
    load_tensors(reader, tensors, check=check)
    if with_rng:
        backend.set_rng_state(
            {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(RNG_PREFIX)}
        )
    return progress


def _tensors_to_load(
    reader: DcpReader,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    backend: Backend,
    *,
    with_rng: bool,
) -> dict[str, Tensor]:
    """The tensors to fill, by their names in the checkpoint.

    Raises:
        UserError: if the checkpoint does not have them all.
    """
    stored, path = reader.tensors, reader.path
    state = model_state(model)
    exact = Progress.is_training(path)  # converted weights may have a narrower dtype
    compare(path, state, {name: entry for name, entry in stored.items() if name.startswith(MODEL_PREFIX)}, exact=exact)
    if optimizer is not None:
        if not any(name.startswith(OPTIMIZER_PREFIX) for name in stored):
            raise UserError(
                f"{path} holds no optimizer state (saved with --no-save-optim?); "
                "add --no-load-optim to start AdamW's moments from zero"
            )
        initialise_state(optimizer)
        moments = optimizer_state(model, optimizer)
        compare(path, moments, {name: entry for name, entry in stored.items() if name.startswith(OPTIMIZER_PREFIX)})
        state.update(moments)
    if with_rng:
        if not any(name.startswith(RNG_PREFIX) for name in stored):
            raise UserError(f"{path} holds no random generator state (saved with --no-save-rng?); add --no-load-rng")
        # a rank or device type that the saving run did not have keeps the state from --seed
        state.update({n: tensor for n, tensor in rng_state(backend, dist.get_rank()).items() if n in stored})
    return state
