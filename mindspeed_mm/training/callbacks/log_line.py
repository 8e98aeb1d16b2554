"""The training log: one line per interval, in the spelling that launchers and their users search for."""

from __future__ import annotations

import datetime
import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.progress import format_seconds
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.logging_setup import RAW
from mindspeed_mm.training.metrics import StepRecord, rates_per_device

logger = logging.getLogger(__name__)

_LOSS = "loss/"  # of one data set of a mixture
_VALIDATION_LOSS = "validation_loss/"
_EVALUATED = (
    ("validation_loss", "loss", ".6E"), ("validation_token_accuracy", "token accuracy", ".4f"),
    ("validation_exact_match", "exact match", ".4f"),
)
_RECENT = 50  # steps that the remaining time is estimated from


class LogLine(Callback):
    """Logs the means over ``--log-interval`` steps, on rank 0."""

    def __init__(self, *, packed: bool) -> None:
        """``packed``: the number of samples in a step varies, so the line has it."""
        self._packed = packed
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._seen = 0  # steps since the start; the first one warms up

    def on_run_start(self, run: Run) -> None:
        """Take the flags."""
        self._args, self._context = run.args, run.context

    def on_step_end(self, record: StepRecord) -> None:
        """Add a step to the interval, and log the interval when it is complete."""
        args = self._args
        self._steps += 1
        for name, value in record.metrics.items():
            # a data set's mean is over its target tokens, of which steps have different numbers
            count = record.metrics["target_tokens/" + name.removeprefix(_LOSS)] if name.startswith(_LOSS) else 1.0
            self._sums[name] += value * count
        self._sums["nan"] += not math.isfinite(record.metrics["loss"])
        self._seen += 1
        if self._seen == 2:
            self._recent.clear()
        self._recent.append(record.metrics["seconds"])
        if record.iteration % args.log_interval == 0 or record.iteration == args.train_iters:
            logger.info(self._line(record), extra=RAW)
            self._sums.clear()
            self._steps = 0

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """Log the metrics of all samples, then those of each data set and channel."""
        fields = []
        names = [name.removeprefix(_VALIDATION_LOSS) for name in metrics if name.startswith(_VALIDATION_LOSS)]
        for name in ["", *names]:
            for metric, words, form in _EVALUATED:
                if (value := metrics.get(f"{metric}/{name}" if name else metric)) is not None:
                    fields.append(f"{words}{f' of {name}' if name else ''}: {value:{form}} |")
        logger.info(f" validation loss at iteration {iteration} | {' '.join(fields)}", extra=RAW)

    def _line(self, last: StepRecord) -> str:
        """The interval's line. A loss that is not finite stays visible as the interval's loss."""
        args, sums, steps = self._args, self._sums, self._steps
        samples = sums["samples"] if self._packed else args.global_batch_size * steps
        fields = [
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] iteration {last.iteration:8d}/{args.train_iters:8d}",
            f"consumed samples: {last.metrics['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {1000.0 * sums['seconds'] / steps:.1f}",
            f"learning rate: {last.metrics['learning_rate']:.6E}",
            f"global batch size: {args.global_batch_size:5d}",
        ]
        if self._packed:
            fields.append(f"samples per iteration: {samples / steps:.1f}")
        if args.log_tps:
            fields.append(f"tokens per sample: {sums['tokens'] / max(1, samples):.6E}")
        fields.append(f"loss: {sums['loss'] / steps:.6E}")
        means = {name: total / sums["target_tokens/" + name.removeprefix(_LOSS)]
                 for name, total in sums.items() if name.startswith(_LOSS)}
        fields += [f"{loss_of}: {loss:.6E}" for loss_of, loss in _channel_losses(means, _LOSS)]
        if "router_aux_loss" in sums:
            fields.append(f"router aux loss: {sums['router_aux_loss'] / steps:.6E}")
        fields += [
            "loss scale: 1.0",
            f"grad norm: {last.metrics['grad_norm']:.3f}",
            f"number of skipped iterations: {round(sums['skipped_step']):3d}",
            f"number of nan iterations: {round(sums['nan']):3d}",
            f"data wait: {100.0 * sums['data_wait_seconds'] / max(1e-9, sums['seconds']):.1f}%",
        ]
        rates = rates_per_device(
            sums, devices=self._context.layout.world_size, peak_tflops=self._context.peak_tflops
        )
        fields += [
            f"tokens/s per device: {rates['tokens_per_second_per_device']:.1f}",
            f"target tokens/s per device: {rates['target_tokens_per_second_per_device']:.1f}",
            f"TFLOP/s per device: {rates['tflop_per_second_per_device']:.4g}",
        ]
        if "mfu" in rates:
            fields.append(f"MFU: {100.0 * rates['mfu']:.1f}%")
        fields.append(f"peak memory (GiB): {last.metrics['peak_memory_gib']:.2f}")
        fields.append(f"remaining time: {self._remaining_time(args.train_iters - last.iteration)}")
        return " | ".join(fields) + " |"

    def _remaining_time(self, steps: int) -> str:
        """H:MM:SS, from the mean of recent steps."""
        return format_seconds(steps * sum(self._recent) / len(self._recent))


def _channel_losses(metrics: Mapping[str, float], prefix: str) -> list[tuple[str, float]]:
    """``loss of <data set>`` and the loss, for each metric with the prefix."""
    return [(f"loss of {name.removeprefix(prefix)}", metrics[name]) for name in metrics if name.startswith(prefix)]
