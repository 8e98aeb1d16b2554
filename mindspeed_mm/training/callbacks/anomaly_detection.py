"""Anomaly detection: steps that were skipped because loss or gradients were not finite, and spikes.

A step is checked when its metrics have been read, which on an accelerator is one step late. All ranks check the same
metrics, so they act together.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.metrics import SampleLosses, StepRecord

logger = logging.getLogger(__name__)

_MAX_REPORTS = 100
_SHOWN = 3
_WINDOW = 100
_NEEDED = 20
_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution, as a multiple of its standard deviation
_SMALLEST_SPREAD = 0.01  # of the median: on a flat curve not every ripple is a spike


class SpikeDetector:
    """Compares each value with the median of the last 100, in units of their spread: robust against outliers."""

    def __init__(self, name: str, *, factor: float) -> None:
        """Begin without a history; none of the first 20 values is a spike.

        Args:
            name: of the value, for the message.
            factor: standard deviations, estimated from the median absolute deviation, above the median; 0: never.
        """
        self._name = name
        self._factor = factor
        self._values: deque[float] = deque(maxlen=_WINDOW)

    def check(self, value: float) -> str | None:
        """Add a step's value, unless it is not finite; returns a message if it is a spike."""
        if not math.isfinite(value):
            return None
        message = None
        if self._factor and len(self._values) >= _NEEDED:
            median = statistics.median(self._values)
            deviation = statistics.median(abs(other - median) for other in self._values)
            spread = max(_TO_SIGMA * deviation, _SMALLEST_SPREAD * abs(median))
            if value > median + self._factor * spread:
                message = (
                    f"{self._name} {value:.6g} is {(value - median) / spread:.1f} standard deviations above the "
                    f"median {median:.6g} of the last {len(self._values)} steps"
                )
        self._values.append(value)
        return message


