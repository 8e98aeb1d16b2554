"""The training loop: batches -> token weights -> forward and backward -> clip -> step -> log."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.arguments.flags import TrainingArgs
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.data.batch import Batch
from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.models.moe import RouterLoad
from mindspeed_mm.models.qwen3vl import ModelOutput
from mindspeed_mm.parallel.context import split_batch
from mindspeed_mm.parallel.fsdp import reshard
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.tools.profiler import StepTools
from mindspeed_mm.training.bad_samples import BadSamples
from mindspeed_mm.training.balance import RouterBalance
from mindspeed_mm.training.checkpoint.state import Progress, save_checkpoint
from mindspeed_mm.training.feed import Feed
from mindspeed_mm.training.gradients import clip, total_norm
from mindspeed_mm.training.log import IntervalStats, format_line
from mindspeed_mm.training.loss import LossMode, step_token_weights

ForwardStep = Callable[[nn.Module, Batch, Tensor], ModelOutput]


@dataclasses.dataclass
class StepResult:
    """Outcome of one optimizer step, the same on every rank.

    Attributes:
        loss: cross-entropy of the step.
        router_loss: what the auxiliary loss adds to it, coefficient included; None where there is none.
        grad_norm: before clipping.
        tokens: text and vision tokens of the step.
        skipped: whether the parameters were left alone because the loss or a gradient was not finite.
    """

    loss: float
    router_loss: float | None
    grad_norm: float
    tokens: int
    skipped: bool


class Trainer:
    """Runs optimizer steps until ``--train-iters`` and saves on the way."""

    def __init__(
        self,
        *,
        args: TrainingArgs,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        loader: Iterable[StepBatches],
        forward_step: ForwardStep,
        loss_mode: LossMode,
        layout: Layout,
        backend: Backend,
        progress: Progress,
        merge_unit: int,
        tools: StepTools,
        router_balance: RouterBalance | None = None,
        eval_loader: Iterable[StepBatches] | None = None,
        bad_samples: BadSamples | None = None,
        checkpoint_metadata: dict[str, Any] | None = None,
    ) -> None:
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
        self.router_balance = router_balance
        self.eval_loader = eval_loader
        self.bad_samples = bad_samples or BadSamples(limit=0)
        self.checkpoint_metadata = checkpoint_metadata or {}
        self.micro_batches = args.global_batch_size // (args.micro_batch_size * layout.data_size)
        self.split_batch = _splitter(layout, merge_unit)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(self) -> None:
        """Run the remaining iterations."""
        args, progress, stats = self.args, self.progress, IntervalStats()
        self.model.train()
        with contextlib.closing(Feed(self.loader, self.backend, self.split_batch)) as self.feed:
            self._train_steps(args, progress, stats)
        self.tools.close()

    def _train_steps(self, args: TrainingArgs, progress: Progress, stats: IntervalStats) -> None:
        while progress.iteration < args.train_iters:
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self.tools.step_begin(progress.iteration + 1)
            started = time.perf_counter()
            result = self.train_step()
            self.schedule.step(increment=args.global_batch_size)
            progress.iteration += 1
            progress.consumed_samples += args.global_batch_size
            stats.add(
                seconds=time.perf_counter() - started,
                loss=result.loss,
                router_loss=result.router_loss,
                tokens=result.tokens,
                samples=args.global_batch_size,
                skipped=result.skipped,
                nan=not math.isfinite(result.loss),
                waited=self.feed.waited,
            )
            self.tools.step_end(progress.iteration)
            if progress.iteration % args.log_interval == 0 or progress.iteration == args.train_iters:
                self._log(stats, learning_rate, result.grad_norm)
                stats = IntervalStats()
            self._evaluate_and_save()
            if args.exit_interval and progress.iteration % args.exit_interval == 0:
                break

    def train_step(self) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        data = self.feed.take()
        batches = data.batches
        weights = step_token_weights(batches, mode=self.loss_mode, layout=self.layout, device=self.backend.device)
        self.optimizer.zero_grad(set_to_none=True)
        if self.router_balance is not None:
            self.router_balance.start_step(self._router_loads(batches[1:], weights[1:]))
        # summed on the device: this process's cross-entropy, auxiliary loss, tokens and bad samples
        counts = [count / self.layout.context_size for count in (data.tokens, len(data.bad))]
        totals = torch.tensor([0.0, 0.0, *counts]).to(self.backend.device)
        for batch, weight in zip(batches, weights, strict=True):
            output = self.forward_step(self.model, batch, weight)
            loss = output.loss
            totals[0] += loss.detach()
            if self.router_balance is not None:
                router_loss = self.router_balance.loss(output.router_load)
                totals[1] += router_loss.detach()
                loss = loss + router_loss
            # FSDP2's reduction averages over the processes; the loss is a sum over them
            (loss * self.layout.world_size).backward()
        dist.all_reduce(totals)
        norm = total_norm(self.trainable)
        if self.args.clip_grad > 0:
            clip(self.trainable, max_norm=self.args.clip_grad, norm=norm)
        loss_value, router_value, tokens, bad, grad_norm = torch.cat((totals, norm.view(1))).tolist()
        self.bad_samples.check(round(bad), data.bad)
        finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        return StepResult(
            loss=loss_value,
            router_loss=None if self.router_balance is None else router_value,
            grad_norm=grad_norm,
            tokens=round(tokens),
            skipped=not finite,
        )

    @torch.no_grad()
    def _router_loads(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Iterator[RouterLoad]:
        """What the routers choose in micro-batches whose turn is yet to come: a forward pass each."""
        for batch, weight in zip(batches, weights, strict=True):
            yield self.forward_step(self.model, batch, weight).router_load

    def _log(self, stats: IntervalStats, learning_rate: float, grad_norm: float) -> None:
        if not self.layout.is_main:
            return
        line = format_line(
            stats,
            iteration=self.progress.iteration,
            train_iters=self.args.train_iters,
            consumed_samples=self.progress.consumed_samples,
            learning_rate=learning_rate,
            global_batch_size=self.args.global_batch_size,
            grad_norm=grad_norm,
            log_tokens=self.args.log_tps,
        )
        print(line, flush=True)

    def _evaluate_and_save(self) -> None:
        args, iteration = self.args, self.progress.iteration
        last = iteration == args.train_iters
        if self.eval_loader is not None and args.eval_interval and (iteration % args.eval_interval == 0 or last):
            loss = self.evaluate()
            if self.layout.is_main:
                print(f" validation loss at iteration {iteration} | loss: {loss:.6E} |", flush=True)
        leaving = bool(args.exit_interval) and iteration % args.exit_interval == 0
        due = bool(args.save_interval) and iteration % args.save_interval == 0
        if args.save is not None and (due or last or leaving):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the present iteration."""
        started = time.perf_counter()
        self.progress.schedule = self.schedule.state_dict()
        target = save_checkpoint(
            Path(self.args.save),
            progress=self.progress,
            model=self.model,
            optimizer=None if self.args.no_save_optim else self.optimizer,
            backend=self.backend,
            with_rng=not self.args.no_save_rng,
            metadata=self.checkpoint_metadata,
        )
        if self.layout.is_main:
            print(f" saved checkpoint {target} in {time.perf_counter() - started:.1f} s", flush=True)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy of the supervised tokens over at most ``--eval-iters`` steps of held-out data."""
        self.model.eval()
        sums, bad = torch.zeros(3, device=self.backend.device), []
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
