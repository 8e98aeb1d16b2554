"""From a checked recipe to a finished run: device, processes, model, optimizer, checkpoint, data, loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mindspeed_mm.arguments.flags import TrainingArgs
from mindspeed_mm.arguments.recipe import Recipe
from mindspeed_mm.backend.device import Backend, communication_note, select_backend, start_processes, stop_processes
from mindspeed_mm.backend.rate import matrix_rate
from mindspeed_mm.backend.store import own_store
from mindspeed_mm.data.loader import BatchLoader, TrainLoader
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.flops import FlopCount
from mindspeed_mm.models.geometry import Qwen3VLGeometry
from mindspeed_mm.models.qwen3vl import Qwen3VLModel
from mindspeed_mm.parallel.apply import parallelise
from mindspeed_mm.parallel.fsdp import DTYPES
from mindspeed_mm.parallel.mesh import Layout, build_layout
from mindspeed_mm.tools.profiler import StepTools
from mindspeed_mm.training.bad_samples import BadSamples
from mindspeed_mm.training.balance import RouterBalance
from mindspeed_mm.training.checkpoint.hf_weights import load_hf_weights
from mindspeed_mm.training.checkpoint.save_directory import held_save_directory
from mindspeed_mm.training.checkpoint.saver import SaveOptions, Saver
from mindspeed_mm.training.checkpoint.state import Progress, TrainingState, load_checkpoint
from mindspeed_mm.training.health import Health, reports_directory
from mindspeed_mm.training.optimizer import build_optimizer, build_schedule
from mindspeed_mm.training.restart import RUN_KEY, choose_start, run_identity
from mindspeed_mm.training.signals import StopRequest, exit_status
from mindspeed_mm.training.trainer import ForwardStep, Trainer
from mindspeed_mm.training.watch import Limits, Watch

ModelProvider = Callable[[Recipe, Qwen3VLGeometry, Backend], Qwen3VLModel]
DataProvider = Callable[[Recipe, Qwen3VLGeometry, Layout, Progress], tuple[TrainLoader, "BatchLoader | None"]]


def pretrain(
    recipe: Recipe, model_provider: ModelProvider, data_provider: DataProvider, forward_step: ForwardStep
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
    backend = select_backend(recipe.args.device)
    if recipe.args.deterministic_mode:
        backend.use_deterministic_kernels()
    start_processes(
        backend,
        timeout_minutes=recipe.args.distributed_timeout_minutes,
        host_tensors=recipe.fsdp.offload_to_cpu,
    )
    try:
        with held_save_directory(recipe.args.save):
            stopped = _run(recipe, backend, model_provider, data_provider, forward_step)
    finally:
        stop_processes()
    return exit_status(stopped=stopped)


def _run(
    recipe: Recipe,
    backend: Backend,
    model_provider: ModelProvider,
    data_provider: DataProvider,
    forward_step: ForwardStep,
) -> bool:
    """Train; returns whether the run was told to stop before its end."""
    args = recipe.args
    layout = build_layout(
        device_type=backend.device.type,
        sharding_size=recipe.fsdp.sharding_size,
        expert_size=args.expert_model_parallel_size,
        context_size=args.context_parallel_size,
    )
    recipe.check_world(world_size=layout.world_size)
    say = _Announcer(layout)
    say(f"{layout.world_size} process(es) on {backend.name}, torch {torch.__version__}")
    if note := communication_note(backend, args.distributed_backend):
        say(note)
    for line in recipe.describe_ignored():
        say(line)

    backend.seed(args.seed)
    geometry = Qwen3VLGeometry.from_pretrained(recipe.model.init_from_hf_path)
    recipe.check_geometry(geometry)
    with torch.device("meta" if args.init_model_with_meta_device else "cpu"):
        model = model_provider(recipe, geometry, backend)
    _shard_and_allocate(model, recipe, backend, layout)
    optimizer = build_optimizer(model, args)
    schedule = build_schedule(optimizer, args)
    say(_describe(model))
    progress = _load(recipe, model, optimizer, backend, say)
    _restore_schedule(recipe, schedule, progress)

    with say.log():
        loader, eval_loader = data_provider(recipe, geometry, layout, progress)
    _check_order(recipe, progress, loader, say)
    progress.seed, progress.samples_per_epoch = args.seed, loader.samples_per_epoch
    _warn_of_losses(recipe, say)
    say(
        f"data: {loader.summary}; training from iteration {progress.iteration + 1} to {args.train_iters}"
    )
    with StopRequest() as stop_request, _watch(args, layout) as watch:
        trainer = Trainer(
            args=args,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            loader=loader,
            forward_step=forward_step,
            loss_mode=recipe.loss_mode,
            layout=layout,
            backend=backend,
            progress=progress,
            merge_unit=geometry.vision.merge_unit,
            tools=StepTools(
                recipe.tools,
                rank=layout.rank,
                profiler=backend.profiler(),
                memory_history=backend.memory_history(),
            ),
            router_balance=_router_balance(recipe, geometry),
            flop_count=_flop_count(recipe, geometry),
            peak_tflops=_peak_tflops(recipe, backend, say),
            eval_loader=eval_loader,
            bad_samples=BadSamples(recipe.data.dataloader_param.bad_sample_limit),
            packed=recipe.data.dataset_param.basic_parameters.packs,
            saver=_saver(recipe, model, optimizer, backend),
            step_hooks=[Health(args, model=model, describe=loader.dataset.describe)],
            stop_requested=stop_request,
            clock=watch.clock,
        )
        trainer.train()
    stopped = trainer.stopped and progress.iteration < args.train_iters
    _say_end(args, progress, stopped=stopped, backend=backend, say=say)
    return stopped


def _say_end(args: TrainingArgs, progress: Progress, *, stopped: bool, backend: Backend, say: _Announcer) -> None:
    how = "stopped, as it was told to," if stopped else "finished"
    peak = backend.peak_memory_bytes() / 2**30
    say(f"training {how} at iteration {progress.iteration}; peak memory {peak:.2f} GiB")
    if stopped:
        say(f"to continue: --load {args.save}" if args.save else "nothing was saved: there is no --save")


def _watch(args: TrainingArgs, layout: Layout) -> Watch:
    return Watch(
        Limits.of(args),
        rank=layout.rank,
        world_size=layout.world_size,
        directory=reports_directory(args),
        connect=lambda: own_store("watch", timeout_seconds=max(1.0, args.heartbeat_timeout)),
    )


def _flop_count(recipe: Recipe, geometry: Qwen3VLGeometry) -> FlopCount:
    encoder = recipe.model.image_encoder
    return FlopCount(
        geometry=geometry,
        train_vision=not encoder.vision_encoder.freeze,
        train_projector=not encoder.vision_projector.freeze,
        train_text=not recipe.model.text_decoder.freeze,
    )


def _peak_tflops(recipe: Recipe, backend: Backend, say: _Announcer) -> float | None:
    """What MFU compares with: as given, or measured for 0."""
    if recipe.args.peak_tflops != 0:
        return recipe.args.peak_tflops
    rate = matrix_rate(backend, DTYPES[recipe.fsdp.param_dtype])
    say(f"one large {recipe.fsdp.param_dtype} matrix product runs at {rate:.3g} TFLOP/s here: MFU compares with that")
    return rate


def _router_balance(recipe: Recipe, geometry: Qwen3VLGeometry) -> RouterBalance | None:
    coefficient = recipe.router_aux_loss_coef
    return RouterBalance(coefficient, top_k=geometry.text.num_experts_per_token) if coefficient else None


def _saver(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, backend: Backend) -> Saver | None:
    """What writes the run's checkpoints, if any are to be written."""
    args = recipe.args
    if args.save is None:
        return None
    optimizer_to_save = None if args.no_save_optim else optimizer
    return Saver(
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
        metadata={**recipe.checkpoint_metadata(), RUN_KEY: run_identity()},
    )


