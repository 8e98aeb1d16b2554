"""Watchdog: reports steps that take too long, and aborts the job when a rank is lost.

A thread of each rank follows what the training thread is doing. A step beyond its limit makes every rank write its
stack traces to a file; rank 0 logs a summary. Through the job's store each rank sends a heartbeat and checks the
others'. A rank without one is reported lost, and the other ranks stop instead of waiting for it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.callbacks.heartbeat import Heartbeat
from mindspeed_mm.training.context import PhaseTimer
from mindspeed_mm.training.signals import end_launcher_with

logger = logging.getLogger(__name__)

HANG_STATUS = 76
"""Exit status after a step that took too long, with ``--exit-on-hang``."""
LOST_STATUS = 77
"""Exit status after another rank was lost."""
_PROJECT = "mindspeed_mm"


@dataclasses.dataclass(frozen=True)
class WatchdogLimits:
    """When to report and when to abort.

    Attributes:
        factor: a step may take this many times the median of the last steps; 0: no limit.
        at_least_seconds: a shorter step is never reported.
        silence_seconds: without a heartbeat before a rank is lost; 0: never.
        exit_on_hang: stop after the report of a step that took too long.
        poll_seconds: between two checks.
        answer_seconds: rank 0 waits for the other ranks' summaries before it logs a report.
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


class Watchdog(Callback):
    """The threads; they read what the training thread does from ``phases``."""

    def __init__(
        self,
        limits: WatchdogLimits,
        *,
        phases: PhaseTimer,
        rank: int,
        world_size: int,
        directory: Path,
        connect: Callable[[], Any | None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Prepare; the threads start with the run.

        Args:
            limits: when to report and when to abort.
            phases: of the training thread.
            rank: of this process.
            world_size: number of ranks.
            directory: for reports.
            connect: opens a connection to the job's store; None where there is none, and so no other rank.
            end: ends this process with a status, at once.
        """
        self._phases = phases
        self._limits = limits
        self._rank = rank
        self._directory = directory
        self._connect = connect
        self._end = end
        self._name = f"rank {rank} on {socket.gethostname()}, process {os.getpid()}"
        self._training_thread = threading.get_ident()
        self._reported = -1  # last iteration that this rank wrote a report of
        self._closed = threading.Event()
        self._stopping = False
        self._heartbeat = Heartbeat(rank=rank, world_size=world_size, poll_seconds=limits.poll_seconds)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def on_run_start(self, run: Run) -> None:
        """Start the threads."""
        self._training_thread = threading.get_ident()
        if self._limits.factor or self._limits.silence_seconds:
            self._heartbeat.start(self._connect, lambda: f"{self._name}; {self._phases.describe()}", self._closed)
            self._thread.start()

    def on_run_end(self, *, failed: bool) -> None:
        """Stop the threads; the last heartbeat says that this rank has ended."""
        self._closed.set()
        self._heartbeat.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping and not self._closed.wait(self._limits.poll_seconds):
            if self._limits.silence_seconds and self._check_heartbeats():
                return
            overdue = self._phases.overdue(
                factor=self._limits.factor, at_least_seconds=self._limits.at_least_seconds
            )
            if overdue is not None and self._phases.iteration > self._reported:
                self._heartbeat.ask_for_reports(self._phases.iteration)
                self._report(self._phases.iteration, overdue)
            elif self._heartbeat.asked > self._reported:
                self._report(self._heartbeat.asked, overdue)

    def _report(self, iteration: int, overdue: tuple[float, float] | None) -> None:
        """Write this rank's stack traces; on rank 0 also log the summaries of all ranks."""
        self._reported = max(iteration, self._phases.iteration)
        summary = f"{self._phases.describe()}, {where(self._training_thread)}"
        path = self._directory / f"hang_iteration_{iteration:07d}_rank{self._rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self._name}\n{summary}\n\n{format_all_stacks()}")
        except OSError as error:
            summary += f" (no report: {path}: {error.strerror})"
        self._heartbeat.post_summary(iteration, summary)
        if self._rank == 0:
            taken = " takes too long on another rank;"
            if overdue is not None:
                taken = f" has taken {overdue[0]:.1f} s, the median is {overdue[1]:.2f} s;"
            summaries = self._heartbeat.gather_summaries(iteration, own=summary, seconds=self._limits.answer_seconds)
            lines = [f"iteration {iteration}{taken} stack traces of all ranks: {path.parent}"]
            lines += [f"   rank {rank}: {text or 'no answer'}" for rank, text in sorted(summaries.items())]
            logger.warning("\n".join(lines))
            self._heartbeat.mark_printed(iteration)
        if self._limits.exit_on_hang:
            self._heartbeat.wait_for_print(iteration, seconds=2 * self._limits.answer_seconds)
            self._stop("error: stopping, as --exit-on-hang asks", HANG_STATUS)

    def _check_heartbeats(self) -> bool:
        silent = self._heartbeat.silent(self._limits.silence_seconds)
        if silent:
            lost = [f"rank {rank} has been silent for {since:.0f} s (last: {last})" for rank, since, last in silent]
            self._stop(
                f"error: {'; '.join(lost)}: longer than --heartbeat-timeout {self._limits.silence_seconds:g}; its "
                "process hangs or its host is lost; stopping",
                LOST_STATUS,
            )
        return bool(silent)

    def _stop(self, message: str, status: int) -> None:
        self._stopping = True
        # Once per host, which has a log of its own. Not through logging: the training thread may hold its lock.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(message, file=sys.stderr, flush=True)
        end_launcher_with(status)
        self._end(status)


def format_all_stacks() -> str:
    """The Python stack traces of all threads, each under its name, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: names.get(item[0]) != "MainThread"):
        parts.append(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def where(ident: int) -> str:
    """The innermost call of a thread in one line: of this project, and beyond it."""
    frame = sys._current_frames().get(ident)
    if frame is None:
        return "its thread has ended"
    calls = traceback.extract_stack(frame)
    own = next((call for call in reversed(calls) if f"/{_PROJECT}/" in call.filename), None)
    innermost = calls[-1]
    text = _describe(innermost)
    return text if own is None or own is innermost else f"{_describe(own)} -> {text}"


def _describe(call: traceback.FrameSummary) -> str:
    return f"{call.name} ({'/'.join(call.filename.split('/')[-2:])}:{call.lineno})"
