"""What the trainer and its callbacks share: where a run trains, what it minimises, and what it is doing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable

from torch import Tensor, nn

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.model import ModelOutput
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.training.load_balancing import LoadBalancingLoss
from mindspeed_mm.training.loss import LossMode

ForwardStep = Callable[[nn.Module, Batch, Tensor], ModelOutput]
_REMEMBERED = 50
_FIRST_STEPS = 5  # allocation, compilation and caches make them slow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises.

    Attributes:
        forward_step: loss of the model on a micro-batch with the given loss weights.
        loss_mode: which mean of the token losses.
        load_balancing: auxiliary loss of the routers; None for none.
        flop_count: 10^12 operations of a whole micro-batch's forward and backward pass, for the log.
    """

    forward_step: ForwardStep
    loss_mode: LossMode
    load_balancing: LoadBalancingLoss | None = None
    flop_count: Callable[[Batch], float] = lambda batch: 0.0


class PhaseTimer:
    """What the training thread is doing, and how long its steps take; written by it, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.iteration = 0
        self.phase = "starting"
        self.phase_since = time.monotonic()
        self._step_since: float | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._steps = 0

    def begin_step(self, iteration: int) -> None:
        """A step begins, and with it the one before has ended."""
        now = time.monotonic()
        if self._step_since is not None:
            self._steps += 1
            if self._steps > 1:  # the first one is not typical
                self._durations.append(now - self._step_since)
        self.iteration, self._step_since = iteration, now

    def enter(self, phase: str) -> None:
        """The training thread begins something else."""
        self.phase, self.phase_since = phase, time.monotonic()

    def pause(self, phase: str) -> None:
        """The step has ended; ``phase``, a save or an evaluation, has no time limit."""
        if self._step_since is not None:
            self.begin_step(self.iteration)
            self._step_since = None
        self.enter(phase)

    def overdue(self, *, factor: float, at_least_seconds: float) -> tuple[float, float] | None:
        """(seconds of the present step, median) if it takes more than ``factor`` medians and ``at_least_seconds``."""
        began, durations = self._step_since, list(self._durations)
        if not factor or began is None or self._steps < _FIRST_STEPS:
            return None
        taken, median = time.monotonic() - began, statistics.median(durations)
        return (taken, median) if taken > max(at_least_seconds, factor * median) else None

    def describe(self) -> str:
        """For a report: what, and for how long."""
        return f"iteration {self.iteration}, {self.phase} for {time.monotonic() - self.phase_since:.1f} s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """Where a run trains and how far it is.

    Attributes:
        layout: this rank's place among the others.
        backend: the device.
        progress: steps and samples done; the trainer advances it, checkpoints store it.
        peak_tflops: 10^12 operations per second that a device could do, which MFU compares with; None for no MFU.
        stop_requested: whether this rank was asked to stop; asked once in each step.
        phases: what the training thread is doing, for the watchdog.
    """

    layout: Layout
    backend: Backend
    progress: Progress
    peak_tflops: float | None = None
    stop_requested: Callable[[], bool] = lambda: False
    phases: PhaseTimer = dataclasses.field(default_factory=PhaseTimer)
