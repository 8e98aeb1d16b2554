"""From a job config to a finished run: device, ranks, model, optimizer, checkpoint, data, trainer."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.backend.device import Backend, select_backend
from mindspeed_mm.backend.peak_flops import measure_peak_tflops
from mindspeed_mm.backend.process_group import communication_note, connect_store, init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.directory import MEDIA_KEY, MODEL_CONFIG_KEY, RUN_KEY
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions, locked_save_directory
from mindspeed_mm.checkpoint.partial import BASE_KEY, base_of_run, model_of_base
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.state import TrainingState
from mindspeed_mm.config.checks import with_train_iters
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.job import JobConfig
from mindspeed_mm.data.loader import BatchLoader, TrainLoader
from mindspeed_mm.data.mixture import data_fingerprint
from mindspeed_mm.evaluation.sample_views import SampleViews
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.lora import LORA_KEY
from mindspeed_mm.models.model import Model
from mindspeed_mm.models.parameter_rules import Settings, apply_settings, compile_rules, describe, frozen_parts
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.parallel.fsdp import DTYPES
from mindspeed_mm.parallel.mesh import Layout, build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.progress import use_terminal
from mindspeed_mm.training.callbacks.anomaly_detection import AnomalyDetector, reports_directory
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.best_checkpoint import best_checkpoint
from mindspeed_mm.training.callbacks.checkpointing import Checkpointing
from mindspeed_mm.training.callbacks.evaluation import Evaluation
from mindspeed_mm.training.callbacks.hf_weights import HFWeights
from mindspeed_mm.training.callbacks.log_line import LogLine
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.profiling import Profiling
from mindspeed_mm.training.callbacks.progress_bar import ProgressBar
from mindspeed_mm.training.callbacks.run_report import RunReport
from mindspeed_mm.training.callbacks.run_summary import RunSummary
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.callbacks.tracker_clients import identities, make_trackers
from mindspeed_mm.training.callbacks.trackers import Trackers
from mindspeed_mm.training.callbacks.watchdog import Watchdog, WatchdogLimits
from mindspeed_mm.training.context import ForwardStep, Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher, batch_splitter
from mindspeed_mm.training.launch_environment import RUN_STATE
from mindspeed_mm.training.load_balancing import LoadBalancingLoss
from mindspeed_mm.training.logging_setup import setup_logging
from mindspeed_mm.training.lora import LoraRun
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.optimizers.base import ShardedOptimizer
from mindspeed_mm.training.resume import load_start, restore_schedule, run_identity, warn_of_sample_order
from mindspeed_mm.training.resume_checks import check_base_is_kept, check_steps_remain
from mindspeed_mm.training.run_description import describe_run
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
    """Train as the job config says, on this rank. Called in every process that torchrun started.

    Args:
        job: flags and files, already checked against each other.
        model_provider: builds the model, uninitialised.
        data_provider: builds the training loader, continuing from the given progress, and the loader of held-out
            batches, or None.
        forward_step: loss of the model on a batch with the given loss weights.

    Returns:
        The status to exit with: not 0 if the run stopped on request before its end.

    Raises:
        UserError: for any error that the user can correct.
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
    if job.args.progress and dist.get_rank() == 0:
        use_terminal(os.environ.get(RUN_STATE))
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
    _log_environment(job, layout, backend)

    backend.seed(args.seed)
    spec = spec_of(job.model.init_from_hf_path)
    model_config = spec.read_config(job.model.init_from_hf_path)
    job.check_model(spec.facts(model_config), world_size=layout.world_size)
    media = spec.read_media_settings(job.data, model_config)
    loaders = None
    if args.train_iters is None:
        loaders = data_provider(job, spec, model_config, media, layout, Progress())
        job = _count_iterations(job, loaders[0].samples_per_epoch)
        args = job.args
    with torch.device("meta" if args.init_model_with_meta_device else "cpu"):
        model = model_provider(job, spec, model_config, media, backend)
    rules = compile_rules(args, job.model, parts=spec.parts)
    lora = LoraRun.of(args, spec, model_config, rules)
    if lora is not None:
        lora.attach(model)
    settings = spec.parameter_settings(model_config, rules, lora=lora and lora.options, muon=args.muon)
    apply_settings(model, settings)
    _shard_and_allocate(model, job, backend, layout)
    optimizer = build_optimizer(model, args, settings)
    schedule = build_schedule(optimizer, args)
    _log_lines(describe(settings, lr=args.lr, weight_decay=args.weight_decay_range) + optimizer.layout.notes(settings))
    progress, source = load_start(job, model, optimizer, backend, spec=spec, model_config=model_config, lora=lora)
    check_steps_remain(progress, args)
    restore_schedule(job, schedule, progress)
    if loaders is None or progress.consumed_samples:  # else those that counted the samples start where the run does
        loaders = data_provider(job, spec, model_config, media, layout, progress)
    loader, eval_loader = loaders
    _record_data(job, loader, progress)
    _log_start(loader, eval_loader, progress, args)
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
            channels=loader.dataset.channels,
            objective=_objective(job, spec, model_config, settings, lora, forward_step),
            context=context,
            callbacks=_callbacks(
                job, context,
                model=model,
                loader=loader,
                eval_loader=eval_loader,
                views=_sample_views(job, spec, model_config, media, eval_loader),
                split=split,
                manager=_checkpoint_manager(
                    job, model, optimizer, backend, settings, _facts(model_config, media, loader, job), source, lora
                ),
            ),
        )
        trainer.train()
    return trainer.stopped and not trainer.finished_early and progress.iteration < args.train_iters


