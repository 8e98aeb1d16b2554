"""What a run report needs besides ``metrics.jsonl``: ``report_data.json`` in the ``--save`` directory."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.best import BEST_FILE
from mindspeed_mm.checkpoint.files import write_atomically
from mindspeed_mm.evaluation.report.history import METRICS_FILE, History
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.inputs import read_bytes

DATA_FILE = "report_data.json"
REPORTS = "reports"
"""Directory of the reports of anomalies."""
_VERSION = 1
_SAMPLES = 24  # of an evaluation
_IMAGE_BYTES = 600_000  # of an evaluation
_TEXT = 4000  # characters
_SESSIONS = 200
_ANOMALIES = 200
_FILE_BYTES = 100_000_000
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """Samples of one evaluation.

    Attributes:
        iteration: after which they were evaluated.
        samples: some of them.
    """

    iteration: int
    samples: tuple[EvaluatedSample, ...]


@dataclasses.dataclass
class RunData:
    """A run, as its report shows it.

    Attributes:
        name: of the run.
        history: metrics of its steps.
        state: running, finished, stopped, failed; empty where it is not known.
        reason: why it stopped or failed.
        updated: UTC time of the last update, ISO 8601.
        train_iters: number of steps; None where it is not known.
        environment: facts of machine and software, by name.
        settings: flags and files of the job, by name.
        sessions: (iteration, UTC time) of each start: of the run itself, and of each resume that trained a step.
        ends: (iteration, what happened, details, UTC time) of each end before the last iteration.
        metric: by which checkpoints are compared; empty if they are not.
        kept: (iteration, its value) of the best checkpoints that are complete, best first.
        first: the first evaluation's samples.
        latest: the latest evaluation's.
        router: (first iteration, last one, [sparse layers, experts] choices between them).
        anomalies: (iteration, what happened).
    """

    name: str = ""
    history: History = dataclasses.field(default_factory=History)
    state: str = ""
    reason: str = ""
    updated: str = ""
    train_iters: int | None = None
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    sessions: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    ends: list[tuple[int, str, str, str]] = dataclasses.field(default_factory=list)
    metric: str = ""
    kept: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    first: SampleSet | None = None
    latest: SampleSet | None = None
    router: tuple[int, int, list[list[int]]] | None = None
    anomalies: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add_samples(self, iteration: int, samples: Sequence[EvaluatedSample]) -> None:
        """Take an evaluation's samples: the first and the latest are kept, as far as the limits go."""
        if not samples:
            return
        self.latest = SampleSet(iteration, tuple(_bounded(samples)))
        self.first = self.first or self.latest

    def start(self, iteration: int, time: str) -> None:
        """Note a start after ``iteration``."""
        self.sessions = [*self.sessions, (iteration, time)][-_SESSIONS:]

    def end(self, kind: str, details: str, time: str, *, iteration: int) -> None:
        """Note an end after ``iteration``, before the last one."""
        self.ends = [*self.ends, (iteration, kind, details, time)][-_SESSIONS:]

    def forget_after(self, iteration: int) -> None:
        """Forget what came after ``iteration``, which is repeated; of the ends none, as they are why it is."""
        if iteration == 0:
            self.sessions, self.ends, self.kept, self.first, self.latest, self.router = [], [], [], None, None, None
        self.sessions = [session for session in self.sessions if session[0] <= iteration]
        self.kept = [entry for entry in self.kept if entry[0] <= iteration]
        if self.latest is not None and self.latest.iteration > iteration:
            self.latest = self.first
        if self.first is not None and self.first.iteration > iteration:
            self.first = self.latest = None
        if self.router is not None and self.router[1] > iteration:
            self.router = None

    def save(self, directory: Path) -> None:
        """Write ``report_data.json``; raises OSError."""
        content = {
            "version": _VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "sessions": self.sessions,
            "ends": self.ends,
            "best": {"metric": self.metric, "kept": self.kept},
            "first": _to_json(self.first),
            "latest": None if self.latest is self.first else _to_json(self.latest),
            "router": self.router,
        }
        write_atomically(directory / DATA_FILE, json.dumps(content, default=str).encode())


_PLAIN = ("state", "reason", "updated", "train_iters", "environment", "settings")


def load_run(directory: Path) -> RunData:
    """A run from its ``--save`` directory; only ``metrics.jsonl`` must be there.

    Raises:
        UserError: if that cannot be read.
    """
    run = load_data(directory)
    run.history = History.read(directory / METRICS_FILE)
    run.updated = max(run.updated, run.history.updated, key=_moment)
    run.metric, run.kept = _read_best(directory, last=run.history.iteration) or (run.metric, run.kept)
    run.anomalies = read_anomalies(directory, last=run.history.iteration)
    return run


