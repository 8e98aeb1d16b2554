"""The start of a run: Hugging Face weights, a checkpoint, or after a restart by torchrun its own last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    RUN_KEY,
    checkpoint_to_load,
    read_manifest,
    resolve_checkpoint,
)
from mindspeed_mm.checkpoint.partial import check_expert_layout
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.save_directory import continue_best
from mindspeed_mm.checkpoint.state import load_checkpoint, load_hf_weights
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.job import JobConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file
from mindspeed_mm.models.lora import LORA_KEY, is_adapter
from mindspeed_mm.models.spec import ModelConfig, ModelSpec
from mindspeed_mm.training.initialization import initialize
from mindspeed_mm.training.logging_setup import RANK_0_ONLY
from mindspeed_mm.training.lora import LoraRun
from mindspeed_mm.training.optimizer import schedule_state
from mindspeed_mm.training.optimizers.base import ShardedOptimizer
from mindspeed_mm.training.resume_checks import check_schedule

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        path: checkpoint directory; None for the Hugging Face weights.
        load_base: where the base of a partial checkpoint has moved to; None for where it was.
        with_optimizer: whether the optimizer's state is read from it, if it has some.
        with_rng: whether the RNG states are, if it has them.
        new_stage: whether the counters start at 0, whatever the checkpoint says (``--finetune``).
    """

    path: Path | None
    load_base: str | None = None
    with_optimizer: bool = False
    with_rng: bool = False
    new_stage: bool = False


def run_identity() -> str:
    """Identifies this run on rank 0: the same after a restart by torchrun, another in each run of torchrun."""
    parent = os.getppid()  # torchrun's agent, which outlives its processes
    began = ""
    with contextlib.suppress(OSError, IndexError):
        # the 22nd field; the second is a name in parentheses, which may hold spaces
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{parent}:{began}"


def choose_start(args: TrainingArgs) -> Start:
    """Decide on rank 0 and broadcast. Called by all ranks together.

    Raises:
        UserError: if ``--load`` names no checkpoint.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = _choose(args)
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _choose(args: TrainingArgs) -> Start:
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    own = _own_checkpoint(args) if restarts else None
    if own is not None:
        logger.info(f"restart {restarts} by torchrun: continuing from {own}, this run's last checkpoint")
        return Start(own, with_optimizer=True, with_rng=True)
    if restarts:
        logger.info(f"restart {restarts} by torchrun: this run has no checkpoint yet and starts over")
    if args.load is None:
        return Start(None)
    path, manifest = checkpoint_to_load(args.load, plain=args.check_load == "none")
    check_expert_layout(args.expert_layout, manifest, path)
    if args.finetune:
        return Start(path, load_base=args.load_base, new_stage=True)
    if Progress.is_training(path) and (args.no_load_optim or args.no_load_rng):
        flags = "--no-load-optim " * args.no_load_optim + "--no-load-rng" * args.no_load_rng
        logger.warning(
            f"the resume is not exact: optimizer or RNG state is not loaded ({flags.strip()})"
        )
    return Start(
        path,
        load_base=args.load_base,
        with_optimizer=not args.no_load_optim,
        with_rng=not args.no_load_rng,
    )


def _own_checkpoint(args: TrainingArgs) -> Path | None:
    """The last checkpoint in ``--save``, if this run wrote it."""
    if args.save is None:
        return None
    try:
        path = resolve_checkpoint(args.save)
        written_by = read_manifest(path)["metadata"].get(RUN_KEY)
    except (UserError, KeyError, AttributeError):
        return None
    return path if written_by == run_identity() else None


def load_start(
    job: JobConfig,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    backend: Backend,
    *,
    spec: ModelSpec,
    model_config: ModelConfig,
    lora: LoraRun | None = None,
) -> tuple[Progress, Path | None]:
    """Load or initialise the parameters, adapters included, and what else the run starts with.

    Returns:
        The run's progress, and the directory that the weights are from.

    Raises:
        UserError: if a directory lacks what is to be loaded.
    """
    start = choose_start(job.args)
    path = start.path
    weights = None  # all parameters
    if lora is not None:
        weights = {name for name, _ in model.named_parameters() if not is_adapter(name)}
    if lora is not None and not (path is not None and _has_adapters(path)):
        lora.initialize(model, seed=job.args.seed, init_from=job.args.lora_init_from)
    if path is None and job.args.random_init:
        distribution = functools.partial(spec.initial_distribution, model_config)
        initialize(model, distribution, seed=job.args.seed, names=weights)
        logger.info(f"initialized all parameters at random (--random-init, --seed {job.args.seed})")
        return Progress(), None
    if path is None:
        directory = job.model.init_from_hf_path
        load_hf_weights(model, directory, expert_layout=job.args.expert_layout, names=weights)
        logger.info(f"loaded the weights of {directory}; no --load was given")
        return Progress(), Path(directory)
    progress = load_checkpoint(
        path,
        model=model,
        optimizer=optimizer if start.with_optimizer else None,
        backend=backend,
        with_rng=start.with_rng,
        check=job.args.check_load,
        load_base=start.load_base,
        expert_layout=job.args.expert_layout,
        lora=None if lora is None else lora.recorded(),
        new_stage=start.new_stage,
    )
    if start.new_stage:
        logger.info(f"--finetune: a new stage starts from the weights of iteration {progress.iteration}")
        progress = Progress()
    if progress.best is not None:
        continue_best(progress.best, path, save=job.args.save)
    checked = {"read": "checksums of what was read agree", "all": "all checksums agree"}
    logger.info(f"loaded {path}; {checked.get(job.args.check_load, 'checksums not compared')}")
    return progress, path


def _has_adapters(checkpoint: Path) -> bool:
    return is_file(checkpoint / MANIFEST) and LORA_KEY in read_manifest(checkpoint)["metadata"]


def restore_schedule(job: JobConfig, schedule: Any, progress: Progress) -> None:
    """Continue the learning-rate schedule.

    Raises:
        UserError: if it differs from the flags' and ``--override-opt-param-scheduler`` is not given.
    """
    if progress.schedule is None:
        return
    check_schedule(job.args, progress, schedule_state(schedule))
    schedule.step(increment=progress.schedule["num_steps"] - schedule.num_steps)


def warn_of_sample_order(progress: Progress, *, seed: int, samples_per_epoch: int, data: str) -> None:
    """Warn if the resumed run will not see the samples in the order of the first."""
    if progress.data not in (None, data) and progress.samples_per_epoch == samples_per_epoch:
        logger.warning(
            "the data files, or their shares in a mixture, are not those of the first run: the samples, or their "
            "order, differ",
            extra=RANK_0_ONLY,
        )
    for name, saved, current in (
        ("--seed", progress.seed, seed),
        ("the number of samples per epoch", progress.samples_per_epoch, samples_per_epoch),
    ):
        if saved is not None and saved != current:
            logger.warning(
                f"{name} was {saved} when the checkpoint was written and is {current} now: the order of the samples "
                "differs from the first run's",
                extra=RANK_0_ONLY,
            )