def _count_iterations(job: JobConfig, samples_per_epoch: int) -> JobConfig:
    """The job with ``--train-epochs`` as iterations, on which the schedule depends."""
    args = with_train_iters(job.args, samples_per_epoch=samples_per_epoch)
    logger.info(f"--train-epochs {args.train_epochs:g}: {args.train_iters} iterations of {args.global_batch_size} "
                f"samples, with {samples_per_epoch} samples per epoch")
    return job.replace(args=args)


def _facts(
    model_config: ModelConfig, media: MediaSettings | None, loader: TrainLoader, job: JobConfig
) -> dict[str, Any]:
    """What checkpoints record of the model and its images and videos; of videos only if there may be any."""
    if media is not None and not any(attr.videos for attr in job.data.attributes) and not loader.dataset.has_videos:
        media = dataclasses.replace(media, videos=None)
    of_media = {} if media is None else {MEDIA_KEY: dataclasses.asdict(media)}
    return {MODEL_CONFIG_KEY: dataclasses.asdict(model_config), **of_media}


def _objective(
    job: JobConfig, spec: ModelSpec, model_config: ModelConfig, settings: Settings, lora: LoraRun | None,
    forward_step: ForwardStep,
) -> Objective:
    adapters = () if lora is None else lora.adapters
    return Objective(
        forward_step=forward_step,
        loss_mode=job.loss_mode,
        load_balancing=_load_balancing(job, model_config),
        flop_count=spec.flop_counter(model_config, frozen=frozen_parts(settings), adapters=adapters),
    )


def _record_data(job: JobConfig, loader: TrainLoader, progress: Progress) -> None:
    """Note in ``progress`` what decides the order of the samples; warn where the first run had it otherwise."""
    seed, data = job.args.seed, data_fingerprint(job.data)
    warn_of_sample_order(progress, seed=seed, samples_per_epoch=loader.samples_per_epoch, data=data)
    progress.seed, progress.samples_per_epoch, progress.data = seed, loader.samples_per_epoch, data