class _Announcer:
    """Prints on the main process, with seconds since the start, where start-up time goes."""

    def __init__(self, layout: Layout) -> None:
        self.is_main = layout.is_main
        self.started = time.perf_counter()

    def __call__(self, message: str) -> None:
        if self.is_main:
            print(f" [{time.perf_counter() - self.started:6.1f} s] {message}", flush=True)

    @contextlib.contextmanager
    def log(self) -> Iterator[None]:
        """Print what the package's own loggers say, too; other processes keep to their warnings."""
        logger, handler = logging.getLogger("mindspeed_mm"), _LogHandler(self)
        if not self.is_main:
            yield
            return
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


class _LogHandler(logging.Handler):
    """Hands log records to an announcer."""

    def __init__(self, say: _Announcer) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


def _shard_and_allocate(model: Qwen3VLModel, recipe: Recipe, backend: Backend, layout: Layout) -> None:
    """Shard the model and give this process's shards storage on the device; the values come from a checkpoint."""
    # FSDP2 moves what is elsewhere by exchanging a tensor's data, which not every device allows
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(backend.device))
    parallelise(model, layout=layout, config=recipe.fsdp)
    model.to_empty(device="cpu" if recipe.fsdp.offload_to_cpu else backend.device)
    for module in model.modules():  # constants are wanted on the device wherever the parameters are kept
        for name, constant in module.named_buffers(recurse=False):
            setattr(module, name, constant.to(backend.device))
    model.reset_buffers()


