"""Numerical health: steps that were skipped because something was not finite, and values that leap.

A step is judged when its numbers have come from the device, which may be later than the step itself: what a report
needs of it is kept until then. All processes judge the same numbers, so they act together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.reports import StepReport
from mindspeed_mm.training.spike_detection import SpikeDetector
from mindspeed_mm.training.step import SampleLosses

_MAX_REPORTS = 100
_SHOWN = 3


class AnomalyDetector:
    """Judges one step after the other, in their order: the trainer calls it with each step that it has read."""

    def __init__(self, args: TrainingArgs, *, model: nn.Module, describe: Callable[[int], str]) -> None:
        """Begin with no bad step.

        Args:
            args: the limits, and where reports go: below ``--save``, or ``logs`` without it.
            model: whose parameters are trained.
            describe: file and record of a sample id.
        """
        self._limit = args.max_nonfinite_steps
        self._describe = describe
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._directory = reports_directory(args)
        self._alarms = (
            SpikeDetector("loss", factor=args.loss_alarm), SpikeDetector("gradient norm", factor=args.grad_norm_alarm)
        )
        self._in_a_row = 0
        self._reports = 0

    def __call__(self, report: StepReport) -> None:
        """Report a step that was skipped, or that leaps. Called by all processes for every step.

        Raises:
            UserError: on all processes, if more than ``--max-nonfinite-steps`` in a row were skipped.
        """
        result = report.result
        if not result.skipped:
            self._in_a_row = 0
            messages = [
                message
                for alarm, value in zip(self._alarms, (result.loss, result.grad_norm), strict=True)
                if (message := alarm.check(value))
            ]
            if messages:
                self._write(report, "spike", " and ".join(messages))
            return
        self._in_a_row += 1
        what, value = ("norm of the gradients", result.grad_norm)
        if not math.isfinite(result.loss):
            what, value = ("loss", result.loss)
        path = self._write(report, "nonfinite", f"skipped, because the {what} is {value}")
        if self._in_a_row > self._limit:
            raise UserError(
                f"{self._in_a_row} steps in a row were skipped because loss or gradients are not finite, more than "
                f"--max-nonfinite-steps {self._limit}; the last one's samples: {path}; checkpoints are as they were: "
                "resume from the last one with a lower --lr or with --clip-grad, or leave those samples out"
            )

    def _write(self, report: StepReport, kind: str, reason: str) -> str:
        """Warn, and write what is known of a step; returns where. Called by all processes together."""
        self._reports += 1
        path = self._directory / f"iteration_{report.iteration:07d}_{kind}.json"
        if self._reports > _MAX_REPORTS:
            _say(f" warning: iteration {report.iteration}: {reason}; {_MAX_REPORTS} reports are enough")
            return f"not written; {self._directory} has those of earlier steps"
        own = {
            "samples": [
                (index, *facts, self._describe(index)) for index, facts in sample_facts(report.result.samples).items()
            ],
            "gradients": self._nonfinite_gradients(report),
        }
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        if dist.get_rank() == 0:
            content = {
                "iteration": report.iteration,
                "reason": reason,
                "skipped": report.result.skipped,
                "loss": _number(report.result.loss),
                "grad_norm": _number(report.result.grad_norm),
                "learning_rate": report.learning_rate,
                "samples": _merge_samples(gathered),
                "parameters_with_nonfinite_gradients": sorted({name for own in gathered for name in own["gradients"]}),
            }
            _say(f" warning: iteration {report.iteration}: {reason}; its samples: {path}")
            for sample in content["samples"][:_SHOWN]:
                _say(f"   mean loss {sample['mean_loss']} over {sample['tokens']} tokens: {sample['source']}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content, indent=1))
            except OSError as error:  # no reason to stop training
                _say(f" warning: {path} cannot be written: {error.strerror}")
        return str(path)


    def _nonfinite_gradients(self, report: StepReport) -> list[str]:
        """Names of the parameters whose gradients were not finite in this process's part; waits for the device."""
        return [
            self._names[parameter]
            for parameters, norms in report.result.gradient_norms
            for parameter, finite in zip(parameters, norms.isfinite().tolist(), strict=True)
            if not finite
        ]


def reports_directory(args: TrainingArgs) -> Path:
    """Where reports go."""
    return Path(args.save or "logs") / "reports"


def sample_facts(samples: Sequence[SampleLosses]) -> dict[int, tuple[float, int]]:
    """Sample id -> (sum of its cross-entropies, its supervised tokens) on this process; waits for the device."""
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
    """One entry per sample, worst first; processes of a context-parallel group know a part of its tokens each."""
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
    """As JSON can hold it: NaN and infinity in words."""
    return value if math.isfinite(value) else str(value)


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
