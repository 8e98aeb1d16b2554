"""TensorBoard, W&B, SwanLab, MLflow and trackio behind the interface of :mod:`trackers`; each is imported when used.

A resumed run repeats the steps after its checkpoint, with the same results. TensorBoard discards what it had of them;
the others keep it, and are not given these steps again where they can say how far they are.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import make_directory
from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.trackers import tensorboard_directory, trackers_of, wandb_directory
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training.callbacks.trackers import Entry, TrackedRun, Tracker

logger = logging.getLogger(__name__)

_PROJECT = "mindspeed_mm"
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT", "swanlab": "SWANLAB_PROJ_NAME", "mlflow": "MLFLOW_EXPERIMENT_NAME",
}
_NAME_VARIABLES = {"wandb": "WANDB_NAME", "swanlab": "SWANLAB_EXP_NAME", "mlflow": "MLFLOW_RUN_NAME"}
_SAMPLES = 8  # of each evaluation
_SAMPLES_TAG = "validation/samples"
_FLUSH_SECONDS = 10
_WANDB_FINISH_SECONDS = 60.0
_MLFLOW_METRICS = 1000  # of one request
_MLFLOW_PARAMS, _MLFLOW_PARAM_LENGTH = 100, 500  # of one request; characters of a value that every store takes


def make_trackers(args: TrainingArgs) -> list[Tracker]:
    """The trackers that the run reports to, in the order in which they were named."""
    makers = {
        "tensorboard": lambda: TensorBoard(tensorboard_directory(args)),
        "wandb": lambda: WandB(wandb_directory(args)),
        "swanlab": lambda: SwanLab(args.save),
        "mlflow": lambda: MLflow(args.save),
        "trackio": Trackio,
    }
    return [makers[name]() for name in trackers_of(args)]


def identities(args: TrainingArgs) -> dict[str, tuple[str, str]]:
    """(project, name) of a new run, for each tracker: by flag, else by the tracker's own variable, else a default."""
    default = f"{Path(args.save).resolve().name if args.save else 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    result = {}
    for tracker in trackers_of(args):
        of_wandb = (args.wandb_project, args.wandb_exp_name) if tracker == "wandb" else (None, None)
        project = os.environ.get(_PROJECT_VARIABLES.get(tracker, ""), "") or _PROJECT
        name = os.environ.get(_NAME_VARIABLES.get(tracker, ""), "") or default
        result[tracker] = (of_wandb[0] or args.project_name or project, of_wandb[1] or args.run_name or name)
    return result


class TensorBoard(Tracker):
    """Event files, written without torch's SummaryWriter: one event has all metrics of a step."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        """``directory``: of the event files."""
        self._directory = directory
        self._writer: Any = None
        self._shown: set[int] = set()  # samples whose image was written

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Continue the curves, whose later part is discarded when they are read; or set an earlier run's aside."""
        if run.first_iteration == 1:
            self._set_aside()
        self._open()
        if run.first_iteration > 1:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._add(run.first_iteration, time.time(), session_log=SessionLog(status=SessionLog.START))
        config = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
        self._add(run.first_iteration, time.time(), values=[self._text("config", f"```json\n{config}\n```")])
        return run.id, str(self._directory)

    def log(self, entries: Sequence[Entry]) -> None:
        """One event for each entry."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:  # after a failure
            self._open()
        try:
            for entry in entries:
                values = [Summary.Value(tag=tag, simple_value=value) for tag, value in entry.metrics.items()]
                if entry.samples:
                    values.append(self._text(_SAMPLES_TAG, samples_table(entry.samples[:_SAMPLES])))
                    values.extend(self._images(entry.samples[:_SAMPLES]))
                self._add(entry.iteration, entry.seconds, values=values)
        except Exception:
            self._writer = None  # its thread has ended
            raise

    def flush(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        make_directory(self._directory)
        self._writer = EventFileWriter(str(self._directory), flush_secs=_FLUSH_SECONDS)

    def _add(self, iteration: int, seconds: float, *, values: Sequence[Any] = (), session_log: Any = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = Event(wall_time=seconds, step=iteration)
        if session_log is not None:
            event.session_log.CopyFrom(session_log)
        else:
            event.summary.CopyFrom(Summary(value=values))
        self._writer.add_event(event)

    def _set_aside(self) -> None:
        """Move the event files of an earlier run into a directory of their own, which TensorBoard shows as a run."""
        files = sorted(self._directory.glob("events.out.tfevents.*"))
        if not files:
            return
        number = 1
        while (target := self._directory / f"run.{number}").exists():
            number += 1
        make_directory(target)
        for file in files:
            file.rename(target / file.name)
        logger.info(f"the event files in {self._directory} are of an earlier run; they are kept in {target.name}")

    @staticmethod
    def _text(tag: str, text: str) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

        metadata = SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        metadata.plugin_data.content = TextPluginData(version=0).SerializeToString()
        tensor = TensorProto(
            dtype="DT_STRING", string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        return Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)

    def _images(self, samples: Sequence[EvaluatedSample]) -> Iterator[Any]:
        """The first image of each sample, once in a run."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        for sample in samples:
            if sample.images and sample.index not in self._shown:
                self._shown.add(sample.index)
                with Image.open(io.BytesIO(sample.images[0])) as image:
                    width, height = image.size
                content = Summary.Image(
                    width=width, height=height, colorspace=3, encoded_image_string=sample.images[0]
                )
                yield Summary.Value(tag=f"validation/sample_{sample.index}", image=content)


