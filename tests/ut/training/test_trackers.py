"""Trackers: what the real libraries keep of a run, offline; resuming; and trackers that fail or hang."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.trackers import check_tracker_flags, check_tracker_packages, is_installed, trackers_of
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training import run_description
from mindspeed_mm.training.callbacks import tracker_clients, trackers
from mindspeed_mm.training.callbacks.tracker_clients import identities, make_trackers, samples_table
from mindspeed_mm.training.callbacks.trackers import STATE_FILE, Trackers, grouped
from mindspeed_mm.training.metrics import StepRecord

CONFIG = {"flags": {"lr": 1e-3, "save": None}, "model": {"loss_cfg": {"compute_mode": "default"}}}


@pytest.fixture
def lines(caplog):
    """What was logged so far."""
    caplog.set_level(logging.INFO, "mindspeed_mm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No tracker reaches the network, the home directory or the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": home, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "SWANLAB_MODE": "offline",
        "SWANLAB_SAVE_DIR": home, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    assert not list(work.iterdir())


def args_of(save, *words):
    required = ["--mm-data", "d", "--mm-model", "m", "--seq-length", "8", "--lr", "1", "--train-iters", "9"]
    place = [] if save is None else ["--save", str(save)]
    return parse_args([*required, "--use-torch-fsdp2", *place, *words])


def jpeg(size=(24, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "JPEG")
    return buffer.getvalue()


def sample(index=7, **values):
    fields = {"question": "<image>\nhow|many?", "expected": "three", "given": "<b>two</b>", "exact": False}
    return EvaluatedSample(index=index, images=(jpeg(),), **{**fields, **values})


def metrics(iteration):
    return {"consumed_samples": 4 * iteration, "learning_rate": 0.5, "loss": 1 / iteration, "loss/b c": 2 / iteration,
            "grad_norm": math.nan if iteration == 2 else 1.0, "stop_requests": 0.0, "seconds": 0.25,
            "tokens_per_second_per_device": 3.0}


def run(save, steps, *, after=0, words=(), made=None, main=True, failed=False, stopped=False, names=None):
    """A run of the given iterations, of which the even ones are evaluated, and saved."""
    args = args_of(save, *words)
    made = make_trackers(args) if made is None else made
    ids = names or identities(args)
    callback = Trackers(made, directory=save and str(save), identities=ids, describe=lambda: CONFIG)
    progress = SimpleNamespace(iteration=after)
    context = SimpleNamespace(layout=SimpleNamespace(is_main=main), progress=progress)
    callback.on_run_start(SimpleNamespace(context=context, stopped=stopped))
    for iteration in range(after + 1, after + 1 + steps):
        callback.on_step_end(StepRecord(iteration, metrics(iteration)))
        if iteration % 2 == 0:
            callback.on_evaluation(iteration, {"validation_loss": 3.0, "validation_loss/b": iteration}, [sample()])
            callback.on_save(iteration)
    callback.on_run_end(failed=failed)


def test_names_are_grouped():
    assert [grouped(name) for name in metrics(1)] == [
        "data/consumed_samples", "train/learning_rate", "train/loss", "train/loss/b c", "train/grad_norm",
        "train/stop_requests", "performance/seconds", "performance/tokens_per_second_per_device",
    ]  # fmt: skip
    assert grouped("validation_exact_match/b") == "validation/exact_match/b"
    assert grouped("target_tokens/b") == "data/target_tokens/b" and grouped("mfu") == "performance/mfu"


def scalars(directory):
    """Tag -> [(iteration, value)] of a directory of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events, {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_by_default_with_samples(tmp_path, lines):
    run(tmp_path / "save", 4)
    events, found = scalars(tmp_path / "save/tensorboard")
    assert found["train/loss"] == [(i, pytest.approx(1 / i)) for i in range(1, 5)]
    assert math.isnan(found["train/grad_norm"][1][1]) and found["validation/loss"] == [(2, 3.0), (4, 3.0)]
    assert found["validation/loss/b"] == [(2, 2.0), (4, 4.0)] and "train/stop_requests" not in found
    (image,) = events.Images("validation/sample_7")  # once, though evaluated twice
    assert (image.step, image.width, image.height) == (2, 24, 16)
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (24, 16)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("validation/samples/text_summary")]
    assert len(texts) == 2 and r"how\|many?" in texts[0] and "&lt;b&gt;two" in texts[0]
    (config,) = events.Tensors("config/text_summary")
    assert json.loads(config.tensor_proto.string_val[0].decode().strip("`json\n")) == CONFIG
    assert json.loads((tmp_path / "save" / STATE_FILE).read_text())["tensorboard"]["project"] == "mindspeed_mm"
    assert len(lines()) == 1 and lines()[0].startswith("tensorboard: begins run save-")


