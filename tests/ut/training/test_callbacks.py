"""The order of callbacks, the log line, the metrics file and the summary, with a step that trains nothing.

The loop, the reading of metrics and the callbacks are the real ones; ``train_step`` is a stand-in.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.data.loader import SkipReport, StepBatches
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.checkpointing import Checkpointing
from mindspeed_mm.training.callbacks.evaluation import Evaluation
from mindspeed_mm.training.callbacks.log_line import LogLine
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.run_summary import RunSummary
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.context import Objective, RunContext
from mindspeed_mm.training.logging_setup import ALL_RANKS, RAW, setup_logging
from mindspeed_mm.training.metrics import StepDetails, StepMetrics, StepRecord
from mindspeed_mm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def lines(caplog):
    """What was logged so far."""
    caplog.set_level(logging.INFO, "mindspeed_mm")
    return lambda: [record.getMessage() for record in caplog.records]


class Backend:
    """A CPU that may read metrics late, as an accelerator's are."""

    device, name = torch.device("cpu"), "cpu"

    def __init__(self, lag):
        self.is_accelerator = bool(lag)

    def peak_memory_bytes(self):
        return 3 * 2**29


class Schedule:
    samples = 0
    optimizer = SimpleNamespace(param_groups=[{"name": "text", "lr_mult": 0.5}, {"name": "vision", "lr_mult": 1.0}])

    def get_lr(self, group):
        return 0.1

    def step(self, increment):
        self.samples += increment

    def state_dict(self):
        return {"num_steps": self.samples}


class Manager:
    """Keeps what a checkpoint manager was asked to do."""

    def __init__(self):
        self.calls, self.saved = [], []

    def start(self, progress):
        self.saved.append((progress.iteration, progress.schedule))

    def __getattr__(self, name):
        return lambda: self.calls.append(name)


class Events(Callback):
    """Keeps the order of all calls."""

    def __init__(self):
        self.calls = []

    def on_run_start(self, run):
        self.calls.append(("start",))

    def on_step_start(self, iteration):
        self.calls.append(("step start", iteration))

    def on_step_queued(self, iteration):
        self.calls.append(("queued", iteration))

    def on_step_end(self, record):
        self.calls.append(("step end", record.iteration))

    def on_evaluation(self, iteration, metrics, samples):
        self.calls.append(("evaluation", iteration))

    def on_save(self, iteration):
        self.calls.append(("save", iteration))

    def on_run_end(self, *, failed):
        self.calls.append(("end", failed))


def make(*callbacks, steps=5, iteration=0, lag=0, values=None, stop_at=(), lost_from=99, layout=None,
         **flags):
    """A trainer; ``values`` gives metrics of a step, ``stop_at`` the steps whose sums hold a request to stop."""
    args = SimpleNamespace(
        train_iters=steps, global_batch_size=8, exit_interval=None, save_interval=None, eval_interval=2, save="save",
        log_interval=1, log_tps=True, **{},
    )
    vars(args).update(flags)
    parameter = nn.Parameter(torch.zeros(1))
    model = nn.Module()
    model.parameter = parameter
    context = RunContext(
        layout=layout or SimpleNamespace(world_size=2, is_main=True, rank=0, dp_size=1, context_size=1),
        backend=Backend(lag), progress=Progress(iteration=iteration, consumed_samples=8 * iteration), peak_tflops=10.0,
    )
    optimizer = SimpleNamespace(param_groups=[])
    loader = SimpleNamespace(start=lambda: None, close=lambda: None, waited=0.25)
    trainer = Trainer(
        args=args, model=model, optimizer=optimizer, schedule=Schedule(), loader=loader,
        objective=Objective(forward_step=None, loss_mode="per_token"), context=context, callbacks=callbacks,
    )

    def train_step():
        current = context.progress.iteration + 1
        metrics = StepMetrics(torch.device("cpu"))
        defaults = {"loss": float(current), "tokens": 80, "target_tokens": 20, "samples": 10, "tflop": 2.0}
        defaults |= {"skipped_unusable": 0, "stop_requests": current in stop_at, "lost": current >= lost_from}
        for name, value in {**defaults, **(values(current) if values else {})}.items():
            metrics.add(name, value)
        metrics.reduce()
        metrics.set("grad_norm", torch.tensor(2.0))
        metrics.set("skipped_step", ~metrics["loss"].isfinite())
        metrics.send()
        return metrics, StepDetails(failure="no worker" if current >= lost_from else "")

    trainer.train_step = train_step
    return trainer


