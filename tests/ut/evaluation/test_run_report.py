"""The report of a run from its directory: sections, events, samples, the command, and a browser's view of it."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import subprocess

import pytest

from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.report.__main__ import main
from mindspeed_mm.evaluation.report.history import METRICS_FILE, History
from mindspeed_mm.evaluation.report.run_data import DATA_FILE, RunData, SampleSet, load_run, run_name
from mindspeed_mm.evaluation.report.run_report import comparison_page, run_page
from mindspeed_mm.evaluation.sample import EvaluatedSample

HOSTILE = "</script><img src=x onerror=alert(1)>"


def metrics(iteration: int) -> dict:
    found = {
        "iteration": iteration, "time": f"2026-11-28T11:{iteration // 60:02d}:{iteration % 60:02d}.000+00:00",
        "consumed_samples": 8 * iteration, "learning_rate": 1e-4, "data_wait_seconds": 0.01, "seconds": 0.5,
        "loss": 3.0 / iteration, "tokens": 100.0, "target_tokens": 20.0, "grad_norm": 1.0, "skipped_step": 0.0,
        "skipped_too_long": float(iteration == 5), "tokens_per_second_per_device": 200.0, "peak_memory_gib": 0.5,
        "router_max_load": 1.5, f"loss/{HOSTILE}": 2.0 / iteration, "loss/图": 1.0, f"target_tokens/{HOSTILE}": 10.0,
    }
    if iteration % 50 == 0:
        found |= {"validation_loss": 4.0 / iteration, "validation_loss/图": 0.5, "validation_exact_match": 0.25,
                  "validation_token_accuracy": 0.75}  # fmt: skip
    return found


def evaluated(index: int, *, given: str, exact: bool = False) -> EvaluatedSample:
    return EvaluatedSample(
        index=index, data_set=HOSTILE, question=f"<image>{HOSTILE}", expected="一只猫", given=given, exact=exact,
        scores={"loss": 0.25}, images=(b"\xff\xd8\xff\xd9",),
    )


@pytest.fixture
def directory(tmp_path):
    """A ``--save`` directory with everything that a report can show."""
    place = tmp_path / "run" / "save_dir"
    (place / "reports").mkdir(parents=True)
    lines = [metrics(iteration) for iteration in range(1, 101)]
    lines[9] |= {"loss": None, "skipped_step": 1.0}
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 101, "lo')
    (place / "reports" / "iteration_0000020_spike.json").write_text(json.dumps(
        {"iteration": 20, "reason": f"loss is high {HOSTILE}", "samples": [{"source": "data.json, record 3"}]}
    ))
    (place / "reports" / "iteration_0000021_spike.json").write_text("{")
    data = RunData(
        state="stopped", reason="on request", train_iters=200, environment={"device": "cpu"},
        settings={"flags": {"--lr": 1e-4}, "data": {"name": HOSTILE}},
        sessions=[(0, "2026-11-28T11:00:00+00:00"), (50, "2026-11-28T11:00:50+00:00")],
        router=(1, 100, [[10, 20, 30, 40], [25, 25, 25, 25]]),
    )
    data.add_samples(50, [evaluated(1, given="一只狗"), evaluated(2, given="x")])
    data.add_samples(100, [evaluated(1, given="一只猫", exact=True), evaluated(2, given="x")])
    data.save(place)
    return place


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page)


ALL = ["Overview", "Loss", "Optimization", "Speed and memory", "Experts", "Evaluation samples", "Events", "Settings"]


def test_report_has_everything(directory, capsys):
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert headings(page) == ALL
    assert "Iteration 100 of 200" in page and ">stopped</span>" in page and "Stopped: on request" in page
    assert HOSTILE not in page
    events = re.findall(r"<td class=right>(\d+)</td><td><span class=\"badge [a-z]+\">([^<]*)</span>", page)
    assert events == [("0", "start"), ("5", "skipped samples"), ("10", "skipped step"), ("20", "anomaly"),
                      ("50", "resume")]  # fmt: skip
    assert "mean of the last 10 steps" in page
    assert "1 of 2 answers shown are exact after iteration 100; 0 were after iteration 50." in page
    assert "at 50</dt><dd tabindex=0>一只<ins>狗</ins>" in page


def test_metrics_alone_are_enough(directory):
    for name in (DATA_FILE, "reports"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = run_page(load_run(directory)).render()
    assert headings(page) == ["Overview", "Loss", "Optimization", "Speed and memory", "Experts", "Events"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}', '{"version": 1}', "[" * 100_000])
def test_damaged_data_are_left_out(directory, content):
    (directory / DATA_FILE).write_text(content)
    assert load_run(directory).sessions == [] and load_run(directory).history.iteration == 100


@pytest.mark.parametrize(
    ("name", "where"),
    [(DATA_FILE, ("first", "iteration")), (DATA_FILE, ("sessions",)), ("reports/of a step", ("iteration",))],
)
def test_numbers_that_are_none_are_left_out(directory, name, where):
    """Python's JSON has infinities, and whole numbers of any length."""
    path = directory / name
    if not path.exists():
        path = next(one for one in (directory / "reports").iterdir() if '"iteration"' in one.read_text())
    content = json.loads(path.read_text())
    part = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = float("inf")
    path.write_text(json.dumps(content))
    assert run_page(load_run(directory)).render()


