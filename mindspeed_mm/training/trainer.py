"""The training loop: batches -> loss weights -> forward and backward -> clip -> step -> metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.backend.transfer import DeviceEvent
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.moe import RouterLoad
from mindspeed_mm.parallel.single_device import cached_compute_weights
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.channels import ChannelLosses, with_means
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.device_prefetcher import DevicePrefetcher
from mindspeed_mm.training.gradients import clip_factor, total_norm
from mindspeed_mm.training.load_balancing import max_load
from mindspeed_mm.training.loss import step_loss_weights
from mindspeed_mm.training.metrics import (
    QueuedStep,
    SampleLosses,
    StepDetails,
    StepMetrics,
    StepReader,
    StepRecord,
    gather_messages,
    rates_per_device,
)
from mindspeed_mm.training.optimizer import learning_rates
from mindspeed_mm.training.optimizers.base import ShardedOptimizer

_LOST = "lost"  # ranks without data; steps that have any are not reported
_CHOICES = "router_choices"  # of each expert in each sparse layer: stays on the device


class Trainer:
    """Runs optimizer steps until ``--train-iters``; all that follows a run is a callback.

    Attributes:
        stopping: whether the run ends after the present step, before ``--train-iters``.
        stopped: whether that is because a rank was asked to stop.
        finished_early: why the run is complete before ``--train-iters``; empty if it is not.
        error: what the run ends with after its last save; None for nothing.
    """

    def __init__(
        self,
        *,
        args: TrainingArgs,
        model: nn.Module,
        optimizer: ShardedOptimizer,
        schedule: Any,
        loader: DevicePrefetcher,
        objective: Objective,
        context: RunContext,
        callbacks: Sequence[Callback] = (),
        channels: Sequence[str] = (),
    ) -> None:
        """Prepare to train.

        Args:
            args: the flags.
            model: sharded.
            optimizer: of its trainable parameters.
            schedule: of the learning rate, in samples.
            loader: gives this rank's steps.
            objective: what is minimised.
            context: where the run trains, and how far it is.
            callbacks: called in their order.
            channels: names of the data sets whose losses are reported by themselves.
        """
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loader = loader
        self.objective = objective
        self.context = context
        self.callbacks = callbacks
        self.channels = tuple(channels)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.stopping = self.stopped = False
        self.finished_early = ""
        self.error: UserError | None = None
        self.router_choices: Tensor | None = None
        self._started: list[Callback] = []
        backend = context.backend
        self._reader = StepReader(lag=1 if backend.is_accelerator else 0, mark=lambda: DeviceEvent(backend.device))

    def train(self) -> None:
        """Run the remaining iterations.

        A run that any rank was asked to stop ends on all of them after the same step.

        Raises:
            UserError: what a callback has ended the run with, after the save.
        """
        self.model.train()
        with contextlib.closing(self.loader):
            try:
                for callback in self.callbacks:
                    callback.on_run_start(self)
                    self._started.append(callback)
                self.loader.start()
                self._reader.restart_clock()
                self._train_steps(self.args.exit_interval)
            except BaseException:
                self._end_run(failed=True)
                raise
        self._end_run(failed=False)
        if self.error is not None:
            iteration = self.context.progress.iteration
            saved = f" (saved first: iteration {iteration})" if self.args.save and iteration else ""
            raise UserError(f"{self.error}{saved}")

    def stop_after_save(self, error: UserError) -> None:
        """Stop the run: save the current step, then raise ``error``. Called on all ranks for the same step."""
        self.error = self.error or error
        self.stopping = True

    def stop_on_request(self) -> None:
        """Stop the run after the present step, as if its metrics had had the request. Called on all ranks together."""
        self.stopped = self.stopping = True

    def finish_early(self, reason: str) -> None:
        """End the run as complete: save the current step first. Called on all ranks for the same step."""
        self.finished_early = reason
        self.stopping = True

    def _train_steps(self, exit_interval: int | None) -> None:
        progress = self.context.progress
        while progress.iteration < self.args.train_iters and not self.stopping:
            iteration = progress.iteration + 1
            rates = learning_rates(self.optimizer, self.schedule)
            self.context.phases.begin_step(iteration)
            self.notify("on_step_start", iteration)
            if self.stopping:
                break
            metrics, details = self.train_step()
            self.context.phases.enter("reading results")
            self.schedule.step(increment=self.args.global_batch_size)
            progress.iteration = iteration
            progress.consumed_samples += self.args.global_batch_size
            known = {
                "consumed_samples": progress.consumed_samples,
                **rates,
                "data_wait_seconds": self.loader.waited,
            }
            self._report(self._reader.add(QueuedStep(iteration, known, metrics, details)))
            exits = bool(exit_interval) and iteration % exit_interval == 0
            self.stopping = self.stopped or self.error is not None or exits
            self.notify("on_step_queued", progress.iteration)
        self._report(self._reader.flush())

    def train_step(self) -> tuple[StepMetrics, StepDetails]:
        """One optimizer step over this rank's micro-batches, queued on the device without waiting for any result."""
        objective, phases = self.objective, self.context.phases
        layout, device = self.context.layout, self.context.backend.device
        phases.enter("waiting for data")
        data = self.loader.take()
        batches = data.batches
        phases.enter("counting tokens")
        weights = step_loss_weights(batches, mode=objective.loss_mode, layout=layout, device=device)
        self.optimizer.zero_grad(set_to_none=True)
        metrics, channels = StepMetrics(device), ChannelLosses(self.channels, device)
        samples = []
        with cached_compute_weights(self.model):
            if objective.load_balancing is not None:
                objective.load_balancing.start_step(self._router_loads(batches[1:], weights[1:]))
            for batch, weight in zip(batches, weights, strict=True):
                phases.enter("forward")
                output = objective.forward_step(self.model, batch, weight)
                samples.append(SampleLosses(batch.sample_ids, batch.label_sample, output.token_losses))
                channels.add(batch, output.token_losses)
                loss = output.loss
                metrics.add("loss", loss)
                if output.router_load is not None:
                    metrics.add(_CHOICES, output.router_load.choices)
                if objective.load_balancing is not None:
                    router_loss = objective.load_balancing.loss(output.router_load)
                    metrics.add("router_aux_loss", router_loss)
                    loss = loss + router_loss
                phases.enter("backward")
                # FSDP2's reduction averages over the ranks; the loss is a sum over them
                (loss * layout.world_size).backward()
        phases.enter("reduction")
        self._count(metrics, data)
        channels.add_to(metrics)
        metrics.reduce()
        self._count_choices(metrics)
        norm = total_norm(self.trainable)
        factor = clip_factor(self.args.clip_grad, norm.total) if self.args.clip_grad > 0 else None
        # where the gradients are: with offloaded ones the host steps, and waits for the loss
        complete = metrics["loss"].isfinite() & (metrics[_LOST] == 0)
        finite = complete.to(norm.total.device) & norm.total.isfinite()
        self.optimizer.step_where(finite, scale=factor)
        metrics.set("grad_norm", norm.total)
        metrics.set("skipped_step", 1.0 - finite.float())
        metrics.send()
        return metrics, StepDetails(tuple(samples), tuple(norm.parts), tuple(data.skipped.unusable), data.failure)

    def _count(self, metrics: StepMetrics, data: StepBatches) -> None:
        """Metrics that the host knows; of the ranks that share micro-batches the first counts for all."""
        counts = self.context.layout.rank % self.context.layout.context_size == 0
        metrics.add("tokens", counts * data.tokens)
        metrics.add("target_tokens", counts * sum(batch.num_target_tokens for batch in data.batches))
        metrics.add("samples", counts * data.samples)
        metrics.add("skipped_unusable", counts * len(data.skipped.unusable))
        metrics.add("skipped_too_long", counts * data.skipped.too_long)
        metrics.add("skipped_no_target", counts * data.skipped.no_target)
        metrics.add("tflop", counts * sum(map(self.objective.flop_count, data.batches)))
        metrics.add("stop_requests", self.context.stop_requested())
        metrics.add(_LOST, bool(data.failure))

    def _count_choices(self, metrics: StepMetrics) -> None:
        """Add the step's choices of experts, now of all ranks, to the run's; and how far the busiest expert is off."""
        if _CHOICES not in metrics:
            return
        choices = metrics[_CHOICES]
        metrics.set("router_max_load", max_load(choices))
        choices = choices.long()
        self.router_choices = choices if self.router_choices is None else self.router_choices + choices

    @torch.no_grad()
    def _router_loads(self, batches: Iterable[Batch], weights: Iterable[Tensor]) -> Iterator[RouterLoad]:
        """Router choices in later micro-batches: a forward pass each."""
        for batch, weight in zip(batches, weights, strict=True):
            yield self.objective.forward_step(self.model, batch, weight).router_load

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Between two steps: all records are read first, and the time inside belongs to no step."""
        self._report(self._reader.flush())
        self.context.phases.pause(phase)
        yield
        self._reader.restart_clock()

    def notify(self, event: str, *arguments: Any) -> None:
        """Call the method ``event`` of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _report(self, records: Iterable[StepRecord]) -> None:
        """Hand records that were read to the callbacks."""
        context = self.context
        for record in records:
            self.stopped |= record.metrics["stop_requests"] > 0
            if record.metrics.pop(_LOST):
                self._take_back(record)
                continue
            with_means(record.metrics, self.channels)
            rates = rates_per_device(
                record.metrics, devices=context.layout.world_size, peak_tflops=context.peak_tflops
            )
            record.metrics.update(rates, peak_memory_gib=context.backend.peak_memory_bytes() / 2**30)
            self.notify("on_step_end", record)

    def _take_back(self, record: StepRecord) -> None:
        """Stop at the step before ``record``, whose data a rank could not load; no parameter has changed since."""
        progress = self.context.progress
        surplus = progress.iteration - (record.iteration - 1)
        if surplus > 0:
            samples = surplus * self.args.global_batch_size
            progress.iteration -= surplus
            progress.consumed_samples -= samples
            self.schedule.step(increment=-samples)
        failures = gather_messages([record.details.failure] if record.details.failure else [])
        others = f" (and {len(failures) - 1} more ranks without data)" if len(failures) > 1 else ""
        self.stop_after_save(UserError(f"iteration {record.iteration}: {failures[0]}{others}"))

    def _end_run(self, *, failed: bool) -> None:
        """End every callback that has started, also after an error of another; raise that if the run had not failed."""
        errors: list[Exception] = []
        for callback in self._started:
            try:
                callback.on_run_end(failed=failed or bool(errors))
            except Exception as error:
                errors.append(error)
        if errors and not failed:
            raise errors[0]