def _describe(model: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"model: {total / 1e6:,.1f} M parameters, {trainable / 1e6:,.1f} M of them trained"


def _load(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.AdamW, backend: Backend, say: _Announcer
) -> Progress:
    start = choose_start(recipe.args)
    for note in start.notes:
        say(note)
    path = start.path
    if path is None:
        directory = recipe.model.init_from_hf_path
        load_hf_weights(model, directory)
        say(f"loaded the weights of {directory}; no --load was given")
        return Progress()
    converted = not Progress.is_training(path)
    progress = load_checkpoint(
        path,
        model=model,
        optimizer=optimizer if start.with_optimizer and not converted else None,
        backend=backend,
        with_rng=start.with_rng and not converted,
        check=recipe.args.check_load,
    )
    said = {"read": "checksums of what was read agree", "all": "all checksums agree", "sizes": "checksums not compared"}
    say(f"loaded {path}; {said[recipe.args.check_load]}")
    return progress


def _restore_schedule(recipe: Recipe, schedule: Any, progress: Progress) -> None:
    """Continue the learning-rate schedule; one that differs from the flags' is the user's to decide."""
    if progress.schedule is None:
        return
    current = schedule.state_dict()
    differing = [
        f"{key} {saved!r} became {current[key]!r}"
        for key, saved in progress.schedule.items()
        if key not in ("num_steps", "wd_incr_steps") and current.get(key) != saved
    ]
    if differing and not recipe.args.override_opt_param_scheduler:
        raise UserError(
            f"the learning-rate schedule of {recipe.args.load} differs from the flags' ({'; '.join(differing)}); pass "
            "the flags of the first run, or --override-opt-param-scheduler to continue under the new schedule"
        )
    schedule.step(increment=progress.schedule["num_steps"] - schedule.num_steps)


def _warn_of_losses(recipe: Recipe, say: _Announcer) -> None:
    """Say what a run resumed from this run's checkpoints will not have."""
    args = recipe.args
    left_out = [
        what
        for flag, what in ((args.no_save_optim, "AdamW's moments"), (args.no_save_rng, "random generator states"))
        if flag
    ]
    if args.save is not None and left_out:
        say(
            f"checkpoints will be saved without {' and '.join(left_out)}: enough to export the model; "
            "a run resumed from them starts these anew"
        )


def _check_order(recipe: Recipe, progress: Progress, loader: Any, say: _Announcer) -> None:
    """Say so where the resumed run will not see the samples in the order of the first."""
    for name, saved, current in (
        ("--seed", progress.seed, recipe.args.seed),
        ("the number of samples per epoch", progress.samples_per_epoch, loader.samples_per_epoch),
    ):
        if saved is not None and saved != current:
            say(f"warning: {name} was {saved} when the checkpoint was written and is {current} now: "
                "the order of the samples differs from the first run's")