@pytest.mark.parametrize("value", ["1" * 400, "1e308", "-1e308", "Infinity", "true", "null", "[]"])
@pytest.mark.parametrize("name", ["loss", "validation_loss", "seconds", "iteration", "time", "grad_norm"])
def test_metrics_that_cannot_be_drawn_are_left_out(directory, name, value):
    """Of a line at the end."""
    with (directory / METRICS_FILE).open("a") as file:
        file.write(f'{{"iteration": 101, "loss": 1.0, "{name}": {value}}}\n')
    assert run_page(load_run(directory)).render()


@pytest.mark.parametrize("name", [DATA_FILE, METRICS_FILE, "best_checkpoints.json"])
def test_pipes_are_not_waited_for(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    if name == METRICS_FILE:
        with pytest.raises(UserError, match="not a regular file"):
            load_run(directory)
    else:
        assert run_page(load_run(directory)).render()


def test_data_come_back_as_they_were(directory):
    run = load_run(directory)
    assert (run.state, run.train_iters, run.router) == ("stopped", 200, [1, 100, [[10, 20, 30, 40], [25] * 4]])
    assert run.first == SampleSet(50, (evaluated(1, given="一只狗"), evaluated(2, given="x")))
    assert run.latest.iteration == 100 and run.latest.samples[0].exact
    assert run.name == run_name(directory) == "run/save_dir"


def test_a_resume_forgets_what_is_repeated(directory):
    run = load_run(directory)
    run.kept = [(80, 0.1), (60, 0.2)]
    run.end("failed", "out of memory", "then", iteration=90)
    run.forget_after(70)
    run.start(70, "now")
    assert run.sessions[-1] == (70, "now") and run.latest is run.first and run.first.iteration == 50
    assert run.router is None and run.kept == [(60, 0.2)] and len(run.ends) == 1
    run.forget_after(40)
    assert run.latest is None and [start for start, _ in run.sessions] == [0] and run.kept == []
    run.forget_after(0)
    assert run.sessions == run.ends == []


def test_data_stay_bounded(tmp_path):
    run = RunData()
    big = EvaluatedSample(index=0, question="q" * 10**5, expected="e" * 10**5, given="g" * 10**5, exact=False,
                          images=(bytes(100_000),) * 2)  # fmt: skip
    for iteration in (1, 2):
        run.add_samples(iteration, [big] * 1000)
    for start in range(1000):
        run.start(start + 2, "time")
        run.end("failed", "reason", "time", iteration=start + 3)
    run.save(tmp_path)
    assert (tmp_path / DATA_FILE).stat().st_size < 3_000_000
    assert sum(bool(sample.images) for sample in run.first.samples) == 3


def test_history_of_metrics_that_begin_late():
    history = History()
    history.add(1, {"loss": 1.0, "note": "text"})
    history.add(2, {"loss": math.nan, "late": 5.0})
    history.add(2, {"loss": 7.0})  # a step that is there already
    history.amend(2, {"validation_loss": 3.0})
    history.amend(1, {"validation_loss": 9.0})
    assert len(history) == 2 and history.points("late")[0].tolist() == [2.0]
    assert history.points("loss")[1].tolist() == [1.0] and history.last("validation_loss") == 3.0
    assert history.names("") == ["late", "loss", "validation_loss"] and history.last("note") is None


def test_comparison_of_runs(directory, tmp_path, capsys):
    other = tmp_path / "other" / "save_dir"
    shutil.copytree(directory, other)
    data = json.loads((other / DATA_FILE).read_text())
    data["settings"]["flags"]["--lr"] = 2e-4
    (other / DATA_FILE).write_text(json.dumps(data))
    assert main([str(directory), str(other), "--output", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert headings(page) == ["Overview", "Curves", "Flags that differ"]
    assert "run/<wbr>save_dir" in page and "other/<wbr>save_dir" in page and "0.0002" in page


def plain(markup: str) -> str:
    return re.sub(r"<[^>]*>", "", markup)


def test_comparison_has_the_best_values_of_each_run(directory, tmp_path):
    """A run of 100 steps and one of 40 that stopped early, compared by another metric than those of every run."""
    short = RunData(name="short", state="finished", reason="early stopping: it has not improved", metric="validation_x",
                    kept=[(20, 0.5)])  # fmt: skip
    for iteration in range(1, 41):
        short.history.add(iteration, {"loss": float(iteration)})
        if iteration % 10 == 0:
            short.history.amend(iteration, {"validation_exact_match": iteration / 100, "validation_x": iteration})
    page = comparison_page([load_run(directory), short]).render()
    overview = page.partition("<section")[2].partition("</section>")[0]
    columns = re.findall(r"<th[^>]*>([^<]*)</th>", overview)
    assert columns == ["run", "state", "iteration", "loss", "best validation loss", "best token accuracy",
                       "best exact match", "best validation_x", "best checkpoint", "tokens/s per device"]  # fmt: skip
    rows = [[plain(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
            for row in re.findall(r"<tr>(<td.*?)</tr>", overview)]  # fmt: skip
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {"run": "run/save_dir", "state": "stopped ", "iteration": "100", "loss": "0.03144 last 10",
         "best validation loss": "0.04 at 100", "best token accuracy": "75.0 % at 50",
         "best exact match": "25.0 % at 50", "best validation_x": "–", "best checkpoint": "–",
         "tokens/s per device": "200"},
        {"run": "short", "state": "finished early stopping", "iteration": "40", "loss": "38 last 5",
         "best validation loss": "–", "best token accuracy": "–", "best exact match": "40.0 % at 40",
         "best validation_x": "10 at 10", "best checkpoint": "20", "tokens/s per device": "–"},
    ]  # fmt: skip


def events(page: str) -> list[tuple[str, str, str]]:
    return re.findall(r"<td class=right>(\d+)</td><td><span class=\"badge [a-z]+\">([^<]*)</span></td><td>(.*?)</td>",
                      page)  # fmt: skip


def test_best_checkpoints_come_from_their_file(directory):
    """The rebuilt page: the overview names those kept, the events say which evaluations were the best so far."""
    ranking = [{"iteration": 100, "value": 0.04}, {"iteration": 50, "value": 0.08}, {"iteration": 150, "value": 0.01}]
    (directory / "best_checkpoints.json").write_text(json.dumps({"metric": "validation_loss", "ranking": ranking}))
    run = load_run(directory)
    assert run.kept == [(100, 0.04), (50, 0.08)]  # of iteration 150 there is no step
    page = run_page(run).render()
    assert "<dt>Best checkpoint</dt><dd>100</dd><dd class=remark>validation_loss 0.04</dd>" in page
    assert "<td>iter_0000050</td><td class=right>0.08</td>" in page
    assert [event for event in events(page) if event[1] == "new best"] == [
        ("50", "new best", "validation_loss 0.08; checkpoint iter_0000050 is kept"),
        ("100", "new best", "validation_loss 0.04, 0.08 before; checkpoint iter_0000100 is kept"),
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metric": "loss", "ranking": [{}]}'])
def test_a_damaged_file_of_best_checkpoints_is_left_out(directory, content):
    (directory / "best_checkpoints.json").write_text(content)
    assert (load_run(directory).metric, load_run(directory).kept) == ("", [])


def test_events_tell_how_runs_ended(directory):
    run = load_run(directory)
    run.end("stopped", "on request", "2026-11-28T11:00:49+00:00", iteration=50)
    run.end("failed", "out of memory", "2026-11-28T11:00:45+00:00", iteration=60)
    run.end("finished", "early stopping: no gain", "2026-11-28T11:03:00+00:00", iteration=100)
    page = run_page(run).render()
    assert [event for event in events(page) if int(event[0]) >= 50] == [
        ("50", "stopped", "on request; at 2026-11-28 11:00 UTC"), ("50", "resume", "at 2026-11-28 11:00 UTC"),
        ("60", "failed", "out of memory; at 2026-11-28 11:00 UTC; continued from iteration 50"),
        ("100", "early stopping", "no gain; at 2026-11-28 11:03 UTC"),
    ]  # fmt: skip


def test_every_chart_over_steps_shows_and_names_the_resume(directory):
    page = run_page(load_run(directory)).render()
    charts = re.findall(r'<figure class="chart lines.*?</figure>', page, re.DOTALL)
    assert len(charts) >= 10
    for chart in charts:
        title = re.search("<figcaption><span>(.*?)</span>", chart)[1]
        assert '<path class="event"' in chart and '<i class="event"></i>resumed</li>' in chart, title


@pytest.mark.parametrize(("minutes", "stale"), [(1, False), (6, True), (6000, True)])
def test_a_run_without_update_may_have_ended(directory, capsys, minutes, stale):
    """Killed at once: its data say that it trains, and its last step was written long ago."""
    moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(minutes=minutes)
    data = json.loads((directory / DATA_FILE).read_text())
    data |= {"state": "running", "reason": "", "updated": moment.isoformat(timespec="seconds")}
    (directory / DATA_FILE).write_text(json.dumps(data))
    (directory / "metrics.jsonl").write_text('{"iteration": 100, "loss": 1.0, "seconds": 1.0}\n')
    assert main([str(directory)]) == 0
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert ("the run may have ended.</p>" in page) == stale
    assert ("Remaining time" in page) == (not stale) and ('role="progressbar"' in page) == (not stale)
    assert ("the run may have ended" in capsys.readouterr().err) == stale
    assert main([str(directory), str(directory), "--output", str(directory / "both.html")]) == 0
    assert f'data-since="{data["updated"]}">running</span>' in (directory / "both.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "metrics.jsonl cannot be read"), ("", "metrics.jsonl has no step")]
)
def test_a_directory_without_steps_is_one_line(tmp_path, capsys, content, reason):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.strip().splitlines()) == 1


POINTER = """
document.querySelectorAll(".plot").forEach(plot => {
  const box = plot.getBoundingClientRect(), clientX = box.left + box.width / 2, clientY = box.top + box.height / 2;
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
});
document.querySelectorAll(".chart button").forEach(button => button.click());
"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine")
def test_a_browser_shows_it_without_error_or_request(directory, tmp_path):
    main([str(directory)])
    path = directory / "report.html"
    assert not re.search(r"https?://", path.read_text(encoding="utf-8"))
    picture = tmp_path / "page.png"
    options = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking", "--window-size=1200,2000"]
    dom = subprocess.run(
        [*options, "--dump-dom", f"file://{path}"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    root = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-report="ready"' in root and "data-error" not in root, root
    assert "<img src=\"x\"" not in dom and len(re.findall("<svg", dom)) >= 10
    drawn = re.findall(r'<path class="(?:main|raw|point)"[^>]* d="([^"]*)"', dom)
    assert len(drawn) >= 10 and all(drawn)
    command = [*options, f"--screenshot={picture}", f"file://{path}"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 10_000
    # with a pointer over each chart, and its scale switched
    pointed = tmp_path / "pointed.html"
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    pointed.write_text(page.replace("</body>", f"<script>{POINTER}</script></body>"), encoding="utf-8")
    dom = subprocess.run(
        [*options, "--dump-dom", f"file://{pointed}"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "data-error" not in re.search(r"<html[^>]*>", dom)[0]
    tips = re.findall(r'<div class="tip"[^>]*><b>([^<]*)</b>', dom)
    assert len(tips) == page.count('class="plot"') and tips[0].startswith("iteration ")
    assert any(re.fullmatch(r"sparse layer \d, expert \d", tip) for tip in tips)
    assert 'aria-pressed="true">linear scale' in dom and '<div data-scale="linear" hidden' in dom
    # a page of a run that is running no more
    old = tmp_path / "old.html"
    page = path.read_text(encoding="utf-8")
    badge = '<span class="badge active" data-since="2020-01-01">'
    old.write_text(page.replace('<span class="badge warning">', badge, 1), encoding="utf-8")
    dom = subprocess.run(
        [*options, "--dump-dom", f"file://{old}"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert re.search(r'<span class="badge warning" data-since="2020-01-01">no update for \d+ d</span> '
                     "<small>the run may have ended</small>", dom)
    # and what a page with an error, or without its script, would look like
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text(encoding="utf-8").replace("data-values=", "data-nothing="), encoding="utf-8")
    dom = subprocess.run(
        [*options, "--dump-dom", f"file://{broken}"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "data-error" in re.search(r"<html[^>]*>", dom)[0]
