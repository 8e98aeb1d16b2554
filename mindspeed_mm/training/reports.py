"""From steps that the device has finished to log lines and to whoever follows the run."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable

from mindspeed_mm.backend.transfer import DeviceEvent
from mindspeed_mm.training.log import DeviceSpeed, IntervalStats, format_line
from mindspeed_mm.training.step import StepResult


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step, as the loop saw it.

    Attributes:
        iteration: from 1.
        consumed_samples: since the run began, over restarts, this step's included.
        learning_rate: that the step used.
        result: its numbers.
        waited: seconds that the host waited for the step's data.
    """

    iteration: int
    consumed_samples: int
    learning_rate: float
    result: StepResult
    waited: float


StepHook = Callable[[StepReport], None]
"""Called for each step in order, at the same place on all ranks; it may raise UserError, on all ranks alike."""


class Reporter:
    """Reads steps' numbers, hands them to the hooks and prints the log line of each interval.

    An accelerator's steps are read when the next one is queued already, so that the device never waits for the host.
    Their times are the device's own, from the end of one to the end of the next, whenever the host comes to read them.
    """

    def __init__(
        self,
        *,
        log_interval: int,
        train_iters: int,
        global_batch_size: int,
        log_tokens: bool,
        log_samples: bool = False,
        is_main: bool,
        lag: int,
        mark: Callable[[], DeviceEvent],
        hooks: tuple[StepHook, ...] = (),
        speed: Callable[[], DeviceSpeed] | None = None,
    ) -> None:
        """``lag``: steps that may be on their way when another is read; 0 reads each at once.

        ``mark`` makes a moment of the device.

        ``log_samples``: packing makes the number of samples vary; count and log them instead of the batch size.
        """
        self.log_interval = log_interval
        self.train_iters = train_iters
        self.global_batch_size = global_batch_size
        self.log_tokens = log_tokens
        self.log_samples = log_samples
        self.is_main = is_main
        self.lag = lag
        self.mark = mark
        self.hooks = hooks
        self.speed = speed
        self._pending: collections.deque[StepReport] = collections.deque()
        self._stats = IntervalStats()
        self._previous = mark()

    def add(self, report: StepReport) -> bool:
        """Take a step that was queued; read those that are due.

        Returns:
            Whether any step read so far was asked to stop.
        """
        self._pending.append(report)
        return self._read(keep=self.lag)

    def flush(self) -> bool:
        """Read all steps, waiting for the device; as before a checkpoint or at the end. Returns as ``add``."""
        return self._read(keep=0)

    def restart_clock(self) -> None:
        """Begin the next step's time now, when all are read: what happened since the last one belongs to no step."""
        self._previous = self.mark()

    def _read(self, *, keep: int) -> bool:
        stop = False
        while len(self._pending) > keep:
            report = self._pending.popleft()
            stop |= report.result.stop
            self._count(report)
            for hook in self.hooks:
                hook(report)
        return stop

    def _count(self, report: StepReport) -> None:
        result, previous = report.result, self._previous
        loss = result.loss  # waits for the device
        self._previous = result.ready
        self._stats.add(
            seconds=result.ready.seconds_since(previous),
            loss=loss,
            router_loss=result.router_loss,
            tokens=result.tokens,
            samples=result.sample_count if self.log_samples else self.global_batch_size,
            skipped=result.skipped,
            nan=not math.isfinite(loss),
            waited=report.waited,
            target_tokens=result.target_tokens,
            teraflop=result.teraflop,
        )
        if report.iteration % self.log_interval == 0 or report.iteration == self.train_iters:
            self._log(report)
            self._stats = IntervalStats()

    def _log(self, report: StepReport) -> None:
        if not self.is_main:
            return
        line = format_line(
            self._stats,
            iteration=report.iteration,
            train_iters=self.train_iters,
            consumed_samples=report.consumed_samples,
            learning_rate=report.learning_rate,
            global_batch_size=self.global_batch_size,
            grad_norm=report.result.grad_norm,
            log_tokens=self.log_tokens,
            log_samples=self.log_samples,
            speed=None if self.speed is None else self.speed(),
        )
        print(line, flush=True)
