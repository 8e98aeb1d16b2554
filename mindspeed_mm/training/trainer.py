"""The training loop: batches -> token weights -> forward and backward -> clip -> step -> log."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.transfer import DeviceEvent
from mindspeed_mm.checkpoint.manager import CheckpointManager
from mindspeed_mm.checkpoint.state import Progress
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.data.loader import StepBatches, dead_workers_named
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.moe import RouterLoad
from mindspeed_mm.models.qwen3_vl.model import ModelOutput
from mindspeed_mm.parallel.context_parallel import split_batch
from mindspeed_mm.parallel.fsdp import reshard
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.parallel.single_device import cached_compute_weights
from mindspeed_mm.tools.profiler import StepTools
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher
from mindspeed_mm.training.gradients import clip, total_norm
from mindspeed_mm.training.load_balancing import LoadBalancingLoss
from mindspeed_mm.training.log import DeviceSpeed
from mindspeed_mm.training.loss import LossMode, step_loss_weights
from mindspeed_mm.training.optimizer import AdamW
from mindspeed_mm.training.reports import Reporter, StepHook, StepReport
from mindspeed_mm.training.skipped_samples import BadSamples
from mindspeed_mm.training.step import StepResult, StepSums, StepTotals
from mindspeed_mm.training.watchdog import PhaseTimer

ForwardStep = Callable[[nn.Module, Batch, Tensor], ModelOutput]


class Trainer:
    """Runs optimizer steps until ``--train-iters`` and saves on the way."""

    def __init__(
        self,
        *,
        args: TrainingArgs,
        model: nn.Module,
        optimizer: AdamW,
        schedule: Any,
        loader: Iterable[StepBatches],
        forward_step: ForwardStep,
        loss_mode: LossMode,
        layout: Layout,
        backend: Backend,
        progress: Progress,
        merge_unit: int,
        tools: StepTools,
        load_balancing_loss: LoadBalancingLoss | None = None,
        eval_loader: Iterable[StepBatches] | None = None,
        bad_samples: BadSamples | None = None,
        packed: bool = False,
        checkpoint_manager: CheckpointManager | None = None,
        step_hooks: Sequence[StepHook] = (),
        stop_requested: Callable[[], bool] | None = None,
        clock: PhaseTimer | None = None,
        flop_count: Callable[[Batch], float] | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        """``packed``: steps vary in their number of samples, so the log counts them.

        ``step_hooks`` see each step once its numbers are read; ``stop_requested`` is asked on each rank in it.

        ``clock`` is told what the loop is doing.

        ``flop_count`` gives 10^12 operations of a whole micro-batch, ``peak_tflops`` what a device could do of them in
        a second: for the log.

        A run that any rank was asked to stop saves and ends on all of them after the same step.
        """
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loader = loader
        self.forward_step = forward_step
        self.loss_mode = loss_mode
        self.layout = layout
        self.backend = backend
        self.progress = progress
        self.tools = tools
        self.load_balancing_loss = load_balancing_loss
        self.eval_loader = eval_loader
        self.bad_samples = bad_samples or BadSamples(limit=0)
        self.checkpoint_manager = checkpoint_manager
        self.micro_batches = args.global_batch_size // (args.micro_batch_size * layout.dp_size)
        self.split_batch = _splitter(layout, merge_unit)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.stop_requested = stop_requested or (lambda: False)
        self.stopped = False  # before the end, because a process was asked to
        self.clock = clock or PhaseTimer()
        self.reporter = Reporter(
            log_interval=args.log_interval,
            train_iters=args.train_iters,
            global_batch_size=args.global_batch_size,
            log_tokens=args.log_tps,
            log_samples=packed,
            is_main=layout.is_main,
            lag=1 if backend.is_accelerator else 0,
            mark=lambda: DeviceEvent(backend.device),
            hooks=(self._check_samples, *step_hooks),
            speed=lambda: DeviceSpeed(layout.world_size, peak_tflops, backend.peak_memory_bytes()),
        )
        self.flop_count = flop_count or (lambda batch: 0.0)

    def train(self) -> None:
        """Run the remaining iterations."""
        self.model.train()
        with (
            dead_workers_named(),
            contextlib.closing(DevicePrefetcher(self.loader, self.backend, self.split_batch)) as self.prefetcher,
        ):
            self.reporter.restart_clock()
            try:
                self._train_steps(self.args, self.progress)
            except Exception:
                if self.checkpoint_manager is not None:
                    self.checkpoint_manager.abandon()
                raise
        if self.checkpoint_manager is not None:
            self.clock.pause("save")
            self.checkpoint_manager.finish()
        self.tools.close()

    def _train_steps(self, args: TrainingArgs, progress: Progress) -> None:
        stopping = False
        while progress.iteration < args.train_iters and not stopping:
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self.clock.begin_step(progress.iteration + 1)
            self.tools.step_begin(progress.iteration + 1)
            result = self.train_step()
            self.clock.enter("reading results")
            self.schedule.step(increment=args.global_batch_size)
            progress.iteration += 1
            progress.consumed_samples += args.global_batch_size
            self.stopped = stopping = self.reporter.add(
                StepReport(progress.iteration, progress.consumed_samples, learning_rate, result, self.prefetcher.waited)
            )
            stopping |= bool(args.exit_interval) and progress.iteration % args.exit_interval == 0
            self.tools.step_end(progress.iteration)
            self._evaluate_and_save(leaving=stopping)
        self.reporter.flush()

    def train_step(self) -> StepResult:
        """One optimizer step over this rank's micro-batches, queued on the device without waiting for any result."""
        self.clock.enter("waiting for data")
        data = self.prefetcher.take()
        self.clock.enter("counting tokens")
        batches = data.batches
        weights = step_loss_weights(batches, mode=self.loss_mode, layout=self.layout, device=self.backend.device)
        self.optimizer.zero_grad(set_to_none=True)
        totals = StepTotals(self._host_counts(data), self.backend.device)
        with cached_compute_weights(self.model):
            if self.load_balancing_loss is not None:
                self.load_balancing_loss.start_step(self._router_loads(batches[1:], weights[1:]))
            for batch, weight in zip(batches, weights, strict=True):
                self.clock.enter("forward")
                output = self.forward_step(self.model, batch, weight)
                router_loss = (
                    None if self.load_balancing_loss is None else self.load_balancing_loss.loss(output.router_load)
                )
                totals.add(batch, output, router_loss)
                loss = output.loss if router_loss is None else output.loss + router_loss
                self.clock.enter("backward")
                # FSDP2's reduction averages over the processes; the loss is a sum over them
                (loss * self.layout.world_size).backward()
        self.clock.enter("reduction")
        totals.reduce(stop=self.stop_requested())
        norm = total_norm(self.trainable)
        if self.args.clip_grad > 0:
            clip(self.trainable, max_norm=self.args.clip_grad, norm=norm.total)
        self.optimizer.step_where(totals.is_finite(norm.total))
        return totals.result(norm, has_router_loss=self.load_balancing_loss is not None, bad_messages=data.bad)

    def _host_counts(self, data: StepBatches) -> StepSums:
        """What this process knows of the step beforehand; those that share micro-batches count a share each."""
        share = 1.0 / self.layout.context_size
        target_tokens = sum(batch.num_target_tokens for batch in data.batches)
        return StepSums(
            tokens=data.tokens * share,
            target_tokens=target_tokens * share,
            samples=data.samples * share,
            bad=len(data.bad) * share,
            teraflop=sum(map(self.flop_count, data.batches)) * share,
        )

    def _check_samples(self, report: StepReport) -> None:
        self.bad_samples.check(report.result.bad, report.result.bad_messages)

    @torch.no_grad()
    def _router_loads(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Iterator[RouterLoad]:
        """What the routers choose in micro-batches whose turn is yet to come: a forward pass each."""
        for batch, weight in zip(batches, weights, strict=True):
            yield self.forward_step(self.model, batch, weight).router_load

    def _evaluate_and_save(self, *, leaving: bool) -> None:
        args, iteration = self.args, self.progress.iteration
        last = iteration == args.train_iters
        evaluates = self.eval_loader is not None and (last or iteration % args.eval_interval == 0)
        due = bool(args.save_interval) and iteration % args.save_interval == 0
        saves = self.checkpoint_manager is not None and (due or last or leaving)
        if self.checkpoint_manager is not None:
            self.checkpoint_manager.poll()
        if not (evaluates or saves):
            return
        self.reporter.flush()
        if evaluates:
            self.clock.pause("evaluation")
            loss = self.evaluate()
            if self.layout.is_main:
                print(f" validation loss at iteration {iteration} | loss: {loss:.6E} |", flush=True)
        if saves:
            self.clock.pause("save")
            self.save()
        self.reporter.restart_clock()

    def save(self) -> None:
        """Begin a checkpoint of the present iteration, which is complete when the saver says so."""
        if self.checkpoint_manager is not None:
            self.progress.schedule = self.schedule.state_dict()
            self.checkpoint_manager.start(self.progress)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy of the supervised tokens over at most ``--eval-iters`` steps of held-out data."""
        self.model.eval()
        sums, bad = torch.zeros(3, device=self.backend.device), []
        with cached_compute_weights(self.model):
            for data in itertools.islice(self.eval_loader, self.args.eval_iters * self.micro_batches):
                bad += data.bad
                for batch in data.batches:
                    batch = self.split_batch(batch).to(self.backend.device)
                    weight = torch.ones_like(batch.labels, dtype=torch.float32)
                    sums[0] += self.forward_step(self.model, batch, weight).loss
                    sums[1] += weight.numel()
        sums[2] = len(bad) / self.layout.context_size
        dist.all_reduce(sums)
        reshard(self.model)
        self.model.train()
        total, count, bad_count = sums.tolist()
        self.bad_samples.check(round(bad_count), bad)
        return total / max(1.0, count)


def _splitter(layout: Layout, merge_unit: int) -> Callable[[Batch], Batch]:
    """What takes this process's part of a micro-batch; all of it without context parallelism."""
    if layout.context_mesh is None:
        return lambda batch: batch
    return functools.partial(
        split_batch, rank=layout.context_mesh.get_local_rank(), size=layout.context_size, merge_unit=merge_unit
    )