def evaluation(loss=0.5, **of_sets):
    callback = Evaluation([], split=lambda batch: batch, skipped_samples=SkippedSamples(0))
    callback.evaluate = lambda: {"validation_loss": loss, **of_sets}
    return callback


@pytest.mark.parametrize("lag", [0, 1])
def test_order_of_events(lag):
    """Records are read before an evaluation or a save sees their step, and otherwise as late as the device allows."""
    events = Events()
    trainer = make(events, evaluation(), Checkpointing(Manager()), steps=3, lag=lag)
    trainer.train()
    early, late = ([("step end", 1)], []) if lag == 0 else ([], [("step end", 1)])
    second = events.calls.index(("step start", 2))
    assert events.calls[:second] == [("start",), ("step start", 1), *early, ("queued", 1)]
    rest = events.calls[second:]
    at_2 = [("step end", 2), ("queued", 2)] if lag == 0 else [*late, ("queued", 2), ("step end", 2)]
    at_3 = [("step end", 3), ("queued", 3)] if lag == 0 else [("queued", 3), ("step end", 3)]
    assert rest == [
        ("step start", 2), *at_2, ("evaluation", 2),
        ("step start", 3), *at_3, ("evaluation", 3), ("save", 3), ("end", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("lag", "last"), [(0, 3), (1, 4)])
def test_a_stop_request_ends_the_run_after_the_step_in_which_it_is_read(lag, last):
    manager = Manager()
    trainer = make(Checkpointing(manager), steps=9, lag=lag, stop_at={3})
    trainer.train()
    assert trainer.stopped and [iteration for iteration, _ in manager.saved] == [last]
    assert manager.calls.count("poll") == last and manager.calls[-1] == "finish"


def test_the_schedule_is_stored_before_a_save():
    manager = Manager()
    make(Checkpointing(manager), steps=4, save_interval=2).train()
    scales = {"lr_scales": {"text": 0.5}}
    assert manager.saved == [(2, {"num_steps": 16, **scales}), (4, {"num_steps": 32, **scales})]


def test_exit_interval_saves_and_is_no_stop():
    manager = Manager()
    trainer = make(Checkpointing(manager), steps=9, exit_interval=2)
    trainer.train()
    assert not trainer.stopped and [iteration for iteration, _ in manager.saved] == [2]


def test_a_failed_step_abandons_the_save_and_ends_every_callback():
    class Refusing(Callback):
        def on_step_end(self, record):
            raise UserError(f"step {record.iteration}")

        def on_run_end(self, *, failed):
            raise OSError("not this")

    manager, events = Manager(), Events()
    with pytest.raises(UserError, match="step 1"):
        make(Refusing(), Checkpointing(manager), events).train()
    assert manager.calls == ["abandon"] and events.calls[-1] == ("end", True)


def test_a_last_save_that_fails_ends_the_run_with_its_error_and_every_callback():
    class Failing(Manager):
        def finish(self):
            raise UserError("disk")

    events = Events()
    with pytest.raises(UserError, match="disk"):
        make(Checkpointing(Failing()), events).train()
    assert events.calls[-1] == ("end", True)


@pytest.mark.parametrize("lag", [0, 1])
def test_an_error_of_all_ranks_saves_before_the_run_ends(lag):
    class Refusing(Callback):
        def on_run_start(self, run):
            self.run = run

        def on_step_end(self, record):
            if record.iteration == 3:
                self.run.stop_after_save(UserError("bad image"))

    manager, events = Manager(), Events()
    with pytest.raises(UserError, match=rf"bad image \(saved first: iteration {3 + lag}\)"):
        make(Refusing(), Checkpointing(manager), events, lag=lag, steps=9).train()
    assert [iteration for iteration, _ in manager.saved] == [3 + lag] and manager.calls[-1] == "finish"
    assert events.calls[-1] == ("end", False)


@pytest.mark.parametrize(
    ("lost_from", "options", "saved"),
    [
        (3, {}, [2]),
        (3, {"save_interval": 1}, [1, 2]),  # not again
        (4, {"save_interval": 4}, [3]),
        (5, {"steps": 5}, [4]),
        (1, {}, []),
        (4, {"iteration": 3}, []),
    ],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_steps_without_data_are_taken_back(lag, lost_from, options, saved):
    """The run ends at the step before, whose parameters it still has, and saves that unless it is saved."""
    manager, events = Manager(), Events()
    trainer = make(
        events, evaluation(), Checkpointing(manager), lag=lag, lost_from=lost_from, **{"steps": 9, **options}
    )
    first, last = options.get("iteration", 0), lost_from - 1
    where = rf" \(saved first: iteration {last}\)" if last else ""
    with pytest.raises(UserError, match=rf"^iteration {lost_from}: no worker{where}$"):
        trainer.train()
    progress = trainer.context.progress
    assert (progress.iteration, progress.consumed_samples) == (last, 8 * last)
    assert trainer.schedule.samples == 8 * (last - first)
    assert [iteration for iteration, _ in manager.saved] == saved and manager.calls[-1] == "finish"
    seen = {what: [call[1] for call in events.calls if call[0] == what] for what in ("step end", "evaluation")}
    assert seen == {
        "step end": [*range(first + 1, lost_from)],
        "evaluation": [step for step in range(first + 1, lost_from) if step % 2 == 0],
    }


def test_steps_without_a_target_are_warned_of_and_end_the_run(caplog):
    def empty_from(first):
        return lambda step: {"target_tokens": 0 if step >= first else 5}

    make(SkippedSamples(0), values=empty_from(3), steps=11).train()  # nine in a row
    with pytest.raises(UserError, match="the last 10 iterations, up to 12, had no target token"):
        make(SkippedSamples(0), values=empty_from(3), steps=30).train()


def test_skipped_samples_of_a_step_stop_the_run():
    with pytest.raises(IndexError):  # without messages, since no rank has any here: the count arrived
        make(SkippedSamples(0), values=lambda step: {"skipped_unusable": int(step == 2)}).train()


# the log line


def test_line_of_the_recipe_to_the_byte(lines, monkeypatch):
    trainer = make(LogLine(packed=False), steps=1, values=lambda step: {"loss": 0.693147})
    monkeypatch.setattr(trainer._reader, "flush", lambda: [])
    monkeypatch.setattr(trainer._reader, "add", lambda step: [
        StepRecord(1, {**step.known, **step.metrics.read(), "seconds": 2.0}, step.details)
    ])
    trainer.train()
    (line,) = lines()
    assert line[:2] == " [" and line[21:] == (
        "] iteration        1/       1 | consumed samples:            8 | elapsed time per iteration (ms): 2000.0 | "
        "learning rate: 1.000000E-01 | global batch size:     8 | tokens per sample: 1.000000E+01 | "
        "loss: 6.931470E-01 | loss scale: 1.0 | grad norm: 2.000 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 | data wait: 12.5% | tokens/s per device: 20.0 | "
        "target tokens/s per device: 5.0 | TFLOP/s per device: 0.5 | MFU: 5.0% | peak memory (GiB): 1.50 | "
        "remaining time: 0:00:00 |"
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_lines_are_means_over_the_interval(lines, lag):
    bad = {2: {"loss": math.nan}, 3: {"loss": math.inf}}
    trainer = make(LogLine(packed=True), steps=7, lag=lag, log_interval=3, values=lambda step: bad.get(step - 3, {}))
    trainer.train()
    first, second, last = lines()
    assert "iteration        3/       7" in first and "| loss: 2.000000E+00 |" in first
    assert "samples per iteration: 10.0 | tokens per sample: 8.000000E+00" in first
    assert "| loss: NAN |" in second and "skipped iterations:   2 | number of nan iterations:   2" in second
    assert "iteration        7/       7" in last and "skipped iterations:   0" in last


def test_remaining_time_is_made_of_recent_steps(lines):
    line = LogLine(packed=False)
    line.on_run_start(make(steps=5000))
    for iteration, seconds in enumerate([600.0, *[1.0] * 4, *[2.0, 4.0] * 30], start=1):
        metrics = dict.fromkeys(("loss", "tokens", "target_tokens", "tflop", "skipped_step", "grad_norm"), 1.0)
        metrics |= {"learning_rate": 0.1, "data_wait_seconds": 0.0, "consumed_samples": 8, "peak_memory_gib": 1.0}
        line.on_step_end(StepRecord(iteration, {**metrics, "seconds": seconds}))
    remaining = [text.rpartition("remaining time: ")[2] for text in lines()]
    assert remaining[0] == "833:10:00 |"  # the first step alone
    assert remaining[1] == "1:23:18 |"  # it warms up: not counted any more
    assert remaining[-1] == "4:06:45 |"


def test_validation_loss_has_a_line(lines):
    make(LogLine(packed=False), evaluation(0.25), steps=1).train()
    assert lines()[-1] == " validation loss at iteration 1 | loss: 2.500000E-01 |"


@pytest.mark.parametrize("lag", [0, 1])
def test_line_has_means_over_target_tokens(lines, lag):
    """Steps count by their tokens: (2 * 1 + 6 * 4) / 7 for a; b occurs in one of the two steps."""
    of_step = {1: {"cross_entropy/a": 2.0, "target_tokens/a": 1, "cross_entropy/b": 0.0, "target_tokens/b": 0},
               2: {"cross_entropy/a": 24.0, "target_tokens/a": 6, "cross_entropy/b": 1.5, "target_tokens/b": 3}}
    trainer = make(LogLine(packed=False), steps=2, lag=lag, values=of_step.__getitem__, log_interval=2)
    trainer.channels = ("a", "b")
    trainer.train()
    (line,) = lines()
    assert re.findall(r"(loss[^:|]*): ([^ ]+)", line)[:3] == [
        ("loss", "1.500000E+00"), ("loss of a", "3.714286E+00"), ("loss of b", "5.000000E-01"),
    ]


def test_validation_line_has_the_data_sets(lines):
    make(LogLine(packed=False), evaluation(0.25, **{"validation_loss/a": 0.5}), steps=1).train()
    assert lines()[-1] == " validation loss at iteration 1 | loss: 2.500000E-01 | loss of a: 5.000000E-01 |"


# the metrics file


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lag", [0, 1])
def test_one_line_per_step_with_every_metric(tmp_path, lag):
    values = lambda step: {"new_metric": 10.0 * step, "loss": math.nan if step == 2 else 1.0}  # noqa: E731
    make(MetricsFile(str(tmp_path)), evaluation(), lag=lag, log_interval=100, values=values).train()
    found = read(tmp_path)
    assert [line["iteration"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["consumed_samples"] for line in found] == [8, 16, 24, 32, 40]
    assert [line["new_metric"] for line in found] == [10.0, 20.0, 30.0, 40.0, 50.0]  # one edit: the step's
    assert [line["loss"] for line in found] == [1.0, None, 1.0, 1.0, 1.0]
    assert [line.get("validation_loss") for line in found] == [None, 0.5, None, 0.5, 0.5]
    rest = {"time", "learning_rate", "seconds", "tokens_per_second_per_device", "mfu", "peak_memory_gib"}
    assert rest <= set(found[0])


def test_a_resumed_run_continues_the_file(tmp_path, lines):
    """Killed after step 5 of 8, with a torn line, and resumed from the checkpoint of step 3."""
    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_step_start(self, iteration):
            if iteration == 6:
                raise Killed

    def file():
        return MetricsFile(str(tmp_path))

    whole = tmp_path / "whole"
    make(MetricsFile(str(whole)), steps=8).train()
    with pytest.raises(Killed):
        make(file(), Kill(), steps=8).train()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"iteration": 3, "lo')
    assert len(read_complete(tmp_path)) == 5
    make(file(), steps=8, iteration=3).train()
    assert any("removed 3 lines after iteration 3" in line for line in lines())
    timed = ("time", "seconds", "mfu")
    ours, theirs = (
        [{key: value for key, value in line.items() if key not in timed and "second" not in key}
         for line in read(place)]
        for place in (tmp_path, whole)
    )
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "whole"]  # no temporary file is left


def test_a_run_from_the_start_sets_the_file_of_an_earlier_run_aside(tmp_path, lines):
    for steps in (3, 2, 1):
        make(MetricsFile(str(tmp_path)), steps=steps).train()
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert counts == {"metrics.1.jsonl": 3, "metrics.2.jsonl": 2, "metrics.jsonl": 1}
    assert any("is of an earlier run; it is kept as metrics.2.jsonl" in line for line in lines())


def read_complete(directory):
    return [line for line in (directory / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_lines_up_to_a_checkpoint_are_on_disk_before_it(tmp_path):
    seen = []

    class Looking(Manager):
        def start(self, progress):
            seen.append((progress.iteration, [line["iteration"] for line in read(tmp_path)], read(tmp_path)[-1]))

    make(MetricsFile(str(tmp_path)), evaluation(), Checkpointing(Looking()), steps=4, lag=1, save_interval=2).train()
    assert [(iteration, lines) for iteration, lines, _ in seen] == [(2, [1, 2]), (4, [1, 2, 3, 4])]
    assert all(last["validation_loss"] == 0.5 for _, _, last in seen)


def test_a_full_disk_warns_once_and_leaves_no_torn_line(tmp_path, caplog, monkeypatch):
    pwrite, full = os.pwrite, []

    def write(descriptor, data, offset):
        if len(full) in (2, 3):  # in the second and the third line: a part fits, then none
            full.append(1)
            if len(full) == 3:
                return pwrite(descriptor, data[:7], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        full.append(1)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    make(MetricsFile(str(tmp_path)), steps=5).train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left" in warnings[0] and "metrics.jsonl" in warnings[0]
    assert [line["iteration"] for line in read(tmp_path)] == [1, 2, 4, 5]


def test_other_ranks_write_nothing(tmp_path):
    layout = SimpleNamespace(world_size=2, is_main=False, rank=1, dp_size=1, context_size=1)
    make(MetricsFile(str(tmp_path)), layout=layout).train()
    assert list(tmp_path.iterdir()) == []


# the summary


def summary(seconds, *, samples=None, tokens=800.0, packed=False, failed=False):
    callback = RunSummary(packed=packed)
    callback.on_run_start(make())
    for iteration, taken in enumerate(seconds, start=1):
        metrics = {"seconds": taken, "samples": samples[iteration - 1] if samples else 8.0, "tokens": tokens}
        callback.on_step_end(StepRecord(iteration, metrics))
    callback.on_run_end(failed=failed)


def test_summary_averages_steps_51_to_150(lines):
    summary([9.0] * 50 + [0.2] * 100 + [9.0] * 10)
    assert lines()[-3:] == [
        "Elapsed Time Per iteration: 200.0",
        "Average Samples per Second: 40.000",
        "Consumed Tokens per Second: 4000.000",
    ]
    assert lines()[0] == "training finished at iteration 0; peak memory 1.50 GiB"


def test_summary_counts_packed_samples(lines):
    summary([0.2] * 3, samples=[1.0, 30.0, 50.0], packed=True)
    assert lines()[-2:] == ["Average Samples per Second: 200.000", "Consumed Tokens per Second: 4000.000"]


def test_summary_of_a_short_run_leaves_out_the_warm_up(lines):
    summary([5.0, *[0.1] * 8])
    assert "Elapsed Time Per iteration: 100.0" in lines()
    summary([5.0])
    assert lines()[-3] == "Elapsed Time Per iteration: 5000.0"


def test_summary_of_a_run_without_steps_or_with_an_error(lines):
    summary([])
    assert len(lines()) == 1
    summary([0.5], failed=True)
    assert len(lines()) == 4 and "finished" not in lines()[1]


# the console


def test_console(capsys):
    logger = logging.getLogger("mindspeed_mm.anything")
    package = logging.getLogger("mindspeed_mm")
    before = package.handlers, package.level, package.propagate
    try:
        for rank in (0, 2):
            setup_logging(rank)
            logger.info("start-up")
            logger.info(" a line", extra=RAW)
            logger.info("a place", extra=ALL_RANKS)
            logger.warning("something")
    finally:
        package.handlers, package.level, package.propagate = before
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("s] ")[2] or line for line in lines] == [
        "start-up", " a line", "a place", "warning: something", "rank 2: a place", "warning: rank 2: something",
    ]
    assert lines[0].startswith(" [   0.")


def evaluation_of(data, *, stop_requested=lambda: False, requests=None):
    callback = Evaluation(data, split=lambda batch: batch, skipped_samples=SkippedSamples(0))
    callback.on_run_start(SimpleNamespace(
        args=SimpleNamespace(eval_iters=100, global_batch_size=4, micro_batch_size=4), model=nn.Linear(1, 1),
        context=SimpleNamespace(
            backend=SimpleNamespace(device=torch.device("cpu")), stop_requested=stop_requested,
            layout=SimpleNamespace(dp_size=1, context_size=1, rank=0), progress=Progress(),
        ),
        stop_on_request=lambda: requests.append("stop"),
    ))
    return callback


def test_an_evaluation_is_left_when_the_run_is_asked_to_stop(caplog):
    caplog.set_level("INFO")
    taken, asked = [], iter([False] * 3 + [True] * 100)
    data = (taken.append(place) or StepBatches([], SkipReport()) for place in range(100))
    requests = []
    callback = evaluation_of(data, stop_requested=lambda: next(asked), requests=requests)
    assert callback.evaluate() is None and len(taken) == 5  # asked at the fourth, left at the fifth
    assert caplog.messages == ["evaluation aborted after 4 micro-batches: the run was asked to stop"]
    assert callback._run.model.training and callback._run.context.progress.evaluation_due and requests == ["stop"]


def test_an_evaluation_without_a_target_token_has_no_loss(caplog):
    """0 would look like a loss."""
    callback = evaluation_of([StepBatches([], SkipReport(too_long=2, no_target=1))])
    assert callback.evaluate() is None and callback.evaluate() is None
    (message,) = caplog.messages
    assert message.startswith("evaluation: 3 held-out samples are longer than --seq-length or have no target token")
    assert message.endswith("and no other is left: there is no validation loss")