class WandB(Tracker):
    """Weights & Biases, online or offline as WANDB_MODE says."""

    name = "wandb"

    def __init__(self, directory: str | None) -> None:
        """``directory``: in which W&B makes its own; None for its default."""
        self._directory = directory

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Begin or continue."""
        os.environ.setdefault("WANDB_SILENT", "true")  # else it asks a terminal for a key that is missing
        import wandb

        options: dict[str, Any] = {}
        if "WANDB_CONSOLE" not in os.environ:
            options["console"] = "off"  # it would wrap standard output, which the launcher keeps in a file
        if "finish_timeout" in wandb.Settings.model_fields:  # also of its hook at the end of the process
            options["finish_timeout"] = _WANDB_FINISH_SECONDS
        if self._directory is not None:
            make_directory(Path(self._directory))
        identity = run.id if run.resumed else os.environ.get("WANDB_RUN_ID") or run.id
        self._run = wandb.init(
            project=run.project, name=run.name, id=identity, resume="allow", dir=self._directory,
            config=dict(run.config), settings=wandb.Settings(**options),
        )
        self._first = self._run.step  # of a continued run, the step after its last one
        return identity, self._run.dir if self._run.offline else self._run.url or ""

    def log(self, entries: Sequence[Entry]) -> None:
        """Log at the iteration as W&B's step."""
        import wandb

        for entry in entries:
            if entry.iteration < self._first:
                continue
            values: dict[str, Any] = dict(entry.metrics)
            if entry.samples:
                names = ["iteration", "index", "question", "expected", "given", "exact", "image"]
                table = wandb.Table(columns=names)
                for sample in entry.samples[:_SAMPLES]:
                    image = wandb.Image(_decoded(sample.images[0])) if sample.images else None
                    table.add_data(entry.iteration, sample.index, sample.question, sample.expected, sample.given,
                                   sample.exact, image)
                values[_SAMPLES_TAG] = table
            self._run.log(values, step=entry.iteration)

    def flush(self) -> None:
        """Nothing: its own process writes."""

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class SwanLab(Tracker):
    """SwanLab, in the cloud, on an own server, or offline, as SWANLAB_MODE says."""

    name = "swanlab"

    def __init__(self, directory: str | None) -> None:
        """``directory``: ``--save``, in which its directory ``swanlog`` is, unless SWANLAB_LOG_DIR says otherwise."""
        self._directory = directory

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Begin or continue."""
        import swanlab

        terminal = {"proxy_type": "none"}  # else it would wrap standard output, which the launcher keeps in a file
        options: dict[str, Any] = {"settings": swanlab.Settings(interactive=False, terminal=terminal)}
        if self._directory is not None and not {"SWANLAB_LOG_DIR", "SWANLAB_LOGDIR"} & set(os.environ):
            options["log_dir"] = str(Path(self._directory) / "swanlog")
            make_directory(Path(options["log_dir"]))
        self._run = swanlab.init(
            project=run.project, name=run.name, id=run.id, resume="allow", config=json.loads(_json(run.config)),
            **options,
        )
        return run.id, str(self._run.url if self._run.mode == "online" else self._run.dir)

    def log(self, entries: Sequence[Entry]) -> None:
        """Log at the iteration as SwanLab's step; it takes finite numbers only."""
        import swanlab

        for entry in entries:
            values: dict[str, Any] = {name: value for name, value in entry.metrics.items() if math.isfinite(value)}
            if entry.samples:
                values[_SAMPLES_TAG] = [swanlab.Text(_sample_text(sample)) for sample in entry.samples[:_SAMPLES]]
            self._run.log(values, step=entry.iteration)

    def flush(self) -> None:
        """Nothing."""

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._run.finish(**({"state": "crashed"} if failed else {}))


