"""State in a training checkpoint: parameters, optimizer state, random generators, and progress of the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import host_group
from mindspeed_mm.checkpoint.contents import check_adapters, check_contents, compare
from mindspeed_mm.checkpoint.directory import verify_directory
from mindspeed_mm.checkpoint.huggingface import HFReader
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX, OPTIMIZER_PREFIX, RNG_PREFIX, Entry
from mindspeed_mm.checkpoint.partial import Base, find_base
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.shards import Shard
from mindspeed_mm.checkpoint.storage import Check, CheckpointReader, LoadPlanner
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import is_adapter
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.progress import Phase

logger = logging.getLogger(__name__)


class StatefulOptimizer(Protocol):
    """What saving and loading need of an optimizer.

    Attributes:
        state: parameter -> key -> tensor, empty before the first step.
        layout: of the state.
    """

    state: Any
    layout: OptimizerStateLayout

    def allocate_state(self) -> None:
        """Allocate the state of all parameters, so that a checkpoint can be read into it."""


def model_state(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """``model.<name>`` -> parameter, sharded as it is; of some names, or of all for None."""
    return {
        MODEL_PREFIX + name: parameter.detach()
        for name, parameter in model.named_parameters() if names is None or name in names
    }


def optimizer_state(model: nn.Module, optimizer: StatefulOptimizer) -> dict[str, Tensor]:
    """``optimizer.<parameter name>.<key>`` -> tensor; of AdamW in fp32 ``exp_avg``, ``exp_avg_sq`` and ``step``."""
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
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        backend: Backend,
        *,
        with_rng: bool,
        names: Collection[str] | None = None,
    ) -> None:
        """
        Args:
            model: sharded model.
            optimizer: None to skip its state (``--no-save-optim``).
            backend: of the generators.
            with_rng: whether to save the generators' state; False for ``--no-save-rng``.
            names: of the parameters to save; None for all.
        """
        self._model, self._optimizer, self._backend, self._with_rng = model, optimizer, backend, with_rng
        self._names = names

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, optimizer state, and this rank's random generators."""
        optimizer = {} if self._optimizer is None else optimizer_state(self._model, self._optimizer)
        generators = rng_state(self._backend, dist.get_rank()) if self._with_rng else {}
        return {**model_state(self._model, self._names), **optimizer, **generators}

    def expected_bytes(self) -> int:
        """Bytes that this rank holds, also before the optimizer has created its state."""
        total = 0
        for name, parameter in self._model.named_parameters():
            values = Shard.of(parameter).values
            if self._names is None or name in self._names:
                total += values.nbytes
            if self._optimizer is not None and parameter.requires_grad:
                total += self._optimizer.layout.nbytes(name, tuple(parameter.shape), held=values.numel())
        return total


