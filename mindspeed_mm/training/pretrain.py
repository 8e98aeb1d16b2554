"""From a checked recipe to a finished run: device, processes, model, optimizer, checkpoint, data, loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.backend.peak_flops import measure_peak_tflops
from mindspeed_mm.backend.process_group import communication_note, connect_store, init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.hf import load_hf_weights
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions, locked_save_directory
from mindspeed_mm.checkpoint.state import Progress, TrainingState, load_checkpoint
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.job import JobConfig
from mindspeed_mm.data.loader import BatchLoader, TrainLoader
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.model import Model
from mindspeed_mm.models.parameter_rules import apply_settings, compile_rules, describe, frozen_parts
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.parallel.fsdp import DTYPES
from mindspeed_mm.parallel.mesh import Layout, build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training.callbacks.anomaly_detection import AnomalyDetector, reports_directory
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.checkpointing import Checkpointing
from mindspeed_mm.training.callbacks.evaluation import Evaluation
from mindspeed_mm.training.callbacks.log_line import LogLine
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.profiling import Profiling
from mindspeed_mm.training.callbacks.run_summary import RunSummary
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.callbacks.watchdog import Watchdog, WatchdogLimits
from mindspeed_mm.training.context import ForwardStep, Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher, batch_splitter
from mindspeed_mm.training.initialization import initialize
from mindspeed_mm.training.load_balancing import LoadBalancingLoss
from mindspeed_mm.training.logging_setup import setup_logging
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.restart import RUN_KEY, choose_start, run_identity
from mindspeed_mm.training.signals import StopRequest, exit_status
from mindspeed_mm.training.trainer import Trainer

logger = logging.getLogger(__name__)

ModelProvider = Callable[[JobConfig, ModelSpec, ModelConfig, "MediaSettings | None", Backend], Model]
DataProvider = Callable[
    [JobConfig, ModelSpec, ModelConfig, "MediaSettings | None", Layout, Progress],
    tuple[TrainLoader, "BatchLoader | None"],
]


def pretrain(
    job: JobConfig, model_provider: ModelProvider, data_provider: DataProvider, forward_step: ForwardStep
) -> int:
    """Run a recipe on this process, one of those that torchrun started.

    Args:
        recipe: flags and files, already checked against each other.
        model_provider: builds the model, uninitialised.
        data_provider: builds the training loader, continuing from the given progress, and the loader of held-out
            batches, or None.
        forward_step: loss of the model on a batch with the given token weights.

    Returns:
        The status to exit with: not 0 where the run was told to stop before its end.

    Raises:
        UserError: for anything that the user can mend.
    """
    backend = select_backend(job.args.device)
    if job.args.deterministic_mode:
        backend.use_deterministic_kernels()
    init_distributed(
        backend,
        timeout_minutes=job.args.distributed_timeout_minutes,
        host_tensors=job.fsdp.offload_to_cpu,
    )
    setup_logging(dist.get_rank())
    try:
        with locked_save_directory(job.args.save):
            stopped = _run(job, backend, model_provider, data_provider, forward_step)
    finally:
        shutdown_distributed()
    return exit_status(stopped=stopped)


def _run(
    job: JobConfig,
    backend: Backend,
    model_provider: ModelProvider,
    data_provider: DataProvider,
    forward_step: ForwardStep,
) -> bool:
    """Train; returns whether the run was stopped before its end."""
    args = job.args
    layout = build_layout(
        device_type=backend.device.type,
        sharding_size=job.fsdp.sharding_size,
        expert_size=args.expert_model_parallel_size,
        context_size=args.context_parallel_size,
    )
    logger.info(f"{layout.world_size} process(es) on {backend.name}, torch {torch.__version__}")
    if note := communication_note(backend, args.distributed_backend):
        logger.info(note)
    for line in job.describe_ignored():
        logger.info(line)

    backend.seed(args.seed)
    spec = spec_of(job.model.init_from_hf_path)
    model_config = spec.read_config(job.model.init_from_hf_path)
    job.check_model(spec.facts(model_config), world_size=layout.world_size)
    media = spec.read_media_settings(job.data, model_config)
    with torch.device("meta" if args.init_model_with_meta_device else "cpu"):
        model = model_provider(job, spec, model_config, media, backend)
    settings = spec.parameter_settings(model_config, compile_rules(args, job.model, parts=spec.parts))
    apply_settings(model, settings)
    _shard_and_allocate(model, job, backend, layout)
    optimizer = build_optimizer(model, args, settings)
    schedule = build_schedule(optimizer, args)
    for line in describe(settings, lr=args.lr, weight_decay=args.weight_decay):
        logger.info(line)
    progress = _load(job, model, optimizer, backend, spec=spec, model_config=model_config)
    _restore_schedule(job, schedule, progress)

    loader, eval_loader = data_provider(job, spec, model_config, media, layout, progress)
    _check_order(job, progress, loader)
    progress.seed, progress.samples_per_epoch = args.seed, loader.samples_per_epoch
    _warn_of_losses(job)
    logger.info(
        f"data: {loader.summary}; training from iteration {progress.iteration + 1} to {args.train_iters}"
    )
    with StopRequest() as stop_request:
        context = RunContext(
            layout=layout,
            backend=backend,
            progress=progress,
            peak_tflops=_peak_tflops(job, backend),
            stop_requested=stop_request,
        )
        split = batch_splitter(layout, merge_unit=spec.merge_unit(model_config))
        trainer = Trainer(
            args=args,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            loader=DevicePrefetcher(loader, backend, split),
            objective=Objective(
                forward_step=forward_step,
                loss_mode=job.loss_mode,
                load_balancing=_load_balancing(job, model_config),
                flop_count=spec.flop_counter(model_config, frozen=frozen_parts(settings)),
            ),
            context=context,
            callbacks=_callbacks(
                job,
                context,
                model=model,
                describe=loader.dataset.describe,
                eval_loader=eval_loader,
                split=split,
                manager=_checkpoint_manager(job, model, optimizer, backend),
            ),
        )
        trainer.train()
    return trainer.stopped and progress.iteration < args.train_iters


def _callbacks(
    job: JobConfig,
    context: RunContext,
    *,
    model: nn.Module,
    describe: Callable[[int], str],
    eval_loader: BatchLoader | None,
    split: Callable[[Batch], Batch],
    manager: CheckpointManager | None,
) -> list[Callback]:
    """All that follows the run, in the order in which it sees a step."""
    args, backend, rank = job.args, context.backend, context.layout.rank
    packed = job.data.dataset_param.basic_parameters.packing
    skipped_samples = SkippedSamples(job.data.dataloader_param.bad_sample_limit)
    callbacks: list[Callback] = [
        Profiling(job.tools, rank=rank, profiler=backend.profiler(), memory_history=backend.memory_history()),
        LogLine(packed=packed),
    ]
    if args.save is not None:
        callbacks.append(MetricsFile(args.save))
    callbacks += [skipped_samples, AnomalyDetector(args, model=model, describe=describe)]
    if eval_loader is not None:
        callbacks.append(Evaluation(eval_loader, split=split, skipped_samples=skipped_samples))
    if manager is not None:  # after the evaluation, whose metrics belong to the step that is saved
        callbacks.append(Checkpointing(manager))
    return [*callbacks, RunSummary(packed=packed), _watchdog(args, context)]  # watched until everything has ended


def _watchdog(args: TrainingArgs, context: RunContext) -> Watchdog:
    return Watchdog(
        WatchdogLimits.of(args),
        phases=context.phases,
        rank=context.layout.rank,
        world_size=context.layout.world_size,
        directory=reports_directory(args),
        connect=lambda: connect_store("watch", timeout_seconds=max(1.0, args.heartbeat_timeout)),
    )


def _peak_tflops(job: JobConfig, backend: Backend) -> float | None:
    """What MFU compares with: as given, or measured for 0."""
    if job.args.peak_tflops != 0:
        return job.args.peak_tflops
    rate = measure_peak_tflops(backend, DTYPES[job.fsdp.param_dtype])
    logger.info(f"MFU compares with {rate:.3g} TFLOP/s, measured with a large {job.fsdp.param_dtype} matrix product")
    return rate


def _load_balancing(job: JobConfig, model_config: ModelConfig) -> LoadBalancingLoss | None:
    coefficient = job.router_aux_loss_coef
    return LoadBalancingLoss(coefficient, top_k=model_config.num_experts_per_token) if coefficient else None


def _checkpoint_manager(
    job: JobConfig, model: nn.Module, optimizer: torch.optim.Optimizer, backend: Backend
) -> CheckpointManager | None:
    """Writes the run's checkpoints, if ``--save`` names a directory."""
    args = job.args
    if args.save is None:
        return None
    optimizer_to_save = None if args.no_save_optim else optimizer
    return CheckpointManager(
        TrainingState(model, optimizer_to_save, backend, with_rng=not args.no_save_rng),
        SaveOptions(
            root=Path(args.save),
            asynchronous=args.async_save,
            keep_last=args.keep_last,
            keep_every=args.keep_every,
            failure_limit=args.save_failure_limit,
            timeout_minutes=args.distributed_timeout_minutes,
        ),
        backend=backend,
        metadata={**job.checkpoint_metadata(), RUN_KEY: run_identity()},
    )


