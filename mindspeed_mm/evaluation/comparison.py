"""Comparison of evaluations of the same questions: differences with their intervals, and the answers that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.metrics import METRICS, NO_VALUE, Metric, Score, choose_metrics, goodness, score_answer
from mindspeed_mm.evaluation.results import read_result
from mindspeed_mm.evaluation.statistics import mcnemar, paired_interval
from mindspeed_mm.inputs import shorten, shown
from mindspeed_mm.models.spec import ModelSpec, get_spec


@dataclasses.dataclass(frozen=True)
class Changes:
    """Questions whose score changed from the first results to others.

    Attributes:
        metric: that decides.
        better: numbers of the questions that are better, the largest change first.
        worse: of those that are worse.
    """

    metric: Metric
    better: list[int]
    worse: list[int]

    @property
    def kinds(self) -> dict[str, list[int]]:
        """Both, by what they are called: an answer is fixed or broken where the metric is 0 or 1."""
        names = ("fixed", "broken") if self.metric.kind == "rate" else ("better", "worse")
        return dict(zip(names, (self.better, self.worse), strict=True))

    def described(self) -> str:
        """Their numbers, such as ``by exact_match: 3 fixed, 1 broken``."""
        counts = ", ".join(f"{len(places)} {kind}" for kind, places in self.kinds.items())
        return f"by {self.metric.name}: {counts}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several results of the same questions.

    Attributes:
        names: of the results, all different.
        answers: of each, as in its file.
        spec: of the models.
        rows: a table, its header first.
        changes: of each of the results but the first.
        notes: what the table has, and what it lacks.
    """

    names: list[str]
    answers: list[Sequence[Mapping[str, Any]]]
    spec: ModelSpec
    rows: list[list[str]]
    changes: list[Changes]
    notes: list[str]

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.answers[0])


def compared(paths: Sequence[str], *, metrics: str | None, by: str | None = None) -> Comparison:
    """Read results and compare them with the first.

    Args:
        paths: of the results.
        metrics: names, the most important first; None: those of the first results.
        by: metric that decides which answers are better or worse; None: the first one that has a value.

    Raises:
        UserError: if one cannot be read, they are of different questions, or no question has the metric ``by``.
    """
    results = [read_result(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result["settings"]["data"] != results[0]["settings"]["data"]:
            raise UserError(f"{paths[0]} and {path} are of different questions ({len(results[0]['answers'])} and "
                            f"{len(result['answers'])}); evaluate both with the same data, --turns and --limit")
        _check_questions(paths[0], results[0]["answers"], path, result["answers"])
    spec = get_spec(results[0]["model_type"], source=f"{paths[0]}: model_type")
    answers = [result["answers"] for result in results]
    references = [answer["references"] for answer in answers[0]]
    if metrics is None:
        chosen = choose_metrics(",".join(results[0]["metrics"]), references, spec, option=f"{paths[0]}: metrics")
    else:
        chosen = choose_metrics(metrics, references, spec)
    if by is not None and by not in [metric.name for metric in chosen]:
        chosen += choose_metrics(by, references, spec, option="--by")
    scores = [[score_answer(chosen, one["answer"], one["references"], spec) for one in some] for some in answers]
    valued = [metric for metric in chosen if any(metric.name in found for found in scores[0])]
    lacking = [metric.name for metric in chosen if metric not in valued]
    if not valued or by in lacking:
        raise UserError(f"--{'by' if by in lacking else 'metrics'} {by or lacking[0]}: {NO_VALUE}; choose another one")
    decisive = METRICS[by] if by is not None else valued[0]
    names_of, changes = _names(paths, results), []
    rows = [["metric", "questions", *names_of]]
    for place in range(1, len(results)):
        rows[0] += [f"{names_of[place]} - {names_of[0]}", "95% interval", "p"]
        changes.append(_changes(decisive, scores[0], scores[place]))
    rows += [_row(metric, scores) for metric in valued]
    notes = ["differences with their paired bootstrap intervals; p, of rates: the probability of a difference at least "
             "this large if the models were equally good (McNemar's exact test)"]
    notes += [f"{name}: {NO_VALUE}" for name in lacking]
    return Comparison(names_of, answers, spec, rows, changes, notes)


def _check_questions(
    first: str, answers: Sequence[Mapping[str, Any]], path: str, others: Sequence[Mapping[str, Any]]
) -> None:
    """Check that results have the same questions in the same order, whose digest a change by hand leaves as it was.

    Raises:
        UserError: naming the first difference. Files of the data may have been moved: ``source`` is not compared.
    """
    remedy = "evaluate both anew, or name the files as they were written"
    if len(answers) != len(others):
        raise UserError(f"{first} and {path} have {len(answers)} and {len(others)} answers to the same questions; "
                        f"{remedy}")
    for number, (one, other) in enumerate(zip(answers, others, strict=True)):
        for name in ("messages", "images", "references"):
            if one[name] != other[name]:
                raise UserError(f"answers[{number}].{name} is {shown(one[name])} in {first}, {shown(other[name])} in "
                                f"{path}; {remedy}")


def _row(metric: Metric, scores: Sequence[Sequence[Mapping[str, Score]]]) -> list[str]:
    """Values and differences of a metric, over the questions that have it."""
    places = [place for place, found in enumerate(scores[0]) if metric.name in found]
    columns = [[some[place][metric.name] for place in places] for some in scores]
    values = [metric.value(column) for column in columns]
    row = [metric.name, str(len(places)), *(f"{value:.4f}" for value in values)]
    for value, column in zip(values[1:], columns[1:], strict=True):
        low, high = paired_interval(metric, columns[0], column)
        p = ""
        if metric.kind == "rate":
            pairs = list(zip(columns[0], column, strict=True))
            p = f"{mcnemar(sum(b.value > a.value for a, b in pairs), sum(b.value < a.value for a, b in pairs)):.3g}"
        row += [f"{value - values[0]:+.4f}", f"[{low:+.4f}, {high:+.4f}]", p]
    return row


def _changes(
    decisive: Metric, first: Sequence[Mapping[str, Score]], second: Sequence[Mapping[str, Score]]
) -> Changes:
    """Questions that are better or worse by a metric."""
    gains = [goodness(after, [decisive]) - goodness(before, [decisive])
             for before, after in zip(first, second, strict=True)]
    order = sorted(range(len(gains)), key=lambda place: (-abs(gains[place]), place))
    return Changes(decisive, [p for p in order if gains[p] > 0], [p for p in order if gains[p] < 0])


def _names(paths: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the results; where two are the same, their paths."""
    names = [shorten(result["name"]) for result in results]
    if len(set(names)) == len(names):
        return names
    if len(set(paths)) < len(paths):
        raise UserError("compare names the same results twice; name different ones")
    return list(map(str, paths))