@torch.no_grad()
def load_tensors(reader: StorageReader, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, in place, each rank its own shards. Called by all ranks.

    Args:
        reader: has all names of ``tensors`` in the same shapes.
        tensors: sharded or not, with storage, on any device; by their names in the checkpoint.

    Raises:
        UserError: on all ranks, if a chunk is missing, unreadable or damaged.
    """
    nbytes = sum(Shard.of(tensor).values.nbytes for tensor in tensors.values()) if dist.get_rank() == 0 else 0
    reported = Phase("loading, on rank 0", unit="B", total=nbytes) if nbytes else contextlib.nullcontext()
    try:
        with reported as phase:
            planner = LoadPlanner() if phase is None else LoadPlanner(phase.advance)
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=host_group())
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        if isinstance(cause, OSError):
            raise UserError(f"{cause.filename or 'a file'} cannot be read: {cause.strerror or cause}") from cause
        raise cause from None


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an error of any rank on all ranks, so that none waits in a collective for a rank that has stopped."""
    message: str | None = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the checkpoint'} cannot be read: {error.strerror or error}"
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    found = next((text for text in messages if text is not None), None)
    if found is not None:
        raise UserError(found)


def entries_of(tensors: Mapping[str, Tensor | tuple[Sequence[int], torch.dtype]]) -> dict[str, Entry]:
    """Shape and dtype of each tensor, or of each pair of them."""
    pairs = {n: (t.shape, t.dtype) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    return {name: (tuple(shape), str(dtype).removeprefix("torch.")) for name, (shape, dtype) in pairs.items()}


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    backend: Backend,
    with_rng: bool,
    check: Check = "read",
    load_base: str | None = None,
    expert_layout: str = "auto",
    lora: Mapping[str, Any] | None = None,
    new_stage: bool = False,
) -> Progress:
    """Load a checkpoint directory into the model, in place. Called by all ranks.

    Args:
        path: ``release`` or ``iter_XXXXXXX`` directory.
        model: sharded, with storage.
        optimizer: whose state to load, if the checkpoint has it; None to keep it (``--no-load-optim``).
        backend: of the generators.
        with_rng: whether to restore the generators' state, if the checkpoint has it.
        check: which checksums to compare (``--check-load``).
        load_base: directory of a partial checkpoint's base, if it is not where it was (``--load-base``).
        expert_layout: of a base that is a Hugging Face directory.
        lora: what the run records of its adapters; None without. Adapters that the checkpoint lacks are left as they
            are.
        new_stage: whether the run counts from 0 (``--finetune``).

    Raises:
        UserError: on all ranks, if the checkpoint or its base is incomplete, damaged, or of another model.
    """
    with raise_on_all_ranks():
        manifest = verify_directory(path, plain=check == "none")
        reader = CheckpointReader(path, manifest, check=check)
        base = find_base(manifest, path, moved_to=load_base, option="--load-base")
        optimizer, with_rng = _held(reader, optimizer, with_rng)
        stored, state = entries_of(reader.tensors), model_state(model)
        adapters = {name for name in state if is_adapter(name)}
        has_adapters = check_adapters(path, manifest, adapters, stored, lora=lora, new_stage=new_stage)
        if not has_adapters:
            state = {name: tensor for name, tensor in state.items() if name not in adapters}
        parameters, frozen = entries_of(state), _frozen(model)
        check_contents(
            path, manifest, stored, parameters, trained=state.keys() - frozen,
            optimizer=None if optimizer is None else optimizer.layout,
        )
        _log_rounding(path, parameters, stored)
        tensors = {name: tensor for name, tensor in state.items() if name in stored}
        if optimizer is not None:
            optimizer.allocate_state()
            tensors |= optimizer_state(model, optimizer)
        if with_rng:
            # a rank or device type that the saving run did not have keeps the state from --seed
            tensors |= {n: tensor for n, tensor in rng_state(backend, dist.get_rank()).items() if n in stored}
        progress = Progress.read(path, None if check == "none" else manifest)
    if base is not None:
        names = {name.removeprefix(MODEL_PREFIX) for name in state.keys() - tensors.keys()}
        _load_base(base, model, names, check=check, expert_layout=expert_layout)
    load_tensors(reader, tensors)
    if with_rng:
        backend.set_rng_state(
            {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(RNG_PREFIX)}
        )
    return progress


def _held(
    reader: CheckpointReader, optimizer: StatefulOptimizer | None, with_rng: bool
) -> tuple[StatefulOptimizer | None, bool]:
    """What of the requested state the checkpoint has; the log says what it lacks."""
    path = Path(reader.path)
    training = Progress.is_training(path)
    has_state, has_rng = (
        any(name.startswith(prefix) for name in reader.tensors) for prefix in (OPTIMIZER_PREFIX, RNG_PREFIX)
    )
    lacking = [
        f"{what} (saved with {flag})" if training else what
        for wanted, has, what, flag in (
            (optimizer is not None, has_state, "optimizer state, which starts from zero", "--no-save-optim"),
            (with_rng, has_rng, "RNG states, which start from --seed", "--no-save-rng"),
        )
        if wanted and not has
    ]
    if lacking and dist.get_rank() == 0:
        what = ", and no ".join(lacking)
        if training:
            logger.warning(f"the resume is not exact: {path} has no {what}")
        else:
            logger.info(f"{path} holds weights alone, as converted checkpoints do: it has no {what}")
    return optimizer if has_state else None, with_rng and has_rng


def _frozen(model: nn.Module) -> set[str]:
    return {MODEL_PREFIX + name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _log_rounding(path: Path, parameters: Mapping[str, Entry], stored: Mapping[str, Entry]) -> None:
    count = sum(
        stored[name][1] == "float32" and parameters[name][1] == "bfloat16" for name in parameters.keys() & stored.keys()
    )
    if count:
        logger.info(
            f"{count} frozen parameters that {path} stores in fp32 are rounded to bf16 (--frozen-param-dtype); "
            "checkpoints of this run contain the rounded values"
        )


def _load_base(base: Base, model: nn.Module, names: Collection[str], *, check: Check, expert_layout: str) -> None:
    """Fill the parameters that a partial checkpoint does not hold."""
    if base.kind == "huggingface":
        load_hf_weights(model, base.path, expert_layout=expert_layout, names=names)
        return
    tensors = model_state(model, names)
    with raise_on_all_ranks():
        reader = CheckpointReader(Path(base.path), verify_directory(base.path), check=check)
        stored = {name: entry for name, entry in entries_of(reader.tensors).items() if name in tensors}
        compare(Path(base.path), entries_of(tensors), stored, exact=False, frozen=_frozen(model))
        _log_rounding(Path(base.path), entries_of(tensors), stored)
    load_tensors(reader, tensors)


def load_hf_weights(
    model: nn.Module, directory: str | Path, *, expert_layout: str = "auto", names: Collection[str] | None = None
) -> None:
    """Fill the model's parameters, in place, from a Hugging Face directory. Called by all ranks.

    Each rank reads only the rows of its local shards, except that experts of the ``v5`` layout that are sharded within
    an expert are read whole. Host memory grows by some ``READ_BYTES``.

    Args:
        model: sharded or not, with storage.
        directory: with ``config.json`` and safetensors files.
        expert_layout: of ``directory``: ``auto``, ``hub`` or ``v5``, as of ``HFReader``.
        names: of the parameters to fill; None for all.

    Raises:
        UserError: on all ranks, naming tensors that are missing, unexpected, damaged or of another shape.
    """
    with raise_on_all_ranks():
        reader = HFReader(directory, expert_layout=expert_layout)
        if unknown := model_state(model, names).keys() - reader.tensors.keys():
            raise AssertionError(f"the weight map does not know {sorted(unknown)[:3]}")
        if dist.get_rank() == 0:
            reader.read_unused()
    load_tensors(reader, model_state(model, names))
