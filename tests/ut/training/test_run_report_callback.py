"""The run report's callback: what it collects, when it writes, and what it survives."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.checkpoint.best import BestSoFar
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.evaluation.report.run_data import load_run
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.training.callbacks import run_report
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.run_report import RunReport
from mindspeed_mm.training.metrics import StepRecord

LAYERS, EXPERTS = 2, 4


class Clock:
    """Stands in for ``time``: a second for each step, and what writing a page takes."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


DESCRIPTION = {
    "flags": {"lr": 0.1}, "data": {}, "model": {}, "fsdp2": {}, "data_summary": {
        "train": "9 samples, 9 per epoch", "samples_per_epoch": 9, "data_sets": [], "fingerprint": "ab",
    },
    "hardware": {"device": "cpu", "ranks": 2, "host": "here", "host_memory_gib": 5.5}, "packages": {"torch": "2.13.0"},
    "git": {"commit": "c0ffee" * 6, "branch": "main", "dirty": True},
}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_report, "time", clock)
    return clock


class Fake:
    """A run of steps that do nothing, and its callbacks."""

    def __init__(self, directory, *, start=0, last=1000, rank=0, experts=True):
        self.args = SimpleNamespace(
            save=str(directory), train_iters=last, keep_best=2, early_stopping_patience=None
        )
        self.stopped, self.error, self.finished_early, self.experts = False, None, "", experts
        self.context = SimpleNamespace(
            progress=Progress(iteration=start),
            backend=SimpleNamespace(name="cpu", is_accelerator=False, device=torch.device("cpu")),
            layout=SimpleNamespace(
                rank=rank, is_main=rank == 0, world_size=2, dp_size=2, context_size=1, expert_mesh=None
            ),
        )
        self.router_choices = None
        self.report = RunReport(str(directory), describe=lambda: DESCRIPTION)
        self.callbacks = [MetricsFile(str(directory)), self.report]
        self.pages = []
        self.notify("on_run_start", self)

    def notify(self, event, *arguments, **keywords):
        for callback in self.callbacks:
            getattr(callback, event)(*arguments, **keywords)

    def step(self, clock=None):
        progress = self.context.progress
        progress.iteration += 1
        if self.experts:
            self.router_choices = (0 if self.router_choices is None else self.router_choices) + torch.full(
                (LAYERS, EXPERTS), progress.iteration
            )
        metrics = {"loss": 1.0 / progress.iteration, "seconds": 1.0, "skipped_step": 0.0, "learning_rate": 0.1,
                   "target_tokens": 10.0}  # fmt: skip
        if clock is not None:
            clock.now += 1.0
        self.notify("on_step_end", StepRecord(progress.iteration, metrics))
        self.notify("on_step_queued", progress.iteration)

    def evaluate(self, given="a dog"):
        sample = EvaluatedSample(index=0, question="What?", expected="a cat", given=given, exact=given == "a cat")
        self.notify("on_evaluation", self.context.progress.iteration, {"validation_loss": 0.5}, [sample])

    def end(self, *, failed=False):
        self.notify("on_run_end", failed=failed)


def test_a_run_to_its_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mindspeed_mm")
    run = Fake(tmp_path, last=3)
    for _ in range(3):
        run.step()
    run.evaluate()
    run.end()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">finished</span>" in page and "Iteration 3 of 3" in page and "data-refresh" not in page
    found = load_run(tmp_path)
    assert found.router == [1, 3, [[6] * EXPERTS] * LAYERS]  # 1 + 2 + 3 choices of each expert
    assert found.history.iteration == 3 and found.latest.iteration == 3
    assert found.environment["ranks"].startswith("world size 2") and found.sessions[0][0] == 0 and found.ends == []
    assert {"host memory (GiB)", "data fingerprint", "train"} <= found.environment.keys()
    assert not {"samples per epoch", "fingerprint"} & found.environment.keys()
    assert found.settings["flags"] == {"lr": 0.1}
    assert f"run report: {tmp_path / 'report.html'}" in caplog.text


def test_other_ranks_and_dense_models_write_no_load(tmp_path):
    run = Fake(tmp_path / "other", rank=1)
    run.step()
    run.end()
    assert not (tmp_path / "other").exists()
    run = Fake(tmp_path / "dense", experts=False)
    run.step()
    run.end()
    assert load_run(tmp_path / "dense").router is None


def test_a_resumed_run_continues_the_report(tmp_path):
    """Interrupted after step 7, resumed from step 5: steps, sessions, and the first evaluation's samples."""
    run = Fake(tmp_path, last=10)
    for _ in range(5):
        run.step()
    run.evaluate("a dog")
    run.notify("on_save", 5)
    run.step()
    run.step()
    run.evaluate("a bird")  # after the checkpoint: repeated
    run.notify("on_step_end", StepRecord(8, {"loss": 1.0}))  # and no end: it was killed
    assert load_run(tmp_path).state == "running"
    run = Fake(tmp_path, start=5, last=10)
    for _ in range(5):
        run.step()
    run.evaluate("a cat")
    run.end()
    found = load_run(tmp_path)
    assert [iteration for iteration, _ in found.sessions] == [0, 5] and found.state == "finished"
    assert found.history.iterations.tolist() == list(range(1, 11))
    assert (found.first.iteration, found.first.samples[0].given) == (5, "a dog")
    assert (found.latest.iteration, found.latest.samples[0].given) == (10, "a cat")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">resume</span>" in page
    # the page in memory, of all steps, is the one made from the files
    assert run.report._data.history.points("loss")[1].tolist() == found.history.points("loss")[1].tolist()
    Fake(tmp_path, last=1).end()  # a run from iteration 0 begins another report
    assert [iteration for iteration, _ in json.loads((tmp_path / "report_data.json").read_text())["sessions"]] == [0]