class AnomalyDetector(Callback):
    """Reports steps that were skipped and spikes; stops a run that skips too many steps in a row."""

    def __init__(self, args: TrainingArgs, *, model: nn.Module, describe: Callable[[int], str]) -> None:
        """Begin without a history.

        Args:
            args: the limits, and where reports go: below ``--save``, or ``logs`` without it.
            model: whose parameters are trained.
            describe: file and record of a sample id.
        """
        self._limit = args.max_nonfinite_steps
        self._describe = describe
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._directory = reports_directory(args)
        self._spikes = (
            SpikeDetector("loss", factor=args.loss_alarm), SpikeDetector("gradient norm", factor=args.grad_norm_alarm)
        )
        self._in_a_row = 0
        self._reports = 0

    def on_step_end(self, record: StepRecord) -> None:
        """Report a step that was skipped, or a spike.

        Raises:
            UserError: on all ranks, if more than ``--max-nonfinite-steps`` in a row were skipped, or weights are not
                finite, which no step can mend.
        """
        loss, grad_norm = record.metrics["loss"], record.metrics["grad_norm"]
        if not record.metrics["skipped_step"]:
            self._in_a_row = 0
            messages = [
                message
                for spikes, value in zip(self._spikes, (loss, grad_norm), strict=True)
                if (message := spikes.check(value))
            ]
            if messages:
                self._write(record, "spike", " and ".join(messages))
            return
        self._in_a_row += 1
        what, value = ("norm of the gradients", grad_norm)
        if not math.isfinite(loss):
            what, value = ("loss", loss)
        if self._in_a_row == 1:
            self._check_parameters()
        path = self._write(record, "nonfinite", f"skipped, because the {what} is {value}")
        if self._in_a_row > self._limit:
            raise UserError(
                f"{self._in_a_row} steps in a row were skipped because loss or gradients are not finite, more than "
                f"--max-nonfinite-steps {self._limit}; the last one's samples: {path}; checkpoints are as they were: "
                "resume from the last one with a lower --lr or with --clip-grad, or remove those samples"
            )

    def _check_parameters(self) -> None:
        shards = {name: local(parameter.detach()) for parameter, name in self._names.items()}
        norms = {name: torch.linalg.vector_norm(shard, math.inf) for name, shard in shards.items() if shard.numel()}
        finite = torch.stack([norm.float() for norm in norms.values()]).isfinite().tolist() if norms else []
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, [name for name, is_finite in zip(norms, finite, strict=True) if not is_finite])
        if names := sorted({name for own in gathered for name in own}):
            more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
            raise UserError(f"NaN or infinity in {names[0]}{more}, with which no step can be finite; nothing is saved: "
                            "start from other weights, or resume from an earlier checkpoint")

    def _write(self, record: StepRecord, kind: str, reason: str) -> str:
        """Warn, and write a report of a step; returns where. Called by all ranks together."""
        self._reports += 1
        path = self._directory / f"iteration_{record.iteration:07d}_{kind}.json"
        if self._reports > _MAX_REPORTS:
            if dist.get_rank() == 0:
                logger.warning(f"iteration {record.iteration}: {reason}; {_MAX_REPORTS} reports are enough")
            return f"not written; {self._directory} has those of earlier steps"
        own = {
            "samples": [
                (index, *facts, self._describe(index)) for index, facts in sample_facts(record.details.samples).items()
            ],
            "gradients": self._nonfinite_gradients(record),
        }
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        if dist.get_rank() == 0:
            content = {
                "iteration": record.iteration,
                "reason": reason,
                "skipped": bool(record.metrics["skipped_step"]),
                "loss": _number(record.metrics["loss"]),
                "grad_norm": _number(record.metrics["grad_norm"]),
                "learning_rate": record.metrics["learning_rate"],
                "samples": _merge_samples(gathered),
                "parameters_with_nonfinite_gradients": sorted({name for own in gathered for name in own["gradients"]}),
            }
            logger.warning(f"iteration {record.iteration}: {reason}; its samples: {path}")
            for sample in content["samples"][:_SHOWN]:
                logger.warning(f"  mean loss {sample['mean_loss']} over {sample['tokens']} tokens: {sample['source']}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content, indent=1))
            except OSError as error:  # no reason to stop training
                logger.warning(f"{path} cannot be written: {error.strerror}")
        return str(path)

    def _nonfinite_gradients(self, record: StepRecord) -> list[str]:
        """Parameters whose gradients are not finite in this rank's shards; synchronises with the device."""
        return [
            self._names[parameter]
            for parameters, norms in record.details.gradient_norms
            for parameter, finite in zip(parameters, norms.isfinite().tolist(), strict=True)
            if not finite
        ]


def reports_directory(args: TrainingArgs) -> Path:
    """Where reports of anomalies and hangs are written."""
    return Path(args.save or "logs") / "reports"


def sample_facts(samples: Sequence[SampleLosses]) -> dict[int, tuple[float, int]]:
    """Sample id -> (sum of its cross-entropies, its target tokens) on this rank; synchronises with the device."""
    found: dict[int, tuple[float, int]] = {}
    for micro_batch in samples:
        owners, losses = micro_batch.label_sample.cpu(), micro_batch.token_losses.cpu().double()
        size = len(micro_batch.sample_ids)
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, owners, losses).tolist()
        counts = torch.bincount(owners, minlength=size).tolist()
        for index, total, count in zip(micro_batch.sample_ids, sums, counts, strict=True):
            former = found.get(index, (0.0, 0))
            found[index] = (former[0] + total, former[1] + count)
    return found


def _merge_samples(gathered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per sample, worst first; ranks of a context-parallel group each have a part of its tokens."""
    samples: dict[int, dict[str, Any]] = {}
    for rank, own in enumerate(gathered):
        for index, loss_sum, tokens, source in own["samples"]:
            entry = samples.setdefault(index, {"sum": 0.0, "tokens": 0, "ranks": [], "source": source})
            entry["sum"] += loss_sum
            entry["tokens"] += tokens
            entry["ranks"].append(rank)
    rows = []
    for index, entry in samples.items():
        mean = entry["sum"] / max(1, entry["tokens"])
        rows.append((math.isfinite(mean), -mean if math.isfinite(mean) else 0.0, index, mean, entry))
    return [
        {"sample": index, "source": entry["source"], "mean_loss": _number(mean), "tokens": entry["tokens"],
         "ranks": sorted(set(entry["ranks"]))}
        for _, _, index, mean, entry in sorted(rows, key=lambda row: row[:3])
    ]


def _number(value: float) -> float | str:
    """As JSON can hold it: NaN and infinity as strings."""
    return value if math.isfinite(value) else str(value)

