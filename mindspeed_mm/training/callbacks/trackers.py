"""Experiment trackers: rank 0 hands each step's metrics to a thread per tracker, which never holds training up.

A tracker that fails, or whose network is down, is reported once; training and the other trackers go on. What a tracker
needs to continue its run after a resume is kept in ``trackers.json`` in the ``--save`` directory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mindspeed_mm.checkpoint.files import make_directory, write_atomically
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.inputs import read_json, reason
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.metrics import StepRecord
from mindspeed_mm.training.run_description import without_secrets
from mindspeed_mm.training.signals import STOPPED_STATUS

logger = logging.getLogger(__name__)

STATE_FILE = "trackers.json"
_QUEUED = 2000  # steps that wait for a slow tracker; more are skipped
_RETRY_SECONDS = 10.0  # between a failure to log and the next attempt
_GIVE_UP = 30  # failures in a row
_FINISH_SECONDS, _STOPPED_SECONDS = 60.0, 10.0  # at the end of a run, and of one that was asked to stop
_GUARD_SECONDS, _CHILD_SECONDS = 5.0, 2.0  # for the process to end, and then for its children
_PERFORMANCE = ("seconds", "data_wait_seconds", "tflop", "mfu", "peak_memory_gib")
_DATA = ("consumed_samples", "tokens", "target_tokens", "samples", "skipped_unusable", "skipped_too_long",
         "skipped_no_target")
_VALIDATION = "validation_"
_LEFT_OUT = ("stop_requests",)


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        name: of the run.
        project: that it belongs to.
        id: of the run that is continued, or that a new one should take if the tracker lets it be chosen.
        resumed: whether ``id`` is a run that is continued.
        first_iteration: the first that will be logged; the run may have logged it, and later ones, before.
        config: the run as nested plain values, see :func:`~mindspeed_mm.training.run_description.describe_run`.
    """

    name: str
    project: str
    id: str
    resumed: bool
    first_iteration: int
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something to log: a step's metrics, or an evaluation's with some of its samples.

    Attributes:
        iteration: from 1.
        metrics: by grouped name, see :func:`grouped`.
        samples: of an evaluation.
        seconds: since the epoch.
    """

    iteration: int
    metrics: Mapping[str, float]
    samples: Sequence[EvaluatedSample] = ()
    seconds: float = dataclasses.field(default_factory=time.time)


class Tracker(Protocol):
    """An experiment tracker. All methods are called in one thread of rank 0; whatever they raise is reported.

    Attributes:
        name: as in ``--report-to``.
        pause_seconds: between two calls of ``log``, so that a request has several steps.
    """

    name: str
    pause_seconds: float = 0.0

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Begin a run or continue one; returns the run's id, and where it can be seen (or an empty string)."""

    def log(self, entries: Sequence[Entry]) -> None:
        """Log entries, in their order, of iterations that never decrease."""

    def flush(self) -> None:
        """Write to disk what was logged, if the tracker does not by itself."""

    def finish(self, *, failed: bool) -> None:
        """End the run; ``failed``: by an error."""


def grouped(name: str) -> str:
    """The tracker's name of a metric of metrics.jsonl: below train, validation, performance or data."""
    if name.startswith(_VALIDATION):
        return f"validation/{name.removeprefix(_VALIDATION)}"
    base = name.partition("/")[0]
    if base in _PERFORMANCE or base.endswith("_per_device"):
        return f"performance/{name}"
    return f"data/{name}" if base in _DATA else f"train/{name}"