def _log_environment(job: JobConfig, layout: Layout, backend: Backend) -> None:
    device = f"{backend.name} ({backend.communication})"
    logger.info(f"world size {layout.world_size} on {device}, torch {torch.__version__}")
    if note := communication_note(backend, job.args.distributed_backend):
        logger.info(note)
    _log_lines(job.describe_ignored())


def _log_lines(lines: Sequence[str]) -> None:
    for line in lines:
        logger.info(line)


def _log_start(loader: TrainLoader, eval_loader: BatchLoader | None, progress: Progress, args: TrainingArgs) -> None:
    _warn_of_partial_state(args)
    evaluated = "; nothing is held out (val_dataset or val_rate): no evaluation"
    if eval_loader is not None:
        evaluated = f"; evaluation: {eval_loader.summary}"
    elif not args.eval_iters:
        evaluated = "; --eval-iters 0: no evaluation"
    logger.info(f"data: {loader.summary}{evaluated}; {_remaining_iterations(progress, args)}")


def _remaining_iterations(progress: Progress, args: TrainingArgs) -> str:
    if progress.iteration >= args.train_iters:
        return f"nothing to train: iteration {progress.iteration} is done, and --train-iters is {args.train_iters}"
    return f"training from iteration {progress.iteration + 1} to {args.train_iters}"


def _callbacks(
    job: JobConfig,
    context: RunContext,
    *,
    model: nn.Module,
    loader: TrainLoader,
    eval_loader: BatchLoader | None,
    views: SampleViews | None,
    split: Callable[[Batch], Batch],
    manager: CheckpointManager | None,
) -> list[Callback]:
    """All that follows the run, in the order in which it sees a step."""
    args, backend, rank = job.args, context.backend, context.layout.rank
    packed = job.data.dataset_param.basic_parameters.packing
    skipped_samples = SkippedSamples(job.data.dataloader_param.bad_sample_limit)
    describe = _describe(job, context, loader, eval_loader)
    callbacks: list[Callback] = [
        Profiling(job.tools, rank=rank, profiler=backend.profiler(), memory_history=backend.memory_history()),
        LogLine(packed=packed),
    ]
    if args.progress:
        callbacks.append(ProgressBar())
    if args.save is not None:
        callbacks.append(MetricsFile(args.save))
        callbacks += [] if args.no_report else [RunReport(args.save, describe=describe)]
    callbacks += [skipped_samples, AnomalyDetector(args, model=model, describe=loader.dataset.describe)]
    if eval_loader is not None:
        callbacks.append(Evaluation(
            eval_loader, split=split, skipped_samples=skipped_samples, data_sets=eval_loader.dataset.channels,
            views=views,
        ))
    best = best_checkpoint(args, eval_loader)
    if manager is not None:  # after the evaluation, whose metrics belong to the step that is saved
        callbacks.append(Checkpointing(manager, **({} if best is None else {"wanted": best.wants})))
    if best is not None:  # after the last save, when the best checkpoint is known
        callbacks.append(best)
    if manager is not None and (args.save_hf_interval is not None or args.save_hf_at_end):
        callbacks.append(HFWeights(
            Path(args.save), job.model.init_from_hf_path, interval=args.save_hf_interval, in_use=manager.in_use,
            dtype=args.save_hf_dtype, load_base=args.load_base,
        ))
    callbacks.append(Trackers(
        make_trackers(args), directory=args.save, identities=identities(args), describe=describe,
    ))
    return [*callbacks, RunSummary(packed=packed), _watchdog(args, context)]  # watched until everything has ended


def _sample_views(
    job: JobConfig, spec: ModelSpec, model_config: ModelConfig, media: MediaSettings | None,
    eval_loader: BatchLoader | None,
) -> SampleViews | None:
    """The held-out samples that evaluations hand to reports."""
    args = job.args
    if eval_loader is None or not args.eval_samples:
        return None
    tags = [f"<{kind}>" for kind in spec.media_kinds]
    return SampleViews(
        eval_loader.dataset,
        count=args.eval_samples,
        limit=args.eval_iters * args.global_batch_size,
        tokenizer=job.data.dataset_param.preprocess_parameters.model_name_or_path,
        placeholders=dict(zip(spec.placeholder_token_ids(model_config), tags, strict=False)),
        settings=media,
        turn_start=spec.chat_tokens[0] if spec.chat_tokens else "",
    )


