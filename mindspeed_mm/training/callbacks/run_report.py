"""``report.html`` in the ``--save`` directory: the run as a page, written again while it trains."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.backend.transfer import DeferredHostRead
from mindspeed_mm.checkpoint.files import make_directory
from mindspeed_mm.checkpoint.save_directory import complete_iterations
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.report.history import METRICS_FILE, History
from mindspeed_mm.evaluation.report.run_data import RunData, load_data, read_anomalies, run_name
from mindspeed_mm.evaluation.report.run_report import REPORT_FILE, run_page
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training.callbacks.base import Callback, Run
from mindspeed_mm.training.logging_setup import RANK_0_ONLY
from mindspeed_mm.training.metrics import StepRecord
from mindspeed_mm.training.run_description import CONFIGURATION

logger = logging.getLogger(__name__)

_INTERVAL = 60.0  # seconds between two pages, if nothing else asks for one
_SHARE = 0.004  # of the run's time that writing may take
_ROUTER_STEPS = 100  # of the experts' load that a page shows, at least, once the run has so many


class RunReport(Callback):
    """Collects on rank 0 what the page shows, and writes it: after evaluations, before saves, every minute, at the end.

    The time that writing takes is measured, and the next page waits until that is less than 0.4 % of the run's time.
    Only the last page is always written. Steps are not waited for: the experts' load is copied to the host when the
    step is queued, and read after the step's metrics. A file that cannot be written is warned of once.
    """

    def __init__(self, directory: str, *, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Write nothing yet.

        Args:
            directory: ``--save``, after :class:`MetricsFile`.
            describe: gives the run as :func:`~mindspeed_mm.training.run_description.describe_run` does.
        """
        self._directory = Path(directory)
        self._describe = describe
        self._warned = False
        self._written = 0.0  # when the last page was complete
        self._cost = 0.0  # seconds that it took
        self._load = _RouterLoad()
        self._pending: tuple[int, DeferredHostRead] | None = None

    def on_run_start(self, run: Run) -> None:
        """Continue the report of the run that is resumed; a run from iteration 0 begins another."""
        self._run = run
        self._active = run.context.layout.is_main
        if not self._active:
            return
        iteration = run.context.progress.iteration
        self._data = RunData(name=run_name(self._directory))
        if iteration:
            with self._warning("read"):
                self._data = self._read(iteration)
        self._start: tuple[int, str] | None = (iteration, _now())
        if iteration == 0:
            self._note_start()
        description = self._describe()
        self._data = dataclasses.replace(
            self._data, state="running", reason="", train_iters=run.args.train_iters,
            settings={name: description[name] for name in CONFIGURATION}, environment=_environment(run, description),
        )
        self._load = _RouterLoad(iteration)

    def _read(self, iteration: int) -> RunData:
        """The report so far, up to the step that the run resumes from."""
        data = load_data(self._directory)
        with contextlib.suppress(UserError):  # no file: the run continues one that did not save here
            data.history = History.read(self._directory / METRICS_FILE)
        data.forget_after(iteration)
        return data

    def on_step_queued(self, iteration: int) -> None:
        """Queue the copy of the experts' load for the page that is due."""
        if self._active and self._pending is None and self._is_due(_INTERVAL):
            self._queue_load(iteration)

    def on_step_end(self, record: StepRecord) -> None:
        """Add the step; write the page if it is due."""
        if not self._active:
            return
        self._note_start()
        self._data.history.add(record.iteration, {"time": _now(), **record.metrics})
        due = self._pending is not None and self._pending[0] <= record.iteration
        if due or (self._run.router_choices is None and self._is_due(_INTERVAL)):
            self._write()

    def on_evaluation(
        self, iteration: int, metrics: Mapping[str, float], samples: Sequence[EvaluatedSample] = ()
    ) -> None:
        """Add the evaluation, and write the page."""
        if self._active:
            self._data.history.amend(iteration, metrics)
            self._data.add_samples(iteration, samples)
            self._write_if_cheap(iteration)

    def on_save(self, iteration: int) -> None:
        """Write the page, or at least its data, which a run that is resumed from this checkpoint continues."""
        if self._active and not self._write_if_cheap(iteration):
            with self._warning():
                self._data.save(self._directory)

    def on_run_end(self, *, failed: bool) -> None:
        """Write the last page."""
        if not self._active:
            return
        run, error = self._run, sys.exc_info()[1] if failed else self._run.error
        iteration, last = run.context.progress.iteration, run.args.train_iters
        if failed or error is not None:
            state, reason = "failed", str(error or "").strip().partition("\n")[0] or type(error).__name__
        elif iteration >= last or run.finished_early:
            state, reason = "finished", run.finished_early
        else:
            state, reason = "stopped", "on request" if run.stopped else "by --exit-interval"
        self._data.state, self._data.reason = state, reason
        if state == "failed" or (reason and self._start is None):  # one that trained nothing ended as the run before
            self._data.end(state, reason, _now(), iteration=iteration)
        if not failed:  # after an error the device may not answer
            self._queue_load(iteration)
        self._write(saved=None if failed else iteration)
        if not self._warned:
            logger.info(f"run report: {self._directory / REPORT_FILE}", extra=RANK_0_ONLY)

    def _note_start(self) -> None:
        if self._start is not None:
            self._data.start(*self._start)
            self._start = None

    def _is_due(self, interval: float) -> bool:
        return time.perf_counter() - self._written >= max(interval, self._cost / _SHARE)

    def _write_if_cheap(self, iteration: int) -> bool:
        due = self._is_due(0.0)
        if due:
            self._queue_load(iteration)
            self._write()
        return due

    def _queue_load(self, iteration: int) -> None:
        choices: Tensor | None = self._run.router_choices
        self._pending = None if choices is None else (iteration, DeferredHostRead(choices))

    def _note_best(self, saved: int | None) -> None:
        """Take the best checkpoints of those on disk; ``saved``: the iteration of one that is being written."""
        args, best = self._run.args, self._run.context.progress.best
        if best is not None and (args.keep_best or args.early_stopping_patience):
            complete = {*complete_iterations(self._directory), *([] if saved is None else [saved])}
            self._data.metric, self._data.kept = best.metric, best.kept(complete, keep=args.keep_best)

    def _write(self, *, saved: int | None = None) -> None:
        """Write the page; ``saved``: the iteration of a checkpoint that is complete when the run has ended."""
        began = time.perf_counter()
        if self._pending is not None:
            iteration, read = self._pending
            self._pending = None
            self._data.router = self._load.take(iteration, torch.tensor(read.tolist()))
        with self._warning():
            make_directory(self._directory)
            self._note_best(saved)
            self._data.updated = _now()
            self._data.anomalies = read_anomalies(self._directory, last=self._data.history.iteration)
            self._data.save(self._directory)
            run_page(self._data).write(self._directory / REPORT_FILE)
        self._written = time.perf_counter()
        self._cost = self._written - began

    @contextlib.contextmanager
    def _warning(self, what: str = "written") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a page is no reason to stop training
            if not self._warned:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
                logger.warning(f"{self._directory / REPORT_FILE} cannot be {what} ({reason}); training continues")
            self._warned = True