class Trackers(Callback):
    """Hands metrics to the trackers, on rank 0."""

    def __init__(
        self, trackers: Sequence[Tracker], *, directory: str | None, identities: Mapping[str, tuple[str, str]],
        describe: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Start nothing yet.

        Args:
            trackers: of this run.
            directory: ``--save``, where run ids are kept; None: every run is a new one.
            identities: (project, name) of a new run for each tracker.
            describe: gives the run as nested plain values; called once, on rank 0.
        """
        self._trackers = trackers
        self._state = _State(None if directory is None else Path(directory) / STATE_FILE)
        self._identities = identities
        self._describe = describe
        self._workers: list[_Worker] = []
        self._started = False

    def on_run_start(self, run: Run) -> None:
        """Keep the run, and forget the run ids of an earlier one."""
        self._run = run
        self._active = run.context.layout.is_main and bool(self._trackers)
        if self._active:
            self._state.open(new=not run.context.progress.iteration)

    def on_step_end(self, record: StepRecord) -> None:
        """Hand on the step's metrics.

        The threads start with the first step: by then the data workers, which are forked, have started.
        """
        if self._active and not self._started:
            self._start(record.iteration)
        metrics = {grouped(name): value for name, value in record.metrics.items() if name not in _LEFT_OUT}
        self._put(Entry(record.iteration, metrics))

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """Hand on the evaluation's metrics and samples."""
        self._put(Entry(iteration, {grouped(name): value for name, value in metrics.items()}, samples))

    def on_save(self, iteration: int) -> None:
        """A resumed run continues after this step, so that it should be on disk."""
        for worker in self._workers:
            worker.flush()

    def on_run_end(self, *, failed: bool) -> None:
        """End the trackers, within a time limit for all of them together."""
        early = failed or self._run.stopped
        limit = _STOPPED_SECONDS if early else _FINISH_SECONDS
        for worker in self._workers:
            worker.close(failed=failed)
        deadline = time.monotonic() + limit
        late = [worker for worker in self._workers if not worker.wait(deadline)]
        if late:
            names = ", ".join(worker.name for worker in late)
            logger.warning(f"{names}: not finished within {limit:g} s, and left; its last data may be missing there")
            # as pretrain would end it; the launcher reads the status of a stop from a file
            stopped = self._run.stopped and "TORCHELASTIC_RUN_ID" not in os.environ
            _guard_exit(1 if failed else STOPPED_STATUS if stopped else 0)

    def _start(self, iteration: int) -> None:
        self._started = True
        try:
            config = self._describe()
        except Exception as error:  # never the reason for a run to end
            logger.warning(f"trackers get no description of the run: {reason(error)}")
            config = {}
        for tracker in self._trackers:
            project, name = self._identities[tracker.name]
            run = self._state.identify(tracker.name, project=project, name=name, iteration=iteration, config=config)
            worker = _Worker(tracker, run, self._state)
            self._workers.append(worker)
            worker.start()

    def _put(self, entry: Entry) -> None:
        for worker in self._workers:
            worker.put(entry)


class _State:
    """``trackers.json``: tracker -> id, project and name of its run. Written by the trackers' threads."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._runs: dict[str, dict[str, str]] = {}

    def open(self, *, new: bool) -> None:
        """Read the file; ``new``: the run starts at iteration 0, and continues none of its runs."""
        if new or self._path is None or not self._path.exists():
            return
        try:
            content = read_json(self._path)
        except UserError as error:
            logger.warning(f"{error}: trackers begin new runs")
            return
        texts = ("id", "project", "name")
        self._runs = {
            name: {text: run[text] for text in texts} for name, run in content.items()
            if isinstance(run, dict) and all(isinstance(run.get(text), str) for text in texts)
        }

    def identify(
        self, tracker: str, *, project: str, name: str, iteration: int, config: Mapping[str, Any]
    ) -> TrackedRun:
        """The run to continue, if this project has one, else a new one."""
        known = self._runs.get(tracker)
        if known is not None and known["project"] == project:
            return TrackedRun(known["name"], project, known["id"], True, iteration, config)
        new = os.urandom(8).hex()
        return TrackedRun(name, project, new, False, iteration, config)

    def keep(self, tracker: str, run: TrackedRun) -> None:
        """Write down the run of a tracker that has started."""
        with self._lock:
            self._runs[tracker] = {"id": run.id, "project": run.project, "name": run.name}
            if self._path is not None:
                make_directory(self._path.parent)
                write_atomically(self._path, json.dumps(self._runs, indent=1).encode())


class _Worker:
    """The thread of one tracker, and what waits for it."""

    def __init__(self, tracker: Tracker, run: TrackedRun, state: _State) -> None:
        self.name = tracker.name
        self._tracker, self._tracked, self._state = tracker, run, state
        self._entries: collections.deque[Entry] = collections.deque()
        self._changed = threading.Condition()
        self._flush = self._closing = self._run_failed = self._ended = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Hand on an entry; one too many is skipped."""
        with self._changed:
            full = len(self._entries) >= _QUEUED
            if not full and not self._ended:
                self._entries.append(entry)
                self._changed.notify()
        if full:
            self._warn("full", f"{self.name} is slower than training by {_QUEUED} steps: iteration {entry.iteration} "
                               "and some later ones will be missing there")

    def flush(self) -> None:
        """Ask for a flush; does not wait."""
        with self._changed:
            self._flush = True
            self._changed.notify()

    def close(self, *, failed: bool) -> None:
        """Ask for the end, after all entries; does not wait."""
        with self._changed:
            self._closing, self._run_failed = True, failed
            self._changed.notify()

    def wait(self, deadline: float) -> bool:
        """Wait for the end; whether it came before ``deadline``, of the monotonic clock. Later errors are not news."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warned.add("failed")
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._begin()
            failures = 0
            while self._next():
                failures = 0 if self._log() else failures + 1
                if failures == _GIVE_UP:
                    return
                self._pause(_RETRY_SECONDS if failures else self._tracker.pause_seconds)
            self._tracker.finish(failed=self._run_failed)
        except BaseException as error:  # libraries end programs, too
            self._fail(error)
        finally:
            with self._changed:
                self._ended = True
                self._entries.clear()

    def _begin(self) -> None:
        identity, place = self._tracker.start(self._tracked)
        run = dataclasses.replace(self._tracked, id=identity)
        how = "continues" if run.resumed else "begins"
        logger.info(without_secrets(f"{self.name}: {how} run {run.name}{place and f' ({place})'}"))
        with contextlib.suppress(OSError, UserError):  # then a resumed run begins a new one; the disk is full
            self._state.keep(self.name, run)

    def _next(self) -> bool:
        """Wait for something to do; whether there is, but the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._flush or self._closing)
            return bool(self._entries) or self._flush

    def _log(self) -> bool:
        """Log what is there, and flush; whether it went well. What cannot be logged is not tried again: part may be."""
        with self._changed:
            flush, self._flush = self._flush, False
            entries = list(self._entries)
            self._entries.clear()
        try:
            if entries:
                self._tracker.log(entries)
            if flush:
                self._tracker.flush()
        except Exception as error:
            self._fail(error)
            return False
        return True

    def _pause(self, seconds: float) -> None:
        """Wait, but not at the end of the run."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=seconds)

    def _fail(self, error: BaseException) -> None:
        self._warn("failed", f"{self.name}: {type(error).__name__}: {reason(error)}; training continues, and data may "
                             "be missing there")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(without_secrets(message))


def _guard_exit(status: int) -> None:
    """End the process with ``status`` if a library that was left holds up its end: threads of its own, or its hooks.

    So does a process that the library has started, which keeps the launcher's log open.
    """

    def end() -> None:
        threading.main_thread().join()
        time.sleep(_GUARD_SECONDS)
        for number in (signal.SIGTERM, signal.SIGKILL):
            children = _children()
            for child in children:
                with contextlib.suppress(OSError):
                    os.kill(child, number)
            if children and number == signal.SIGTERM:
                time.sleep(_CHILD_SECONDS)
        os._exit(status)

    threading.Thread(target=end, name="exit guard", daemon=True).start()


def _children() -> list[int]:
    """Process ids of this process's children, also of those that one of its threads has started."""
    found = []
    for tasks in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in tasks.read_text().split()]
    return found
