"""Watches over a run from threads beside it: steps that take far too long, and processes that have fallen silent.

Each process's watch knows what its training thread is doing and since when. Through the job's store it lets the others
know that it lives, and hears whether they do. A step beyond its limit makes every process write its stacks to a file;
rank 0 sums them up. A process that is not heard of is named, and the others stop instead of waiting for it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.training.heartbeat import Heartbeat
from mindspeed_mm.training.signals import end_launcher_with
from mindspeed_mm.training.stack_traces import format_all_stacks, where

HANG_STATUS = 76
"""Exit status after a step that took too long, with ``--exit-on-hang``."""
LOST_STATUS = 77
"""Exit status after another process was lost."""
_REMEMBERED = 50
_FIRST_STEPS = 5  # allocation, compilation and caches make them slow


@dataclasses.dataclass(frozen=True)
class WatchdogLimits:
    """When to speak up.

    Attributes:
        factor: a step may take this many times the median of the last steps; 0: as long as it likes.
        at_least_seconds: no step is too long before that.
        silence_seconds: a process may be silent for so long; 0: for ever.
        exit_on_hang: stop after the report of a step that took too long.
        poll_seconds: between two looks.
        answer_seconds: rank 0 waits for the others' words before it prints a report.
    """

    factor: float = 0.0
    at_least_seconds: float = 60.0
    silence_seconds: float = 0.0
    exit_on_hang: bool = False
    poll_seconds: float = 1.0
    answer_seconds: float = 10.0

    @classmethod
    def of(cls, args: TrainingArgs) -> WatchdogLimits:
        """As the flags say."""
        return cls(
            factor=args.hang_watch_factor,
            at_least_seconds=args.hang_watch_seconds,
            silence_seconds=args.heartbeat_timeout,
            exit_on_hang=args.exit_on_hang,
            poll_seconds=min(1.0, args.heartbeat_timeout / 5 or 1.0),
        )


class PhaseTimer:
    """What the training thread is doing, and how long its steps take; written by it, read by the watch."""

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
            if self._steps > 1:  # the first says nothing about the others
                self._durations.append(now - self._step_since)
        self.iteration, self._step_since = iteration, now

    def enter(self, phase: str) -> None:
        """The training thread begins something else."""
        self.phase, self.phase_since = phase, time.monotonic()

    def pause(self, phase: str) -> None:
        """The step has ended; ``phase``, a save or an evaluation, may take as long as it likes."""
        if self._step_since is not None:
            self.begin_step(self.iteration)
            self._step_since = None
        self.enter(phase)

    def overdue(self, limits: WatchdogLimits) -> tuple[float, float] | None:
        """(seconds of the present step, median) if it has taken too long."""
        began, durations = self._step_since, list(self._durations)
        if not limits.factor or began is None or self._steps < _FIRST_STEPS:
            return None
        taken, median = time.monotonic() - began, statistics.median(durations)
        limit = max(limits.at_least_seconds, limits.factor * median)
        return (taken, median) if taken > limit else None

    def describe(self) -> str:
        """For a report: what, and for how long."""
        return f"iteration {self.iteration}, {self.phase} for {time.monotonic() - self.phase_since:.1f} s"


class Watchdog:
    """The threads; the training thread tells them where it is through ``clock``."""

    def __init__(
        self,
        limits: WatchdogLimits,
        *,
        rank: int,
        world_size: int,
        directory: Path,
        connect: Callable[[], Any | None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Prepare to watch; threads start with the ``with`` block.

        Args:
            limits: when to speak up.
            rank: of this process.
            world_size: number of processes.
            directory: for reports.
            connect: opens a connection to the job's store; None where there is none, and so no other process.
            end: ends this process with a status, at once.
        """
        self.clock = PhaseTimer()
        self._limits = limits
        self._rank = rank
        self._directory = directory
        self._connect = connect
        self._end = end
        self._name = f"rank {rank} on {socket.gethostname()}, process {os.getpid()}"
        self._training_thread = threading.get_ident()
        self._reported = -1  # the last iteration that this process wrote a report of
        self._closed = threading.Event()
        self._stopping = False
        self._pulse = Heartbeat(rank=rank, world_size=world_size, poll_seconds=limits.poll_seconds)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start to watch."""
        self._training_thread = threading.get_ident()
        if self._limits.factor or self._limits.silence_seconds:
            self._pulse.start(self._connect, lambda: f"{self._name}; {self.clock.describe()}", self._closed)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say farewell, so that nobody misses this process, and stop."""
        self._closed.set()
        self._pulse.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping and not self._closed.wait(self._limits.poll_seconds):
            if self._limits.silence_seconds and self._look_for_silence():
                return
            overdue = self.clock.overdue(self._limits)
            if overdue is not None and self.clock.iteration > self._reported:
                self._pulse.ask_for_reports(self.clock.iteration)
                self._report(self.clock.iteration, overdue)
            elif self._pulse.asked > self._reported:
                self._report(self._pulse.asked, overdue)

    def _report(self, iteration: int, overdue: tuple[float, float] | None) -> None:
        """Write this process's stacks; on rank 0 also wait for the others' words and print them all."""
        self._reported = max(iteration, self.clock.iteration)
        summary = f"{self.clock.describe()}, {where(self._training_thread)}"
        path = self._directory / f"hang_iteration_{iteration:07d}_rank{self._rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self._name}\n{summary}\n\n{format_all_stacks()}")
        except OSError as error:
            summary += f" (no report: {path}: {error.strerror})"
        self._pulse.post_summary(iteration, summary)
        if self._rank == 0:
            taken = " takes another process too long;"
            if overdue is not None:
                taken = f" has taken {overdue[0]:.1f} s, the median is {overdue[1]:.2f} s;"
            summaries = self._pulse.gather_summaries(iteration, own=summary, seconds=self._limits.answer_seconds)
            lines = [f" warning: iteration {iteration}{taken} stacks of all processes: {path.parent}"]
            lines += [f"   rank {rank}: {text or 'no answer'}" for rank, text in sorted(summaries.items())]
            print("\n".join(lines), flush=True)
            self._pulse.mark_printed(iteration)
        if self._limits.exit_on_hang:
            self._pulse.wait_for_print(iteration, seconds=2 * self._limits.answer_seconds)
            self._stop("error: stopping, as --exit-on-hang asks", HANG_STATUS)

    def _look_for_silence(self) -> bool:
        silent = self._pulse.silent(self._limits.silence_seconds)
        if silent:
            words = [f"rank {rank} has been silent for {since:.0f} s (last: {last})" for rank, since, last in silent]
            self._stop(
                f"error: {'; '.join(words)}: longer than --heartbeat-timeout {self._limits.silence_seconds:g}; its "
                "process hangs or its host is lost; stopping",
                LOST_STATUS,
            )
        return bool(silent)

    def _stop(self, message: str, status: int) -> None:
        self._stopping = True
        # one voice per host: each host has a log of its own
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(message, file=sys.stderr, flush=True)
        end_launcher_with(status)
        self._end(status)
