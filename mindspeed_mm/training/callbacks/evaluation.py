"""Evaluation on held-out data while a run trains."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from mindspeed_mm.data.loader import StepBatches
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.evaluation.sample_views import SampleViews
from mindspeed_mm.evaluation.teacher_forcing import RankScores, Scores, ScoreSums
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.parallel.fsdp import reshard
from mindspeed_mm.parallel.single_device import cached_compute_weights
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.logging_setup import RANK_0_ONLY

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Found:
    """What one rank found in an evaluation.

    Attributes:
        skipped: file, sample and reason of each sample that cannot be used.
        unfit: number of samples that are too long or have no target token.
        failure: why this rank's data could not be loaded.
        scores: of the others.
    """

    skipped: list[str] = dataclasses.field(default_factory=list)
    unfit: int = 0
    failure: str = ""
    scores: RankScores | None = None


class Evaluation(Callback):
    """Evaluates every ``--eval-interval`` steps and after the last one."""

    def __init__(
        self, loader: Iterable[StepBatches], *, split: Callable[[Batch], Batch], skipped_samples: SkippedSamples,
        data_sets: Sequence[str] = (), views: SampleViews | None = None,
    ) -> None:
        """Evaluate nothing yet.

        Args:
            loader: micro-batches of held-out data; each evaluation starts from the first.
            split: takes this rank's part of a micro-batch.
            skipped_samples: counts those of this data, too.
            data_sets: names of those of a mixture, whose metrics are reported by themselves.
            views: makes the samples that other callbacks show; None for none.
        """
        self._loader = loader
        self._split = split
        self._skipped_samples = skipped_samples
        self._data_sets = tuple(data_sets)
        self._views = views
        self._samples: tuple[EvaluatedSample, ...] = ()
        self._warned: set[str] = set()

    def on_run_start(self, run: Run) -> None:
        """Take the model."""
        self._run = run

    def on_step_start(self, iteration: int) -> None:
        """Make up for an evaluation that was left when the run was asked to stop, before a resumed run goes on."""
        if self._run.context.progress.evaluation_due:
            self._evaluate(iteration - 1)

    def on_step_queued(self, iteration: int) -> None:
        """Evaluate if it is due, unless the run ends with an error."""
        args = self._run.args
        if iteration % args.eval_interval == 0 or iteration == args.train_iters:
            self._evaluate(iteration)

    def _evaluate(self, iteration: int) -> None:
        run = self._run
        with run.paused("evaluation"):
            if run.error is not None:
                return
            run.context.progress.evaluation_due = False
            metrics = self.evaluate()
            if metrics is not None:
                run.notify("on_evaluation", iteration, metrics, self._samples)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Evaluate on at most ``--eval-iters`` global batches of held-out data: the same samples in every layout.

        Returns:
            The metrics of :meth:`~mindspeed_mm.evaluation.teacher_forcing.Scores.metrics`.
            None if a rank cannot load its data: the run then stops, after a save; if the run is asked to stop; or if
            no held-out sample has a target token: 0 would look like a loss.
        """
        args, model, layout = self._run.args, self._run.model, self._run.context.layout
        count = args.eval_iters * args.global_batch_size // (args.micro_batch_size * layout.dp_size)
        model.eval()
        stop, found = _SharedFlag(self._run.context.backend.device), _Found()
        with cached_compute_weights(model):
            done = self._forward(count, stop, found)
        reshard(model)
        model.train()
        if stop.is_set:
            logger.info(f"evaluation aborted after {done} micro-batches: the run was asked to stop", extra=RANK_0_ONLY)
            self._run.context.progress.evaluation_due = True  # a resumed run makes it
            self._run.stop_on_request()
            return None
        of_ranks: list[_Found] = [found] * dist.get_world_size()
        dist.all_gather_object(of_ranks, found)
        if failures := sorted({one.failure for one in of_ranks} - {""}):
            self._run.stop_after_save(UserError(f"evaluation: {failures[0]}"))
            return None
        # ranks that share samples have each found all of what is wrong with them
        self._skipped_samples.check(sum(len(one.skipped) for one in of_ranks) // layout.context_size, found.skipped)
        scores = Scores.join([one.scores for one in of_ranks if one.scores is not None])
        metrics = scores.metrics(self._data_sets)
        self._warn(sum(one.unfit for one in of_ranks) // layout.context_size, scores)
        shows = layout.rank == 0 and self._views is not None
        self._samples = self._views.samples(scores) if shows and metrics else ()
        return metrics or None

    def _forward(self, count: int, stop: _SharedFlag, found: _Found) -> int:
        """Run the model on at most ``count`` micro-batches of this rank; returns their number."""
        run = self._run
        sums, done = ScoreSums(() if self._views is None else self._views.indices), 0
        for data in itertools.islice(self._loader, count):
            if stop.exchange(run.context.stop_requested()):
                return done
            found.skipped += data.skipped.unusable
            found.unfit += data.skipped.too_long + data.skipped.no_target
            found.failure = found.failure or data.failure
            for batch in data.batches:
                batch = self._split(batch)
                shown = sums.describe(batch)
                batch = batch.to(run.context.backend.device)
                weight = torch.ones_like(batch.labels, dtype=torch.float32)
                output = run.objective.forward_step(run.model, batch, weight)
                sums.add(batch, output.token_losses, output.predicted, shown)
            done += 1
        found.scores = sums.read()
        return done

    def _warn(self, unfit: int, scores: Scores) -> None:
        """Say once how many samples are too long or have no target, and whether there is nothing else."""
        none_left = not len(scores.indices)
        if unfit or none_left:
            self._warn_once(
                "unfit",
                f"evaluation: {unfit} held-out samples are longer than --seq-length or have no target token"
                f"{', and no other is left: there is no validation loss' if none_left else ''}",
            )
        if scores.too_many_channels:
            self._warn_once(
                "channels", f"evaluation: the records name {len(set(scores.channels))} channels, too many to report "
                "each: the column channel is left out (docs/evaluation.md)",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            logger.warning(message, extra=RANK_0_ONLY)
        self._warned.add(kind)


class _SharedFlag:
    """Whether any rank has raised a flag. All ranks learn of it in the same call, one call later, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._former: tuple[torch.Tensor, dist.Work] | None = None
        self.is_set = False

    def exchange(self, raised: bool) -> bool:
        """Send this rank's flag; whether any rank had raised it in the call before. Called by all ranks together."""
        if self._former is not None:
            flag, work = self._former
            work.wait()
            self.is_set = bool(flag.item())
        if not self.is_set:
            flag = torch.tensor(float(raised), device=self._device)
            self._former = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return self.is_set