def test_tensorboard_resumed_twice_has_each_step_once(tmp_path):
    """Both resumes repeat steps; the last one also discards steps that it does not reach again."""
    for after, steps in ((0, 6), (4, 3), (4, 1)):
        run(tmp_path, steps, after=after)
        time.sleep(1.05)  # event files are read in the order of the seconds in their names
    _, found = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in found["validation/loss"]] == [2, 4]


def test_a_new_run_sets_the_event_files_of_an_earlier_one_aside(tmp_path, lines):
    for steps in (3, 2, 1):
        run(tmp_path, steps, words=["--tensorboard-dir", str(tmp_path / "events")])
    read = [[step for step, _ in scalars(tmp_path / "events" / name)[1]["train/loss"]] for name in ("run.1", "run.2")]
    assert read == [[1, 2, 3], [1, 2]]
    assert len(list((tmp_path / "events").glob("events*"))) == 1 and not (tmp_path / "tensorboard").exists()
    assert any("they are kept in run.2" in line for line in lines())


def leveldb_records(path: Path):
    """The records of a log in LevelDB's format with a header of 7 bytes, which W&B and SwanLab write."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):  # it is being written
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_continues_its_run(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    words = ["--wandb-project", "pets", "--wandb-exp-name", "first"]
    run(tmp_path, 3, words=words)
    time.sleep(1.05)  # the directory's name has seconds
    run(tmp_path, 2, after=2, words=words)
    kept = json.loads((tmp_path / STATE_FILE).read_text())["wandb"]
    assert (kept["project"], kept["name"]) == ("pets", "first")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in files] == [f"run-{kept['id']}.wandb"] * 2
    steps, configs = [], []
    for path in files:
        deadline, records = time.monotonic() + 60, []
        while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
            time.sleep(0.05)  # its process writes the end of the file a little later
            records = [Record.FromString(data) for data in leveldb_records(path)]
        for record in records:
            if record.HasField("run"):
                configs.append((record.run.project, record.run.display_name, record.run.run_id, {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }))
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                steps.append((int(items["_step"]), json.loads(items["train/loss"]), "validation/loss" in items,
                              "validation/samples" in items))
    assert [config[:3] for config in configs] == [("pets", "first", kept["id"])] * 2
    assert configs[0][3]["model"] == CONFIG["model"]
    expected = [1, 2, 3, 3, 4]  # offline, the repeated step is in both parts, with the same values
    assert steps == [(i, pytest.approx(1 / i), i % 2 == 0, i % 2 == 0) for i in expected]


def test_a_missing_key_is_not_asked_for(tmp_path, monkeypatch):
    """On a terminal; a new process, since W&B looks at its variables once."""
    pytest.importorskip("wandb")
    code = (
        "import sys\n"
        "from mindspeed_mm.training.callbacks.tracker_clients import WandB\n"
        "from mindspeed_mm.training.callbacks.trackers import TrackedRun\n"
        "try:\n"
        "    WandB(sys.argv[1]).start(TrackedRun('n', 'p', 'a', False, 1, {}))\n"
        "except Exception as error:\n"
        "    print('said', error)\n"
    )
    reading, terminal = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "save")], cwd=Path(__file__).parents[3], stdin=terminal,
        stderr=terminal, stdout=subprocess.PIPE, text=True, timeout=100,
        env={**os.environ, "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    os.close(terminal)
    os.close(reading)
    assert "said No API key configured" in result.stdout


def test_swanlab_offline_continues_its_run(tmp_path):
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    words = ["--report-to", "swanlab", "--project-name", "pets", "--run-name", "first"]
    run(tmp_path, 3, words=words)
    run(tmp_path, 2, after=3, words=words)
    kept = json.loads((tmp_path / STATE_FILE).read_text())["swanlab"]
    files = sorted(tmp_path.glob("swanlog/run-*/*.swanlab"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in files] == [f"run-{kept['id']}.swanlab"] * 2
    records = [[Record.FromString(data) for data in leveldb_records(path)] for path in files]
    for part, steps in zip(records, ((1, 2, 3), (4, 5)), strict=True):
        (start,) = (record.start for record in part if record.HasField("start"))
        assert (start.project, start.name, start.id) == ("pets", "first", kept["id"])
        scalar = [record.scalar for record in part if record.HasField("scalar")]
        losses = [(item.step, item.value.number) for item in scalar if item.key == "train/loss"]
        assert losses == [(i, pytest.approx(1 / i)) for i in steps]
        assert [item.step for item in scalar if item.key == "train/grad_norm"] == [i for i in steps if i != 2]  # NaN
    (text,) = files[0].parent.glob("media/text/*.txt")
    assert "how|many?" in text.read_text() and "lr: 0.001" in (files[0].parent / "files/config.yaml").read_text()


@pytest.mark.parametrize("named", [False, True])
def test_mlflow_in_files_has_each_step_once(tmp_path, monkeypatch, named):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    uri = (tmp_path / ("other" if named else "mlruns")).as_uri()
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    words = ["--report-to", "mlflow", "--run-name", "first"]
    run(tmp_path, 4, words=words)
    run(tmp_path, 4, after=2, words=words, failed=True)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("mindspeed_mm")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params["lr"]) == ("first", "FAILED", "0.001")
    history = [(item.step, item.value) for item in client.get_metric_history(found.info.run_id, "train/loss")]
    assert history == [(i, pytest.approx(1 / i)) for i in range(1, 7)]
    assert "train/loss.b c" in found.data.metrics
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"config_from_0000001.json", "config_from_0000003.json", "samples"}
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")


def test_trackio_has_each_step_once(tmp_path, monkeypatch):
    """Not among the packages of the tests: it holds Pillow back. Where it is installed, this runs."""
    pytest.importorskip("trackio")
    code = (
        "import json, sys; from pathlib import Path\n"
        "from tests.ut.training.test_trackers import run\n"
        "words = ['--report-to', 'trackio', '--run-name', 'first']\n"
        "run(Path(sys.argv[1]), 4, words=words); run(Path(sys.argv[1]), 3, after=2, words=words)\n"
        "run(Path(sys.argv[1]), 1, words=words)\n"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run(  # it reads TRACKIO_DIR when it is imported
        [sys.executable, "-c", code, str(tmp_path / "save")], check=True, cwd=root, timeout=100, capture_output=True,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(root)},
    )
    import sqlite3

    with sqlite3.connect(tmp_path / "trackio" / "mindspeed_mm.db") as data_base:
        rows = data_base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    losses = [(name, step) for name, step, content in rows if b"train/loss" in bytes(content)]
    first, second = dict.fromkeys(name for name, _ in losses)
    assert first.startswith("first-") and second.startswith("first-")
    assert losses == [(first, step) for step in range(1, 6)] + [(second, 1)]


class Fake:
    """Keeps what it is given; ``at`` says where it fails."""

    pause_seconds = 0.0

    def __init__(self, name="wandb", at="", error=None, seconds=0.0):
        self.name, self._at, self._error, self._seconds = name, at, error, seconds
        self.started, self.entries, self.calls = None, [], []

    def _do(self, what):
        self.calls.append(what)
        time.sleep(self._seconds)
        if what == self._at:
            raise self._error

    def start(self, run):
        self.started = run
        self._do("start")
        return run.id, "somewhere"

    def log(self, entries):
        self._do("log")
        self.entries += entries

    def flush(self):
        self._do("flush")

    def finish(self, *, failed):
        self._do("finish")
        self.failed = failed


NAMES = dict.fromkeys(("wandb", "mlflow"), ("p", "n"))


@pytest.mark.parametrize(
    ("at", "error"),
    [
        ("start", ImportError("a\nb")), ("start", SystemExit(1)), ("log", OSError(28, "No space left on device")),
        ("log", SystemExit(1)), ("flush", KeyError("x\ny")), ("finish", RuntimeError("no network")),
    ],
    ids=["start", "start-exit", "log", "log-exit", "flush", "finish"],
)
def test_a_tracker_that_fails_is_reported_once_and_the_other_goes_on(tmp_path, lines, monkeypatch, at, error):
    monkeypatch.setattr(trackers, "_RETRY_SECONDS", 0.0)
    bad, good = Fake("wandb", at, error), Fake("mlflow")
    run(tmp_path, 6, made=[bad, good], names=NAMES)
    said = [line for line in lines() if line.startswith("wandb: ") and "training continues" in line]
    assert len(said) == 1 and "\n" not in said[0] and type(error).__name__ in said[0]
    assert [entry.iteration for entry in good.entries] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert good.calls[-1] == "finish" and good.failed is False
    if at in ("log", "flush") and not isinstance(error, SystemExit):  # it is tried again, and ended
        assert bad.calls[-1] == "finish"


def test_passwords_in_addresses_are_not_logged(tmp_path, lines):
    place = "http://bob:pass-word@tracking:5000/#run?api_token=to-ken"
    good, bad = Fake("wandb"), Fake("mlflow", "log", RuntimeError(f"{place} does not answer"))
    start = good.start
    good.start = lambda run: (start(run)[0], place)
    run(tmp_path, 2, made=[good, bad], names=NAMES)
    text = "\n".join(lines())
    assert text.count("//tracking:5000/") == 2 and "pass-word" not in text and "to-ken" not in text


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(trackers, "_FINISH_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "_QUEUED", 3)
    guards = []
    monkeypatch.setattr(trackers, "_guard_exit", guards.append)
    began = time.monotonic()
    run(tmp_path, 50, made=[Fake("wandb", seconds=1.5), Fake("mlflow")], names=NAMES)
    assert time.monotonic() - began < 1.3 and guards == [0]
    assert sum(line.startswith("wandb is slower than training by 3 steps") for line in lines()) == 1
    assert any("wandb: not finished within 0.2 s" in line for line in lines())


def test_a_process_ends_though_a_library_hangs_at_its_end():
    """An exit hook that never returns, and a process that holds the output, as of a library without its network."""
    code = (
        "import atexit, subprocess, time\n"
        "from mindspeed_mm.training.callbacks import trackers\n"
        "atexit.register(time.sleep, 60)\n"
        "subprocess.Popen(['bash', '-c', 'trap : TERM; while :; do sleep 1; done'])\n"
        "trackers._GUARD_SECONDS = trackers._CHILD_SECONDS = 0.2\n"
        "trackers._guard_exit(7)\n"
    )
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE)
    assert result.returncode == 7 and time.monotonic() - began < 50


def test_only_rank_0_reports_and_without_a_step_nothing_starts(tmp_path):
    one, other = Fake(), Fake()
    run(tmp_path, 3, made=[one], names=NAMES, main=False)
    run(tmp_path, 0, made=[other], names=NAMES)
    assert one.calls == other.calls == [] and not list(tmp_path.glob("*.json"))


def test_run_ids_are_kept_for_a_resume_only(tmp_path, lines):
    ids = []
    for after, names in ((0, NAMES), (3, NAMES), (6, {"wandb": ("q", "n")}), (7, {"wandb": ("q", "m")}), (0, NAMES)):
        fake = Fake()
        run(tmp_path, 1, after=after, made=[fake], names=names)
        ids.append((fake.started.id, fake.started.resumed, fake.started.name, fake.started.first_iteration))
    (first, *_), (second, *_), (third, *_), (fourth, *_), (fifth, *_) = ids
    assert first == second and third == fourth and len({first, third, fifth}) == 3  # another project, a new run
    assert [row[1:] for row in ids] == [
        (False, "n", 1), (True, "n", 4), (False, "n", 7), (True, "n", 8), (False, "n", 1)
    ]  # fmt: skip
    (tmp_path / STATE_FILE).write_text("{")
    fake = Fake()
    run(tmp_path, 1, after=3, made=[fake], names=NAMES)
    assert not fake.started.resumed and any("trackers begin new runs" in line for line in lines())


def test_without_a_place_each_run_is_new():
    fakes = Fake(), Fake()
    for fake in fakes:
        run(None, 1, after=3, made=[fake], names=NAMES)
    assert fakes[0].started.id != fakes[1].started.id


def test_a_description_that_fails_does_not_stop_the_run(tmp_path, lines):
    fake = Fake()
    callback = Trackers([fake], directory=None, identities=NAMES, describe=lambda: 1 / 0)
    context = SimpleNamespace(layout=SimpleNamespace(is_main=True), progress=SimpleNamespace(iteration=0))
    callback.on_run_start(SimpleNamespace(context=context, stopped=False))
    callback.on_step_end(StepRecord(1, metrics(1)))
    callback.on_run_end(failed=False)
    assert fake.started.config == {} and any("division by zero" in line for line in lines())


@pytest.mark.parametrize(
    ("save", "words", "expected"),
    [
        (None, [], ()),
        ("s", [], ("tensorboard",)),
        (None, ["--tensorboard-dir", "t"], ("tensorboard",)),
        ("s", ["--report-to", "none"], ()),
        ("s", ["--report-to", "wandb,tensorboard"], ("wandb", "tensorboard")),
        ("s", ["--report-to", "swanlab", "mlflow"], ("swanlab", "mlflow")),
        ("s", ["--wandb-project", "p"], ("tensorboard", "wandb")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_which_trackers(save, words, expected):
    args = args_of(save, *words)
    check_tracker_flags(args)
    assert trackers_of(args) == expected


@pytest.mark.parametrize(
    ("save", "words", "message"),
    [
        ("s", ["--report-to", "wanbd"], "--report-to wanbd is unknown; choose from tensorboard, wandb, swanlab"),
        ("s", ["--report-to", ","], "--report-to is empty"),
        ("s", ["--report-to", "none,wandb"], "none excludes the others"),
        (None, ["--report-to", "tensorboard"], "has nowhere to write; add --tensorboard-dir"),
        ("s", ["--report-to", "wandb", "--tensorboard-dir", "t"], "--tensorboard-dir t has no effect with"),
        ("s", ["--report-to", "swanlab", "--wandb-project", "p"], "--wandb-project p has no effect without"),
        ("s", ["--wandb-exp-name", "p"], "--wandb-exp-name p has no effect without --report-to wandb"),
        ("s", ["--run-name", "p"], "--run-name p has no effect without a tracker"),
    ],
    ids=["unknown", "empty", "none", "nowhere", "directory", "project", "name", "run"],
)
def test_wrong_flags(save, words, message):
    with pytest.raises(UserError, match=message):
        check_tracker_flags(args_of(save, *words))


def test_a_package_that_is_missing_is_an_error_only_if_it_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "work" / "tensorboard").mkdir()  # no package, though it could be imported
    monkeypatch.setattr(sys, "path", [str(tmp_path / "work")])
    for name in ("tensorboard", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not is_installed("tensorboard")
    assert "pip install tensorboard" in str(check_tracker_packages(args_of("s")))
    assert trackers_of(args_of("s")) == () and check_tracker_packages(args_of(None)) is None
    with pytest.raises(UserError, match="--report-to mlflow: the package mlflow is not installed; pip install mlflow-"):
        check_tracker_packages(args_of("s", "--report-to", "mlflow"))
    with pytest.raises(UserError, match="--tensorboard-dir t: the package tensorboard is not installed"):
        check_tracker_packages(args_of("s", "--tensorboard-dir", "t"))
    (tmp_path / "work" / "tensorboard").rmdir()


def test_names_of_a_run(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    words = ["--report-to", "wandb,mlflow", "--run-name", "r"]
    assert identities(args_of("s", *words)) == {"wandb": ("of the environment", "r"), "mlflow": ("mindspeed_mm", "r")}
    words += ["--project-name", "p", "--wandb-exp-name", "w"]
    assert identities(args_of("s", *words)) == {"wandb": ("p", "w"), "mlflow": ("p", "r")}
    assert identities(args_of("a/out", "--report-to", "mlflow"))["mlflow"][1].startswith("out-20")


def test_the_description_has_no_secrets_and_says_what_code_runs(tmp_path):
    assert run_description.without_secrets({"a": ["http://me:pw@host/x?k=1&access_token=ab&n=2"], "b": ("x@y", 3)}) == {
        "a": ["http://host/x?k=1&&n=2"], "b": ["x@y", 3]
    }  # fmt: skip
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert run_description.git_revision(tmp_path) == {}
    subprocess.run([*git, "init", "-q", "-b", "topic"], check=True)
    (tmp_path / "file").write_text("1")
    (tmp_path / "part").mkdir()
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    found = run_description.git_revision(tmp_path)
    assert len(found["commit"]) == 40 and (found["branch"], found["dirty"]) == ("topic", False)
    (tmp_path / "file").write_text("2")
    assert run_description.git_revision(tmp_path)["dirty"]
    assert run_description.git_revision(tmp_path / "part") == {}  # an installed package in another's repository


def test_a_table_of_samples_is_text():
    table = samples_table([sample(question="a\nb", expected="*x*", given="[y](z) `c`")])
    assert table.splitlines()[2] == r"| 7 | a<br>b | \*x\* | \[y\](z) \`c\` | no |"
    assert tracker_clients._mlflow_name("train/loss/中 a%") == "train/loss.中 a_"