class _RouterLoad:
    """Turns the choices since the start of the process into those of the last steps."""

    def __init__(self, iteration: int = 0) -> None:
        """``iteration``: after which the process began."""
        self._former: list[tuple[int, Tensor | int]] = [(iteration, 0)]

    def take(self, iteration: int, choices: Tensor) -> tuple[int, int, list[list[int]]] | None:
        """(first iteration, last one, choices between them), of the last 100 steps or more if there are so many.

        ``choices``: [L, E], since the start of the process.
        """
        old = [index for index, (after, _) in enumerate(self._former) if after <= iteration - _ROUTER_STEPS]
        self._former = self._former[max(old, default=0) :]
        first, former = self._former[0]
        if iteration <= first:
            return None
        if iteration > self._former[-1][0]:
            self._former.append((iteration, choices))
        return first + 1, iteration, (choices - former).tolist()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _environment(run: Run, description: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of machine, layout, software and data, in words."""
    layout = run.context.layout
    ranks = {"world size": layout.world_size, "data parallel": layout.dp_size, "context parallel": layout.context_size}
    expert = layout.expert_mesh.size() if layout.expert_mesh is not None else 1
    git, data = description.get("git", {}), description["data_summary"]
    changed = ", with uncommitted changes" if git.get("dirty") else ""
    return {
        "save directory": os.path.abspath(run.args.save or ""),
        "ranks": ", ".join(f"{name} {size}" for name, size in {**ranks, "expert parallel": expert}.items()),
        **{_label(name): value for name, value in description["hardware"].items() if name != "ranks"},
        "packages": ", ".join(f"{name} {version}" for name, version in description["packages"].items()),
        "git revision": f"{git['commit'][:12]} ({git['branch']}){changed}" if git else None,
        # the summary of the training data says how many there are in an epoch
        **{_label(name): value for name, value in data.items() if value and name != "samples_per_epoch"},
    }


def _label(name: str) -> str:
    """The name of a fact, for people."""
    if name == "fingerprint":
        return "data fingerprint"
    return f"{name.removesuffix('_gib')} (GiB)".replace("_", " ") if name.endswith("_gib") else name.replace("_", " ")