def _shard_and_allocate(model: Model, job: JobConfig, backend: Backend, layout: Layout) -> None:
    """Shard the model and give this process's shards storage on the device; the values come from a checkpoint."""
    # FSDP2 moves what is elsewhere by exchanging a tensor's data, which not every device allows
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(backend.device))
    parallelize(model, layout=layout, config=job.fsdp)
    model.to_empty(device="cpu" if job.fsdp.offload_to_cpu else backend.device)
    for module in model.modules():  # constants are wanted on the device wherever the parameters are kept
        for name, constant in module.named_buffers(recurse=False):
            setattr(module, name, constant.to(backend.device))
    model.reset_buffers()


def _load(
    job: JobConfig, model: nn.Module, optimizer: torch.optim.AdamW, backend: Backend, *, spec: ModelSpec,
    model_config: ModelConfig,
) -> Progress:
    start = choose_start(job.args)
    for note in start.notes:
        logger.info(note)
    path = start.path
    if path is None and job.args.random_init:
        initialize(model, functools.partial(spec.initial_distribution, model_config), seed=job.args.seed)
        logger.info(f"initialized all parameters at random (--random-init, --seed {job.args.seed})")
        return Progress()
    if path is None:
        directory = job.model.init_from_hf_path
        load_hf_weights(model, directory, expert_layout=job.args.expert_layout)
        logger.info(f"loaded the weights of {directory}; no --load was given")
        return Progress()
    converted = not Progress.is_training(path)
    progress = load_checkpoint(
        path,
        model=model,
        optimizer=optimizer if start.with_optimizer and not converted else None,
        backend=backend,
        with_rng=start.with_rng and not converted,
        check=job.args.check_load,
    )
    said = {"read": "checksums of what was read agree", "all": "all checksums agree", "sizes": "checksums not compared"}
    logger.info(f"loaded {path}; {said[job.args.check_load]}")
    return progress