def load_data(directory: Path) -> RunData:
    """A run without its history. Without a ``report_data.json`` of this version, or with a damaged one, it is empty."""
    run = RunData(name=run_name(directory))
    with contextlib.suppress(*_DAMAGED):
        content = _read(directory / DATA_FILE)
        if content["version"] == _VERSION:
            plain = {name: content[name] for name in _PLAIN}
            sessions = [(int(iteration), str(time)) for iteration, time in content["sessions"]]
            ends = [(int(at), str(kind), str(why), str(time)) for at, kind, why, time in content.get("ends", ())]
            best = content.get("best", {"metric": "", "kept": ()})
            kept = [(int(iteration), float(value)) for iteration, value in best["kept"]]
            first, latest = _from_json(content["first"]), _from_json(content["latest"])
            run = dataclasses.replace(
                run, **plain, sessions=sessions, ends=ends, metric=str(best["metric"]), kept=kept, first=first,
                latest=latest or first, router=content["router"],
            )
    return run


def _read(path: Path) -> Any:
    """A JSON file that a run has written; a pipe or a device is none."""
    return json.loads(read_bytes(path, limit=_FILE_BYTES))


def run_name(directory: Path) -> str:
    """The last two parts of its path, as ``--save`` directories of different runs may have the same name."""
    return "/".join(directory.resolve().parts[1:][-2:])


def read_anomalies(directory: Path, *, last: int) -> list[tuple[int, str]]:
    """(iteration, reason) of the reports of skipped steps and spikes, up to the step ``last``."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted((directory / REPORTS).glob("iteration_*_*.json"))[:_ANOMALIES]:
            with contextlib.suppress(*_DAMAGED):
                content = _read(path)
                if int(content["iteration"]) <= last:
                    samples = content.get("samples") or []
                    worst = f"; highest loss: {samples[0]['source']}" if samples else ""
                    found.append((int(content["iteration"]), f"{content['reason']}{worst}"))
    return sorted(found)


def seconds_since(time: str) -> float:
    """Until now, from a UTC time in ISO 8601; 0 for none."""
    age = datetime.datetime.now(datetime.timezone.utc) - _moment(time)
    return max(0.0, age.total_seconds()) if time else 0.0


def _moment(time: str) -> datetime.datetime:
    """A UTC time in ISO 8601; long ago for any other text."""
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(time)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.timezone.utc)
    return datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)


def _read_best(directory: Path, *, last: int) -> tuple[str, list[tuple[int, float]]] | None:
    """Metric and best checkpoints, up to the step ``last``, of ``best_checkpoints.json``; None without a valid one."""
    with contextlib.suppress(*_DAMAGED):
        content = _read(directory / BEST_FILE)
        kept = [(int(entry["iteration"]), float(entry["value"])) for entry in content["ranking"]]
        return str(content["metric"]), [entry for entry in kept if entry[0] <= last]
    return None


def _bounded(samples: Sequence[EvaluatedSample]) -> list[EvaluatedSample]:
    kept, nbytes = [], 0
    for sample in samples[:_SAMPLES]:
        size = sum(map(len, sample.images))
        images = sample.images if nbytes + size <= _IMAGE_BYTES else ()
        nbytes += size if images else 0
        texts = {name: getattr(sample, name)[:_TEXT] for name in ("question", "expected", "given")}
        kept.append(dataclasses.replace(sample, images=images, **texts))
    return kept


def _to_json(samples: SampleSet | None) -> dict[str, Any] | None:
    if samples is None:
        return None
    return {
        "iteration": samples.iteration,
        "samples": [
            {**dataclasses.asdict(sample), "images": [base64.b64encode(image).decode() for image in sample.images]}
            for sample in samples.samples
        ],
    }


def _from_json(content: Mapping[str, Any] | None) -> SampleSet | None:
    if content is None:
        return None
    names = {field.name for field in dataclasses.fields(EvaluatedSample)}
    samples = []
    for sample in content["samples"]:
        try:
            images = tuple(base64.b64decode(image) for image in sample["images"])
        except binascii.Error:
            images = ()
        known = {name: value for name, value in sample.items() if name in names}
        samples.append(EvaluatedSample(**{**known, "images": images}))
    return SampleSet(int(content["iteration"]), tuple(samples))