class MLflow(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI, else in files in ``--save``."""

    name = "mlflow"
    pause_seconds = 5.0

    def __init__(self, directory: str | None) -> None:
        """``directory``: ``--save``; None for MLflow's own default."""
        self._directory = directory

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Begin or continue."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri and self._directory is not None:
            uri = (Path(self._directory).resolve() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants a data base unless it is told
        self._client = MlflowClient(tracking_uri=uri or None)
        self._logged = 0  # last step of a run that is continued
        if run.resumed:
            self._id = run.id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "train/loss")
            self._logged = max((metric.step for metric in history), default=0)
        else:
            experiment = self._client.get_experiment_by_name(run.project)
            identity = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
            self._id = self._client.create_run(identity, run_name=run.name).info.run_id
            flags = run.config.get("flags", {}).items()
            params = [Param(name, str(value)[:_MLFLOW_PARAM_LENGTH]) for name, value in flags]
            for first in range(0, len(params), _MLFLOW_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + _MLFLOW_PARAMS])
        self._client.log_text(self._id, _json(run.config), f"config_from_{run.first_iteration:07d}.json")
        return self._id, uri or ""

    def log(self, entries: Sequence[Entry]) -> None:
        """Log several steps with one request."""
        from mlflow.entities import Metric

        new = [entry for entry in entries if entry.iteration > self._logged]
        metrics = [
            Metric(_mlflow_name(name), value, round(1000 * entry.seconds), entry.iteration)
            for entry in new for name, value in entry.metrics.items()
        ]
        for first in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MLFLOW_METRICS])
        for entry in new:
            if entry.samples:
                text = samples_table(entry.samples[:_SAMPLES])
                self._client.log_text(self._id, text, f"samples/iteration_{entry.iteration:07d}.md")

    def flush(self) -> None:
        """Nothing: each request is answered."""

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """trackio, in its local data base or at a Space or server, as its variables say. Its runs are found by name."""

    name = "trackio"

    def start(self, run: TrackedRun) -> tuple[str, str]:
        """Begin or continue."""
        import trackio

        name = run.id if run.resumed else f"{run.name}-{run.id[:6]}"
        self._run = trackio.init(
            project=run.project, name=name, config=json.loads(_json(run.config)), embed=False,
            resume="allow" if run.resumed else "never",
        )
        # the step after the last one of a continued run
        self._first = getattr(self._run, "_next_step", 0) if run.resumed else 0
        return name, os.environ.get("TRACKIO_SPACE_ID", "")

    def log(self, entries: Sequence[Entry]) -> None:
        """Log at the iteration as trackio's step."""
        for entry in entries:
            if entry.iteration >= self._first:
                self._run.log(dict(entry.metrics), step=entry.iteration)

    def flush(self) -> None:
        """Nothing: its own thread writes."""

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._run.finish()


def samples_table(samples: Sequence[EvaluatedSample]) -> str:
    """Questions, expected answers and the model's as a table in Markdown."""
    lines = ["| index | question | expected | given | exact |", "| --- | --- | --- | --- | --- |"]
    for sample in samples:
        cells = (str(sample.index), sample.question, sample.expected, sample.given, "yes" if sample.exact else "no")
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """``text`` in one cell of a table, as it is: neither Markdown nor HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text).replace("\r", "").replace("\n", "<br>")


def _sample_text(sample: EvaluatedSample) -> str:
    mark = "exact" if sample.exact else "differs"
    return f"{sample.index}: {sample.question}\nexpected: {sample.expected}\ngiven ({mark}): {sample.given}"


def _decoded(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg))


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False, default=str)


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes. In its files a metric is a file, so that none may be a directory of another one."""
    group, _, rest = name.partition("/")
    return re.sub(r"[^\w\-. :/]", "_", f"{group}/{rest.replace('/', '.')}")