@pytest.mark.parametrize("early", ["", "early stopping: no gain"], ids=["complete", "early"])
def test_a_run_that_has_nothing_to_train_adds_no_event(tmp_path, early):
    run = Fake(tmp_path, last=2 + bool(early))
    run.step()
    run.step()
    run.finished_early = early
    run.end()
    former = load_run(tmp_path)
    assert [(end[0], end[2]) for end in former.ends] == ([(2, early)] if early else [])
    again = Fake(tmp_path, start=2, last=run.args.train_iters)
    again.finished_early = early
    again.end()
    found = load_run(tmp_path)
    assert (found.sessions, found.ends, found.state, found.reason) == (former.sessions, former.ends, "finished", early)
    more = Fake(tmp_path, start=2, last=4)
    assert load_run(tmp_path).sessions == former.sessions  # nothing is written yet
    more.step()
    more.step()
    more.end()
    assert [iteration for iteration, _ in load_run(tmp_path).sessions] == [0, 2]


def test_best_checkpoints_are_those_on_disk(tmp_path):
    """Of the ranking, the complete ones; at the end also the last step's, whose save the run waits for."""
    run = Fake(tmp_path, last=3)
    for iteration in (1, 2):
        place = tmp_path / f"iter_{iteration:07d}"
        place.mkdir()
        if iteration == 1:
            (place / "manifest.json").write_text("{}")
    run.context.progress.best = BestSoFar("validation_loss", ranking=[(3, 0.1), (2, 0.2), (1, 0.3)])
    run.step()
    run.step()
    run.report._write()
    assert run.report._data.kept == [(1, 0.3)]
    run.step()
    run.end()
    found = load_run(tmp_path)
    assert (found.metric, found.kept) == ("validation_loss", [(3, 0.1), (1, 0.3)])
    assert "<dt>Best checkpoint</dt><dd>3</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def written(run, clock, monkeypatch, *, cost, steps):
    """After which steps a page was written, each taking ``cost`` seconds."""
    pages = []

    def write(self, path):
        clock.now += cost
        pages.append(run.context.progress.iteration)

    monkeypatch.setattr("mindspeed_mm.evaluation.report.page.Page.write", write)
    for _ in range(steps):
        run.step(clock)
    return pages


def test_a_cheap_page_is_written_every_minute(tmp_path, clock, monkeypatch):
    run = Fake(tmp_path)
    pages = written(run, clock, monkeypatch, cost=0.0, steps=300)
    assert len(pages) == 5 and all(59 <= b - a <= 62 for a, b in zip(pages, pages[1:], strict=False))
    assert pages[0] == 2  # a reader finds one at once


@pytest.mark.parametrize("experts", [True, False])
def test_a_costly_page_is_written_less_often(tmp_path, clock, monkeypatch, experts):
    run = Fake(tmp_path, experts=experts)
    pages = written(run, clock, monkeypatch, cost=2.0, steps=1000)
    assert 2 <= len(pages) <= 3
    began = clock.now
    for _ in range(100):  # evaluations in every step change nothing about that
        run.step(clock)
        run.evaluate()
        run.notify("on_save", run.context.progress.iteration)
    assert 2.0 * (len(pages) - 1) <= 0.005 * (clock.now - 1000.0) and clock.now - began < 105
    run.end()
    assert pages[-1] == 1100  # the last page always


@pytest.mark.parametrize(
    ("failed", "stopped", "state", "reason"),
    [(True, False, "failed", "out of memory <b>"), (False, True, "stopped", "on request"),
     (False, False, "stopped", "by --exit-interval")],
    ids=["failed", "stopped", "exit interval"],
)  # fmt: skip
def test_how_a_run_ended(tmp_path, failed, stopped, state, reason):
    run = Fake(tmp_path)
    run.step()
    run.stopped = stopped
    run.router_choices = None if failed else run.router_choices
    try:
        if failed:
            raise RuntimeError("out of memory <b>\nmore lines")
    except RuntimeError:
        run.end(failed=True)
    else:
        run.end()
    found = load_run(tmp_path)
    assert (found.state, found.reason) == (state, reason)
    assert [end[:3] for end in found.ends] == [(1, state, reason)]
    assert "<b>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_warned_of_once(tmp_path, caplog, monkeypatch):
    (tmp_path / "report.html").mkdir()
    run = Fake(tmp_path)
    monkeypatch.setattr(run_report, "_INTERVAL", 0.0)
    monkeypatch.setattr(run_report, "_SHARE", 1e9)
    for _ in range(5):
        run.step()
        run.evaluate()
    run.end()
    assert caplog.text.count("cannot be written") == 1 and "training continues" in caplog.text


def test_the_load_is_of_recent_steps():
    load, choices = run_report._RouterLoad(40), torch.zeros(1, 2, dtype=torch.int64)
    spans = []
    for iteration in range(50, 501, 50):
        choices = choices + 50
        first, last, counts = load.take(iteration, choices)
        spans.append((first, last))
        assert counts == [[50 * ((last - max(first - 1, 0)) // 50 + (first == 41))] * 2]
    assert spans[:4] == [(41, 50), (41, 100), (51, 150), (101, 200)] and spans[-1] == (401, 500)
    assert run_report._RouterLoad(7).take(7, choices) is None
