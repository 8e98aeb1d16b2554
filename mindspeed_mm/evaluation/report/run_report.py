"""The page of a run, and of several for comparison."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

import numpy as np

from mindspeed_mm.checkpoint.best import higher_is_better
from mindspeed_mm.checkpoint.directory import iteration_name
from mindspeed_mm.evaluation.report.charts import Event, Series, heat_map, line_chart
from mindspeed_mm.evaluation.report.history import History
from mindspeed_mm.evaluation.report.page import (
    Html,
    Page,
    badge,
    details,
    escape,
    escape_path,
    facts,
    grid,
    join,
    key_figures,
    number,
    preformatted,
    progress_bar,
    sample_card,
    small,
    table,
    text,
)
from mindspeed_mm.evaluation.report.run_data import RunData, seconds_since

REPORT_FILE = "report.html"
_RECENT = 50  # steps, at most, that means of the present are over
_STALE = 300.0  # seconds without an update, after which a run may have ended
_IMPROVEMENTS = 20  # the last ones, as events
_REFRESH = 60  # seconds
_EVENTS = 200  # rows
_BADGES = {"running": "active", "finished": "good", "stopped": "warning", "failed": "bad"}
_GIVEN = "target_tokens/"


def run_page(run: RunData) -> Page:
    """The report of a run; sections without data are left out."""
    history = run.history
    running = run.state == "running"
    stale = may_have_ended(run)
    of = f" of {run.train_iters:,}" if run.train_iters else ""
    updated = _time(run.updated)
    page = Page(
        f"Training run {run.name}",
        f"Iteration {history.iteration:,}{of}{f' · updated {updated}' if updated else ''}",
        status=_state_badge(run),
        refresh_seconds=_REFRESH if running else 0,
    )
    reason = text(f"{run.state.capitalize()}: {run.reason}") if run.reason else Html("")
    if stale:
        reason = text(f"No update since {updated}: the run may have ended.")
    done = history.iteration / run.train_iters if running and run.train_iters and not stale else None
    page.section("Overview", *([] if done is None else [progress_bar(done)]), reason, key_figures(_figures(run)),
                 _kept_checkpoints(run))
    events = _events(run)
    marks = [
        Event(iteration, f"{kind} at iteration {iteration}", bad=kind in _BAD, kind=_MARKED[kind])
        for iteration, kind, _ in events if kind in _MARKED
    ]
    resumes = [mark for mark in marks if not mark.bad]
    for heading, parts in (
        ("Loss", _loss(history, marks, resumes)),
        ("Optimization", _optimization(history, marks, resumes)),
        ("Speed and memory", _speed(history, resumes)),
        ("Experts", _experts(run, resumes)),
        ("Evaluation samples", _samples(run)),
        ("Events", _event_table(events)),
        ("Settings", _settings(run)),
    ):
        if any(parts):
            page.section(heading, *parts)
    return page


def comparison_page(runs: Sequence[RunData]) -> Page:
    """Metrics of several runs in common charts."""
    page = Page("Training runs", " · ".join(run.name for run in runs))
    names = [
        ("validation_loss", "Validation loss"), ("validation_token_accuracy", "Token accuracy"),
        ("validation_exact_match", "Exact match"), ("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate"),
        ("tokens_per_second_per_device", "Tokens per second and device"), ("mfu", "MFU"),
    ]
    page.section("Overview", _results(runs), text(
        "Loss and speed are means over the last tenth of a run's steps, at least 5 and at most "
        f"{_RECENT}; a best value is followed by its iteration.", muted=True))

    def series(name: str) -> list[Series]:
        factor = 100.0 if name in _SHARES else 1.0
        return [Series(run.name, points[0], factor * points[1]) for run in runs if len((points := run.history.points(
            name))[0])]

    page.section("Curves", line_chart("Training loss", series("loss"), scale="both", smooth=True, wide=True), grid(*(
        line_chart(title, series(name), scale="both" if name == "grad_norm" else "linear", smooth=name in _SMOOTHED,
                   unit=" %" if name in _SHARES else "")
        for name, title in names
    )))
    different = _different_flags(runs)
    if different:
        page.section("Flags that differ", table(["flag", *(escape_path(run.name) for run in runs)], different))
    return page


_SHARES = ("validation_token_accuracy", "validation_exact_match", "mfu")
_SMOOTHED = ("grad_norm", "tokens_per_second_per_device", "mfu")
_BAD = ("skipped step", "anomaly", "failed")
_MARKED = {"resume": "resumed", **{kind: kind for kind in _BAD}}  # events in the charts, and what the legend calls them
_ENDS = ("early stopping", "stopped", "failed")
_ORDER = ("start", "skipped samples", "skipped step", "anomaly", "new best", *_ENDS, "resume")  # of one iteration
_BEST = (
    ("validation_loss", "Validation loss"), ("validation_token_accuracy", "Token accuracy"),
    ("validation_exact_match", "Exact match"),
)


def may_have_ended(run: RunData) -> bool:
    """Whether a run that should be training has not written anything for minutes."""
    return run.state == "running" and seconds_since(run.updated) >= _STALE


def _results(runs: Sequence[RunData]) -> Html:
    """Table of several runs: how far they are, and their best values."""
    metrics = dict(_BEST)
    for run in runs:
        metrics.setdefault(run.metric, run.metric)
    metrics = {name: label for name, label in metrics.items() if any(len(run.history.points(name)[0]) for run in runs)}
    kept = any(run.kept for run in runs)
    rows = []
    for run in runs:
        steps = _recent(run.history)
        bests = []
        for name in metrics:
            best = _best(run.history, name)
            bests.append("–" if best is None else join(_value(name, best[1]), " ", small(f"at {best[0]:,}")))
        early = small(run.reason.partition(":")[0]) if run.state == "finished" and run.reason else ""
        rows.append([
            escape_path(run.name), join(_state_badge(run) or "–", " ", early), run.history.iteration,
            join(number(run.history.last("loss", count=steps)), " ", small(f"last {steps}")), *bests,
            *([f"{run.kept[0][0]:,}" if run.kept else "–"] if kept else []),
            number(run.history.last("tokens_per_second_per_device", count=steps)),
        ])
    headers = ["run", "state", "iteration", "loss", *(f"best {label.lower()}" for label in metrics.values()),
               *(["best checkpoint"] if kept else []), "tokens/s per device"]
    return table(headers, rows, align="ll" + "r" * (len(headers) - 2))


def _state_badge(run: RunData) -> Html:
    since = run.updated if run.state == "running" else ""
    return badge(run.state, _BADGES.get(run.state, "neutral"), since=since) if run.state else Html("")


def _recent(history: History) -> int:
    """Number of steps that means of the present are over: a tenth of the run, at least 5 and at most 50."""
    return min(len(history), _RECENT, max(5, len(history) // 10))


def _different_flags(runs: Sequence[RunData]) -> list[list[str]]:
    flags = [run.settings.get("flags") or {} for run in runs]
    names = sorted({name for of_run in flags for name in of_run if name not in ("--save", "--load")})
    rows = [[name, *(escape_path(str(of_run.get(name, "–"))) for of_run in flags)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1] if all(flags) else []


def _best(history: History, name: str) -> tuple[int, float] | None:
    """Iteration and value of the best evaluation by a metric."""
    iterations, values = history.points(name)
    if not len(values):
        return None
    index = int(values.argmax() if higher_is_better(name) else values.argmin())
    return int(iterations[index]), float(values[index])


def _figures(run: RunData) -> list[tuple[str, str, str]]:
    history, found = run.history, []
    count = _recent(history)
    recent = f"mean of the last {count} steps"
    if (loss := history.last("loss", count=count)) is not None:
        found.append(("Training loss", number(loss), recent))
    for name, label in {**dict(_BEST), **({} if run.metric in dict(_BEST) else {run.metric: run.metric})}.items():
        best = _best(history, name)
        if best is not None:
            shown = [_value(name, value) for value in (history.last(name), best[1])]
            found.append((label, shown[0], f"best {shown[1]} at iteration {best[0]:,}"))
    if run.kept:
        iteration, value = run.kept[0]
        found.append(("Best checkpoint", f"{iteration:,}", f"{run.metric} {_value(run.metric, value)}"))
    if (speed := history.last("tokens_per_second_per_device", count=count)) is not None:
        found.append(("Tokens/s per device", number(speed), recent))
    if (mfu := history.last("mfu", count=count)) is not None:
        found.append(("MFU", f"{100.0 * mfu:.1f} %", recent))
    memory = history.points("peak_memory_gib")[1]
    if len(memory):
        found.append(("Peak memory", f"{memory.max():.2f} GiB", "of rank 0"))
    ongoing = run.state == "running" and run.train_iters and not may_have_ended(run)
    if ongoing and (seconds := history.last("seconds", count=count)) is not None:
        found.append(("Remaining time", _duration(seconds * max(0, run.train_iters - history.iteration)), "estimate"))
    seconds = float(history.points("seconds")[1].sum())
    if seconds:
        found.append(("Training time", _duration(seconds), "steps alone"))
    if (samples := history.last("consumed_samples")) is not None:
        tokens = history.points("target_tokens")[1].sum()
        found.append(("Samples seen", number(round(samples)), f"{number(round(float(tokens)))} target tokens"))
    return found


def _kept_checkpoints(run: RunData) -> Html:
    """A table of the best checkpoints, if there are several."""
    if len(run.kept) < 2:
        return Html("")
    rows = [[iteration_name(iteration), _value(run.metric, value)] for iteration, value in run.kept]
    return table(["best checkpoints kept", run.metric], rows, align="lr")


def _loss(history: History, marks: Sequence[Event], resumes: Sequence[Event]) -> list[Html]:
    main = [
        Series("training", *history.points("loss")), Series("validation", *history.points("validation_loss")),
    ]
    per_set = {
        "Training loss of each data set": ("loss/", True), "Validation loss of each part": ("validation_loss/", False),
    }
    shares = [
        line_chart(title, [
            Series(name.strip("/") or "all", *_percent(history, f"{metric}{name}")) for name in history.names(metric)
        ], unit=" %", events=resumes)
        for title, metric in (
            ("Token accuracy", "validation_token_accuracy"), ("Exact match", "validation_exact_match")
        )
    ]
    return [
        line_chart("Loss", [one for one in main if len(one.x)], scale="both", smooth=True, events=marks, wide=True),
        grid(*shares, *(
            line_chart(title, [Series(name, *history.points(prefix + name)) for name in history.names(prefix)],
                       scale="both", smooth=smooth, events=resumes)
            for title, (prefix, smooth) in per_set.items()
        )),
    ]


def _optimization(history: History, marks: Sequence[Event], resumes: Sequence[Event]) -> list[Html]:
    rates = [Series("learning rate", *history.points("learning_rate"))]
    rates += [Series(part, *history.points(f"learning_rate/{part}")) for part in history.names("learning_rate/")]
    return [grid(
        line_chart("Learning rate", [one for one in rates if len(one.x)], zero=True, events=resumes),
        _one(history, "grad_norm", "Gradient norm, before clipping", scale="both", events=marks),
        _one(history, "router_aux_loss", "Load-balancing loss", events=resumes),
        line_chart("Target tokens of each data set", [
            Series(name, *history.points(_GIVEN + name)) for name in history.names(_GIVEN)
        ], smooth=True, zero=True, events=resumes),
        _one(history, "target_tokens", "Target tokens per step", zero=True, events=resumes),
    )]


def _speed(history: History, resumes: Sequence[Event]) -> list[Html]:
    iterations, seconds = history.iterations, history.column("seconds")
    with np.errstate(divide="ignore", invalid="ignore"):
        waits = 100.0 * history.column("data_wait_seconds") / seconds
    waits = np.clip(waits, 0.0, 100.0)
    return [grid(
        line_chart("Throughput per device", [
            Series(label, *history.points(name)) for label, name in (
                ("tokens/s", "tokens_per_second_per_device"), ("target tokens/s", "target_tokens_per_second_per_device")
            ) if len(history.points(name)[0])
        ], smooth=True, zero=True, events=resumes),
        line_chart("MFU", [Series("MFU", *_percent(history, "mfu"))], smooth=True, zero=True, unit=" %",
                   events=resumes),
        _one(history, "seconds", "Time per step", unit=" s", zero=True, events=resumes),
        line_chart("Time blocked on data", [Series("share", iterations, waits)], smooth=True, zero=True, unit=" %",
                   events=resumes),
        _one(history, "peak_memory_gib", "Peak memory of rank 0", unit=" GiB", smooth=False, zero=True, events=resumes),
    )]


def _experts(run: RunData, resumes: Sequence[Event]) -> list[Html]:
    parts = []
    if run.router is not None:
        first, last, choices = run.router
        counts = np.asarray(choices, dtype=np.float64)
        means = counts.mean(axis=1, keepdims=True)
        shares = np.divide(counts, means, out=np.ones_like(counts), where=means > 0)
        parts.append(heat_map(
            "Load of the experts", shares, rows=range(len(counts)), columns=range(counts.shape[1]),
            row_name="sparse layer", column_name="expert", center=1.0, unit=" × mean",
            note=f"training tokens of iterations {first:,} to {last:,}",
        ))
    over_time = _one(run.history, "router_max_load", "Busiest expert, in the worst layer", unit=" × mean",
                     events=resumes)
    return [*parts, over_time]


def _samples(run: RunData) -> list[Html]:
    if run.latest is None:
        return []
    latest, first = run.latest, run.first
    exact = sum(sample.exact for sample in latest.samples)
    former = {}
    if first is not None and first.iteration != latest.iteration:
        former = {(sample.index, sample.question): sample for sample in first.samples}
    cards = []
    for sample in latest.samples:
        before = former.get((sample.index, sample.question))
        cards.append(sample_card(sample, earlier=None if before is None else (f"at {first.iteration}", before)))
    told = f"{exact} of {len(latest.samples)} answers shown are exact after iteration {latest.iteration:,}"
    if former:
        told += f"; {sum(sample.exact for sample in first.samples)} were after iteration {first.iteration:,}"
    note = (
        "Answers under teacher forcing: at each place the most probable token after the expected text before it. An "
        "answer is exact if and only if greedy decoding gives the expected one."
    )
    return [text(f"{told}."), text(note, muted=True), grid(*cards, narrow=True)]


def _events(run: RunData) -> list[tuple[int, str, str]]:
    """(iteration, kind, details), ascending."""
    history = run.history
    found = [
        (iteration, "start" if iteration == 0 else "resume", f"at {_time(time)}") for iteration, time in run.sessions
    ]
    found += _improvements(run)
    for iteration, kind, why, time in run.ends:
        again = next((start for start, at in run.sessions if at >= time and start < iteration), None)
        if kind == "finished":
            kind, why = "early stopping", why.removeprefix("early stopping: ")
        details = [why, f"at {_time(time)}", "" if again is None else f"continued from iteration {again:,}"]
        found.append((iteration, kind, "; ".join(filter(None, details))))
    told = {iteration for iteration, _ in run.anomalies}
    found += [(iteration, "anomaly", reason) for iteration, reason in run.anomalies]
    iterations, skipped = history.points("skipped_step")
    found += [
        (int(iteration), "skipped step", "loss or gradients were not finite")
        for iteration in iterations[skipped > 0] if int(iteration) not in told
    ]
    for name, what in _SKIPPED.items():
        iterations, counts = history.points(name)
        where = counts > 0
        if where.any():
            found.append((int(iterations[where][0]), "skipped samples",
                          f"{number(int(counts.sum()))} {what} in {number(int(where.sum()))} steps, first in this one"))
    order = {kind: place for place, kind in enumerate(_ORDER)}
    return sorted(found, key=lambda event: (event[0], order.get(event[1], 0)))[:_EVENTS]


def _improvements(run: RunData) -> list[tuple[int, str, str]]:
    """Events of the evaluations that were the best so far, the last ones."""
    found: list[tuple[int, str, str]] = []
    former, kept = None, {iteration for iteration, _ in run.kept}
    for iteration, value in zip(*(part.tolist() for part in run.history.points(run.metric)), strict=True):
        if former is None or (value > former if higher_is_better(run.metric) else value < former):
            before = "" if former is None else f", {_value(run.metric, former)} before"
            checkpoint = f"; checkpoint {iteration_name(int(iteration))} is kept" if iteration in kept else ""
            found.append((int(iteration), "new best", f"{run.metric} {_value(run.metric, value)}{before}{checkpoint}"))
            former = value
    return found[-_IMPROVEMENTS:]


_SKIPPED = {
    "skipped_unusable": "samples that could not be used", "skipped_too_long": "samples that were too long",
    "skipped_no_target": "samples without a target token",
}


def _event_table(events: Sequence[tuple[int, str, str]]) -> list[Html]:
    if all(kind == "start" for _, kind, _ in events):
        return []
    colors = {"start": "neutral", "resume": "active", "skipped samples": "warning", "new best": "good",
              "early stopping": "neutral", "stopped": "warning"}
    rows = [[f"{iteration:,}", badge(kind, colors.get(kind, "bad")), reason] for iteration, kind, reason in events]
    return [table(["iteration", "event", "details"], rows, align="rll")]


def _settings(run: RunData) -> list[Html]:
    parts = [facts(run.environment)] if run.environment else []
    flags = run.settings.get("flags")
    if flags:
        parts.append(details(f"Flags ({len(flags)})", facts({name: str(value) for name, value in flags.items()})))
    for name, content in run.settings.items():
        if name != "flags" and content:
            parts.append(details(f"Configuration: {name}", preformatted(
                json.dumps(content, indent=2, ensure_ascii=False, default=str))))
    return parts


def _one(history: History, name: str, title: str, *, smooth: bool = True, **options: object) -> Html:
    """A chart of one metric."""
    return line_chart(title, [Series(title, *history.points(name))], smooth=smooth, **options)


def _percent(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    iterations, values = history.points(name)
    return iterations, 100.0 * values


def _value(name: str, value: float | None) -> str:
    return f"{100.0 * value:.1f} %" if name.partition("/")[0] in _SHARES and value is not None else number(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _time(iso: str) -> Html | str:
    """A UTC time for people; the text itself where it is none."""
    try:
        moment = datetime.datetime.fromisoformat(iso)
    except ValueError:
        return escape(iso)
    return f"{moment:%Y-%m-%d %H:%M} UTC"

