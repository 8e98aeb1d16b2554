"""The best checkpoints by a metric of the evaluations, and the end of a run that no longer improves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspeed_mm.checkpoint.best import BestSoFar, write_best
from mindspeed_mm.checkpoint.directory import BEST, iteration_name, read_tracker
from mindspeed_mm.checkpoint.save_directory import best_on_disk
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.schema import nearest
from mindspeed_mm.data.dataset import ChatDataset
from mindspeed_mm.data.loader import BatchLoader
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.evaluation.teacher_forcing import MOST_CHANNELS, SAMPLES
from mindspeed_mm.inputs import is_directory, is_present, reason
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.logging_setup import RANK_0_ONLY
from mindspeed_mm.training.resume import run_identity

logger = logging.getLogger(__name__)


class BestCheckpoint(Callback):
    """Compares evaluations by ``--metric-for-best``. Every rank sees the same metrics and decides alike.

    What it decides by is a part of the run's progress: a resumed run decides as an uninterrupted one.
    """

    def __init__(self, args: TrainingArgs) -> None:
        """``args``: the flags."""
        self._metric, self._keep = args.metric_for_best, args.keep_best
        self._patience, self._threshold = args.early_stopping_patience, args.early_stopping_threshold
        self._wanted: int | None = None

    def on_run_start(self, run: Run) -> None:
        """Take up what the checkpoint knows of the best ones."""
        self._run = run
        progress = run.context.progress
        former = progress.best
        if former is not None and former.metric != self._metric:
            logger.warning(
                f"--metric-for-best was {former.metric} when the checkpoint was written and is {self._metric} now: the "
                "best checkpoints are chosen anew", extra=RANK_0_ONLY,
            )
            former = BestSoFar(self._metric, runs=former.runs)
        progress.best = former or BestSoFar(self._metric)
        progress.best.add_run(run_identity())
        self._started_at = progress.iteration
        if self._records and self._is_newest(progress.iteration):  # they may have been lost, or not been writable
            self._record()
        if self._patience and progress.best.waited >= self._patience:  # it had ended for that
            self._stop(progress.iteration)

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """Rank the evaluation, and stop the run if too many have not improved."""
        best = self._run.context.progress.best
        if self._metric not in metrics:
            message = unknown_metric(self._metric, list(metrics))
            if "/" in self._metric:
                message += "; a name that only later samples have needs more --eval-iters"
            self._run.stop_after_save(UserError(message))
            return
        value = metrics[self._metric]
        if best.add(iteration, value, keep=self._keep):
            self._wanted = iteration
            args = self._run.args
            due = self._run.stopping or iteration in (args.train_iters, self._started_at)
            if not due and not (args.save_interval and iteration % args.save_interval == 0):
                best.only.append(iteration)
        waited = best.wait(value, threshold=self._threshold)
        logger.info(self._standing(iteration, value, best), extra=RANK_0_ONLY)
        if self._patience and waited >= self._patience and iteration < self._run.args.train_iters:
            self._stop(iteration)

    def _standing(self, iteration: int, value: float, best: BestSoFar) -> str:
        """How an evaluation compares with those before, in words."""
        parts = []
        if best.ranking:
            first, top = best.ranking[0]
            parts.append("the best so far" if first == iteration else f"the best is {top:.6g} of iteration {first}")
        if self._patience:
            parts.append(f"{best.waited} of {self._patience} evaluations without improvement")
        return f"{self._metric} {value:.6g}: {', '.join(parts)}"

    def wants(self, iteration: int) -> bool:
        """Whether a checkpoint of ``iteration`` is to be saved, as one of the best so far."""
        return self._wanted == iteration

    @property
    def _records(self) -> bool:
        return bool(self._keep) and self._run.context.layout.is_main and is_directory(self._run.args.save)

    def _is_newest(self, iteration: int) -> bool:
        try:
            return read_tracker(self._run.args.save) == iteration
        except UserError:
            return False

    def _record(self) -> list[tuple[int, float]] | None:
        """Have the ``--save`` directory say which of the run's checkpoints in it are the best.

        Returns:
            These; None, after a warning, if that fails.
        """
        root, progress = Path(self._run.args.save), self._run.context.progress
        try:
            kept = best_on_disk(root, progress.best, newest=progress.iteration, keep=self._keep)
            if kept:
                write_best(root, progress.best, kept)
        except OSError as error:
            logger.warning(f"the best checkpoints could not be recorded in --save {root}: {reason(error)}")
            return None
        return kept

    def on_run_end(self, *, failed: bool) -> None:
        """Say which checkpoint is the best. Comes after the last save has ended."""
        if failed or not self._records:
            return
        root, best = Path(self._run.args.save), self._run.context.progress.best
        kept = self._record()
        if kept is None:
            return
        if kept:
            (iteration, value), name = kept[0], root / BEST
            how = f"load it as {name}"
            if is_present(name):
                how = f"load it by this name, as {name} is there and is something else"
            logger.info(f"best checkpoint: {root / iteration_name(iteration)}, {self._metric} {value:.6g}; {how}")
        elif best.ranking:
            iteration, value = best.ranking[0]
            logger.info(f"no best checkpoint in {root}: the best is {value:.6g} of iteration {iteration}, which this "
                        "run has not saved there")
        else:
            logger.info(f"no best checkpoint: no evaluation had a {self._metric} that is a number")

    def _stop(self, iteration: int) -> None:
        best = self._run.context.progress.best
        by = f" by {self._threshold:g}" if self._threshold else ""
        reference = "" if best.reference is None else f" on {best.reference:.6g}"
        count = "1 evaluation" if best.waited == 1 else f"{best.waited} evaluations"
        self._run.finish_early(
            f"early stopping: {self._metric} has not improved{reference}{by} in {count}, up to "
            f"iteration {iteration} (--early-stopping-patience {self._patience})"
        )


def unknown_metric(name: str, known: Sequence[str]) -> str:
    """What is wrong with ``--metric-for-best`` where evaluations give other metrics."""
    known = [metric for metric in known if metric != SAMPLES]
    guess = nearest(name, known)
    remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(known)}"
    return f"--metric-for-best {name} is none of the evaluation's metrics; {remedy}"


def best_checkpoint(args: TrainingArgs, loader: BatchLoader | None) -> BestCheckpoint | None:
    """The callback, where a flag asks for it.

    Args:
        args: the flags.
        loader: of the held-out samples.

    Raises:
        UserError: if nothing is held out, or ``--metric-for-best`` is of a data set or channel that no evaluated sample
            is of.
    """
    if not args.keep_best and not args.early_stopping_patience:
        return None
    if loader is None:
        raise UserError("--keep-best and --early-stopping-patience need evaluations, and no sample is held out; raise "
                        "val_rate, or set val_dataset")
    metric, _, name = args.metric_for_best.partition("/")
    evaluated = args.eval_iters * args.global_batch_size
    names = _names_in_metrics(loader.dataset, evaluated) if name else None
    if names is not None and name not in names:  # None: the first evaluation knows
        if name in (_names_in_metrics(loader.dataset) or ()):
            raise UserError(f"--metric-for-best {args.metric_for_best}: {name} is not among the {evaluated} samples "
                            f"that an evaluation reads (--eval-iters {args.eval_iters} x --global-batch-size "
                            f"{args.global_batch_size}); raise --eval-iters")
        raise UserError(unknown_metric(args.metric_for_best, [metric, *(f"{metric}/{one}" for one in names)]))
    return BestCheckpoint(args)


def _names_in_metrics(dataset: ChatDataset, count: int | None = None) -> list[str] | None:
    """Names of data sets and channels that evaluations of the first ``count`` samples report.

    None where records are read one by one while training.
    """
    groups, data_sets = dataset.record_channels(count), dataset.channels
    if groups is None:
        return None
    channels = {channel for _, channel in groups} - {""}
    if len(channels) > MOST_CHANNELS:  # left out
        channels = set()
    if not data_sets:
        return sorted(channels)
    both = {f"{data_sets[number]}/{channel}" for number, channel in groups if channel in channels}
    return sorted({data_sets[number] for number, _ in groups} | both)