def _describe(
    job: JobConfig, context: RunContext, loader: TrainLoader, eval_loader: BatchLoader | None
) -> Callable[[], dict[str, Any]]:
    """What trackers and the report record of the run; made when the first of them asks."""
    data = {
        "train": loader.summary,
        "evaluation": "" if eval_loader is None else eval_loader.summary,
        "samples_per_epoch": loader.samples_per_epoch,
        "data_sets": list(loader.dataset.channels),
        "fingerprint": context.progress.data,
    }
    return functools.cache(
        lambda: describe_run(job, context.backend, world_size=context.layout.world_size, data=data)
    )


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
    job: JobConfig, model: nn.Module, optimizer: ShardedOptimizer, backend: Backend, settings: Settings,
    facts: Mapping[str, Any], source: Path | None, lora: LoraRun | None,
) -> CheckpointManager | None:
    """Writes the run's checkpoints, if ``--save`` names a directory.

    ``facts``: of the model and its media, for the manifests; ``source``: what the run started from.
    """
    args = job.args
    if args.save is None:
        return None
    base, names, metadata = None, None, {**job.checkpoint_metadata(), **facts, RUN_KEY: run_identity()}
    if args.save_trainable_only and source is not None:
        base, names = base_of_run(source, moved_to=args.load_base, option="--load-base")
        names |= {name for name, setting in settings.items() if setting.saved}
        check_base_is_kept(args, Path(base.path))
        metadata[BASE_KEY] = dataclasses.asdict(base)
    export: dict[str, Any] = {}
    if lora is not None:
        metadata[LORA_KEY] = lora.recorded()
    if lora is not None and lora.is_all_that_is_saved(names or ()):
        laid_over = model_of_base(base, job.model.init_from_hf_path)
        export = {"complete": functools.partial(lora.export, base=laid_over), "complete_bytes": lora.export_bytes}
    optimizer_to_save = None if args.no_save_optim else optimizer
    return CheckpointManager(
        TrainingState(model, optimizer_to_save, backend, with_rng=not args.no_save_rng, names=names),
        SaveOptions(
            root=Path(args.save),
            asynchronous=args.async_save,
            keep_last=args.keep_last,
            keep_every=args.keep_every,
            keep_best=args.keep_best,
            failure_limit=args.save_failure_limit,
            timeout_minutes=args.distributed_timeout_minutes,
            **export,
        ),
        backend=backend,
        metadata=metadata,
    )


def _shard_and_allocate(model: Model, job: JobConfig, backend: Backend, layout: Layout) -> None:
    """Shard the model and allocate this rank's shards on the device; the values come from a checkpoint."""
    # FSDP2 moves tensors by exchanging their data, which not every device allows
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(backend.device))
    parallelize(model, layout=layout, config=job.fsdp)
    model.to_empty(device="cpu" if job.fsdp.offload_to_cpu else backend.device)
    for module in model.modules():  # constants stay on the device, also where parameters are offloaded
        for name, constant in module.named_buffers(recurse=False):
            setattr(module, name, constant.to(backend.device))
    model.reset_buffers()


def _warn_of_partial_state(args: TrainingArgs) -> None:
    """Log what a run resumed from this run's checkpoints will lack."""
    missing = [
        what
        for flag, what in ((args.no_save_optim, "optimizer state"), (args.no_save_rng, "RNG states"))
        if flag
    ]
    if args.save is not None and missing:
        logger.info(
            f"checkpoints will be saved without {' and '.join(missing)}: enough to export the model; "
            "a run resumed from them starts without these"
        )
