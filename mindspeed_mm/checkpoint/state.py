"""What a training checkpoint holds: parameters, AdamW's moments, random generators, and where the run stands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.checkpoint.commit import PROGRESS_FILE
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import verify_directory
from mindspeed_mm.checkpoint.loader import Check, agreed_error, compare, load_tensors
from mindspeed_mm.checkpoint.shards import bytes_of, items_to_write
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.optimizer import initialise_state

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
        """From a checkpoint directory; a converted one starts at iteration 0.

        Raises:
            UserError: if the file is damaged, or of a version of this program that knew more than this one.
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


class TrainingState:
    """What a run's checkpoints hold, as ``saver.SavedState`` wants it."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, backend: Backend, *, with_rng: bool
    ) -> None:
        """
        Args:
            model: sharded model.
            optimizer: None to leave its state out (``--no-save-optim``).
            backend: whose generators are saved.
            with_rng: whether to save them (``--no-save-rng`` leaves them out).
        """
        self._model, self._optimizer, self._backend, self._with_rng = model, optimizer, backend, with_rng

    def shared(self) -> dict[str, Tensor]:
        """Parameters and AdamW's state."""
        optimizer = {} if self._optimizer is None else optimizer_state(self._model, self._optimizer)
        return {**model_state(self._model), **optimizer}

    def own(self) -> dict[str, Tensor]:
        """This process's random generators."""
        return rng_state(self._backend, dist.get_rank()) if self._with_rng else {}

    def expected_bytes(self) -> int:
        """Bytes that this process will write, whether or not AdamW has made its state yet."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            state[name] = parameter.detach()
            if self._optimizer is not None and parameter.requires_grad:
                state.update({f"{name}.{moment}": parameter.detach() for moment in ("exp_avg", "exp_avg_sq")})
        return bytes_of(items_to_write(state, {}, rank=dist.get_rank()))


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    backend: Backend,
    with_rng: bool,
    check: Check = "read",
) -> Progress:
    """Read a checkpoint directory into the model, in place. Called by all ranks together.

    Args:
        path: ``release`` or ``iter_XXXXXXX`` directory.
        model: sharded, with storage.
        optimizer: None to leave its state as it is (``--no-load-optim``, or a converted checkpoint).
        backend: whose generators are restored.
        with_rng: whether to restore them.
        check: which checksums to compare (``--check-load``).

    Raises:
        UserError: on all ranks, if the checkpoint is incomplete or damaged; if it is of another model, with the first
            differences; or if it lacks what was asked for.
    """
    with agreed_error():
        reader = DcpReader(path, verify_directory(path))
        wanted = _wanted(reader, model, optimizer, backend, with_rng=with_rng)
        progress = Progress.read(path)
    load_tensors(reader, wanted, check=check)
    if with_rng:
        backend.set_rng_state(
            {name.rsplit(".", 1)[1]: tensor for name, tensor in wanted.items() if name.startswith(RNG)}
        )
    return progress


def _wanted(
    reader: DcpReader,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None,
    backend: Backend,
    *,
    with_rng: bool,
) -> dict[str, Tensor]:
    """The tensors to fill, by their names in the checkpoint, which has them all."""
    stored, path = reader.tensors, reader.path
    state = model_state(model)
    exact = Progress.is_training(path)  # converted weights may be of a narrower type
    compare(path, state, {name: entry for name, entry in stored.items() if name.startswith(MODEL)}, exact=exact)
    if optimizer is not None:
        if not any(name.startswith(OPTIMIZER) for name in stored):
            raise UserError(
                f"{path} holds no optimizer state (saved with --no-save-optim?); "
                "add --no-load-optim to start AdamW's moments from zero"
            )
        initialise_state(optimizer)
        moments = optimizer_state(model, optimizer)
        compare(path, moments, {name: entry for name, entry in stored.items() if name.startswith(OPTIMIZER)})
        state.update(moments)
    if with_rng:
        if not any(name.startswith(RNG) for name in stored):
            raise UserError(f"{path} holds no random generator state (saved with --no-save-rng?); add --no-load-rng")
        # a rank or a kind of device that the saving run did not have keeps the state that --seed gave it
        state.update({n: tensor for n, tensor in rng_state(backend, dist.get_rank()).items() if n in stored})
    return state