def _restore_schedule(job: JobConfig, schedule: Any, progress: Progress) -> None:
    """Continue the learning-rate schedule; one that differs from the flags' is the user's to decide."""
    if progress.schedule is None:
        return
    current = schedule.state_dict()
    differing = [
        f"{key} {saved!r} became {current[key]!r}"
        for key, saved in progress.schedule.items()
        if key not in ("num_steps", "wd_incr_steps") and current.get(key) != saved
    ]
    if differing and not job.args.override_opt_param_scheduler:
        raise UserError(
            f"the learning-rate schedule of {job.args.load} differs from the flags' ({'; '.join(differing)}); pass "
            "the flags of the first run, or --override-opt-param-scheduler to continue under the new schedule"
        )
    schedule.step(increment=progress.schedule["num_steps"] - schedule.num_steps)


def _warn_of_losses(job: JobConfig) -> None:
    """Say what a run resumed from this run's checkpoints will not have."""
    args = job.args
    left_out = [
        what
        for flag, what in ((args.no_save_optim, "AdamW's moments"), (args.no_save_rng, "random generator states"))
        if flag
    ]
    if args.save is not None and left_out:
        logger.info(
            f"checkpoints will be saved without {' and '.join(left_out)}: enough to export the model; "
            "a run resumed from them starts these anew"
        )


def _check_order(job: JobConfig, progress: Progress, loader: Any) -> None:
    """Say so where the resumed run will not see the samples in the order of the first."""
    for name, saved, current in (
        ("--seed", progress.seed, job.args.seed),
        ("the number of samples per epoch", progress.samples_per_epoch, loader.samples_per_epoch),
    ):
        if saved is not None and saved != current:
            logger.warning(f"{name} was {saved} when the checkpoint was written and is {current} now: "
                "the order of the samples differs from the first run's")
