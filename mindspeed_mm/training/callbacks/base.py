"""The callback protocol, and what a callback may use of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.metrics import StepRecord


class Run(Protocol):
    """The trainer, as callbacks see it.

    Attributes:
        args: flags.
        model: the sharded model.
        schedule: learning-rate schedule.
        objective: what a step minimises.
        context: where the run trains and how far it is.
        stopping: whether the run ends after the present step, before ``--train-iters``.
        stopped: whether that is because a rank was asked to stop.
        finished_early: why the run is complete before ``--train-iters``; empty if it is not.
        router_choices: int64 [sparse layers, experts] on the device, how often each expert was chosen in the training
            steps since this process started, over all ranks; a new tensor in each step. None without experts.
        error: what the run ends with after its last save; None for nothing.
    """

    args: TrainingArgs
    model: nn.Module
    schedule: Any
    objective: Objective
    context: RunContext
    stopping: bool
    stopped: bool
    finished_early: str
    router_choices: Tensor | None
    error: UserError | None

    def stop_after_save(self, error: UserError) -> None:
        """Stop the run: save the current step, then raise ``error``. Called on all ranks for the same step."""

    def stop_on_request(self) -> None:
        """Stop the run after the present step, as if its metrics had had the request. Called on all ranks together."""

    def finish_early(self, reason: str) -> None:
        """End the run as complete: save the current step first. Called on all ranks for the same step."""

    def paused(self, phase: str) -> AbstractContextManager[None]:
        """Between two steps: all records are read first, and the time inside belongs to no step."""

    def notify(self, event: str, *arguments: Any) -> None:
        """Call the method ``event`` of every callback."""


class Callback:
    """Follows a run. Each method is called on every rank at the same place, in the order of the trainer's list.

    Whatever decides alike on all ranks may raise UserError, or call ``Run.stop_after_save``, which saves
    first. Methods do nothing by default.
    """

    def on_run_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step_start(self, iteration: int) -> None:
        """Before the step takes its data."""

    def on_step_queued(self, iteration: int) -> None:
        """After all work of the step was queued on the device; its metrics may not have been read yet."""

    def on_step_end(self, record: StepRecord) -> None:
        """The metrics of a step were read: on an accelerator one step late, or before a pause."""

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """An evaluation after ``iteration`` gave these metrics, equal on all ranks; ``samples``: some, on rank 0."""

    def on_save(self, iteration: int) -> None:
        """A checkpoint of ``iteration`` is about to be written; all its records were read."""

    def on_run_end(self, *, failed: bool) -> None:
        """The run ends; ``failed``: by an error."""
