"""Answers on disk, from which a later start goes on, and the results that are made of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mindspeed_mm.checkpoint.files import FILE_MODE, set_mode
from mindspeed_mm.checkpoint.lock import DirectoryLock
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.files import check_directory, writing
from mindspeed_mm.evaluation.generation import Answer
from mindspeed_mm.evaluation.metrics import Metric, Score, score_answer
from mindspeed_mm.evaluation.questions import Question, as_columns
from mindspeed_mm.evaluation.statistics import interval
from mindspeed_mm.inputs import DATA_BYTES, is_present, kind_of, read_bytes, read_json, reason, shorten, shown
from mindspeed_mm.models.spec import ModelSpec

ANSWERS_FILE, RESULTS_FILE, REPORT_FILE = "answers.jsonl", "results.json", "report.html"
FORMAT = 1
OVERALL = "overall"
_HEADER = b'{"format": '  # what the first line of the answers starts with

logger = logging.getLogger(__name__)


class AnswerFile:
    """``answers.jsonl``: a line with the settings, then one for each answer, appended as they come.

    Attributes:
        answers: number of a question -> answer, those that are there.
        maker: model and adapter that gave the first of them; others of the same weights may have given further ones.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], maker: Mapping[str, str | None], *, count: int,
        restart: bool,
    ) -> None:
        """Open the file for this process alone; a cut-off last line, of a killed run, is dropped.

        Args:
            directory: ``--output``; is made.
            settings: everything that the answers depend on.
            maker: paths of ``model`` and ``adapter``.
            count: number of questions.
            restart: drop the answers that are there.

        Raises:
            UserError: if the file has answers of other settings, another process writes it, or it cannot be written.
        """
        self.path = directory / ANSWERS_FILE
        self.answers: dict[int, Answer] = {}
        self.maker = dict(maker)
        settings = json.loads(json.dumps(settings))
        with writing(directory):
            check_directory(directory)
        self._lock = DirectoryLock(directory / f".{ANSWERS_FILE}.lock", f"--output {shorten(str(directory))}")
        if warning := self._lock.acquire():
            logger.warning("%s", warning)
        try:
            self._open(settings, count, restart)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: Mapping[str, Any], count: int, restart: bool) -> None:
        end = 0
        if is_present(self.path):
            with writing(self.path):
                content = read_bytes(self.path, limit=DATA_BYTES)  # a regular file, also one that is to be dropped
            end = 0 if restart else self._read(content, settings, count)
        with writing(self.path):
            self._file: IO[bytes] = open(self.path, "r+b" if end else "wb")
            set_mode(self.path, FILE_MODE)
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._write([{"format": FORMAT, "settings": settings, "maker": self.maker}])

    def _read(self, content: bytes, settings: Mapping[str, Any], count: int) -> int:
        """Read the answers; the length of the part that is whole."""
        remedy = "give another --output, or --restart to drop its answers"
        end = content.rfind(b"\n") + 1
        lines = content[:end].splitlines()
        if not lines and _HEADER.startswith(content[:len(_HEADER)]):  # killed while it wrote the first line
            return 0
        try:
            header = _require(json.loads(lines[0] if lines else content), dict, "its first line")
            found = _field(header, "settings", dict) if _field(header, "format", int) == FORMAT else {
                "format": header["format"]}
            maker = {name: header.get("maker", self.maker)[name] for name in self.maker}
            if not all(name is None or isinstance(name, str) for name in maker.values()) or not lines:
                raise ValueError("its first line is no header")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path} has no answers of an evaluation; {remedy}") from error
        if names := [name for name in {**settings, **found} if settings.get(name) != found.get(name)]:
            before, now = (shorten(json.dumps(one.get(names[0])), 80) for one in (found, settings))
            raise UserError(f"{self.path} has answers of other settings: {names[0]} {before}, now {now}; {remedy}")
        for place, line in enumerate(lines[1:], 2):
            try:
                number, answer = _answer_of(line)
                if not 0 <= number < count:
                    raise ValueError(f"question is {number}, of {count}")
                if self.answers.setdefault(number, answer) != answer:
                    raise ValueError(f"question {number} has another answer before")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path} is damaged: line {place}: {shorten(reason(error), 80)}; remove the line, "
                                f"or {remedy}") from error
        if self.answers:
            self.maker = maker
        return end

    def append(self, answers: Iterable[tuple[int, Answer]]) -> None:
        """Add answers by the numbers of their questions, flushed to disk."""
        new = dict(answers)
        self.answers |= new
        with writing(self.path):
            self._write([
                {"question": number, "answer": answer.text, "truncated": answer.truncated, "retries": answer.retries}
                for number, answer in new.items()
            ])

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "replace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, and let other processes write it."""
        self._file.close()
        self._lock.release()


def _answer_of(line: bytes) -> tuple[int, Answer]:
    """Number of the question and answer of a line.

    Raises:
        ValueError: if it has none.
    """
    fields = _require(json.loads(line), dict, "it")
    retries = _require(fields.get("retries", 0), int, "retries")  # absent in files of earlier versions
    return _field(fields, "question", int), Answer(
        _field(fields, "answer", str), _field(fields, "truncated", bool), retries
    )


@dataclasses.dataclass(frozen=True)
class Scored:
    """A question with its answer and scores."""

    question: Question
    answer: Answer
    scores: Mapping[str, Score]


def score_all(
    questions: Sequence[Question], answers: Mapping[int, Answer], metrics: Sequence[Metric], spec: ModelSpec
) -> list[Scored]:
    """Score every question."""
    return [
        Scored(question, answers[number], score_answer(metrics, answers[number].text, question.references, spec))
        for number, question in enumerate(questions)
    ]


def groups_of(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Name of a group -> its questions: all, each data set if there are several, each channel if there are any."""
    groups = {OVERALL: list(scored)}
    names = list(dict.fromkeys(one.question.data_set for one in scored))
    for name in names if len(names) > 1 else ():
        groups[f"data set {name}"] = [one for one in scored if one.question.data_set == name]
    channels = list(dict.fromkeys(one.question.channel for one in scored))
    for channel in channels if any(channels) else ():
        groups[f"channel {channel or '(none)'}"] = [one for one in scored if one.question.channel == channel]
    return groups


def summarize(scored: Sequence[Scored], metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """Value, 95% interval and number of questions of each metric, by group of :func:`groups_of`.

    A metric that no question of a group has is left out there.
    """
    summary: dict[str, dict[str, Any]] = {}
    for group, members in groups_of(scored).items():
        summary[group] = {"questions": len(members), "metrics": {}}
        for metric in metrics:
            scores = [one.scores[metric.name] for one in members if metric.name in one.scores]
            if scores:
                low, high = interval(metric, scores)
                fact = {"value": metric.value(scores), "low": low, "high": high, "questions": len(scores)}
                if metric.kind == "rate":
                    fact["right"] = round(sum(score.value for score in scores))
                summary[group]["metrics"][metric.name] = fact
    return summary


def as_result(
    settings: Mapping[str, Any], about: Mapping[str, Any], scored: Sequence[Scored], metrics: Sequence[Metric]
) -> dict[str, Any]:
    """Content of ``results.json``."""
    return {
        "format": FORMAT,
        **about,
        "settings": dict(settings),
        "metrics": [metric.name for metric in metrics],
        "summary": summarize(scored, metrics),
        "truncated_answers": sum(one.answer.truncated for one in scored),
        "retried_requests": sum(one.answer.retries > 0 for one in scored),
        "answers": [
            {**as_columns(one.question), "answer": one.answer.text, "truncated": one.answer.truncated,
             "scores": {name: score.value for name, score in one.scores.items()}}
            for one in scored
        ],
    }


def read_result(path: str) -> dict[str, Any]:
    """A results file, or that of an ``--output`` directory, with every field that a comparison reads.

    Raises:
        UserError: if it is none, naming the place that is wrong.
    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    remedy = f"name a {RESULTS_FILE} of python -m mindspeed_mm.evaluation, as it was written"
    content = read_json(file, remedy=remedy, limit=DATA_BYTES)
    try:
        _check_result(content)
    except ValueError as error:
        raise UserError(f"{shorten(str(file))} cannot be read: {error}; {remedy}") from error
    return content


def _check_result(content: dict[str, Any]) -> None:
    """Check the fields of a results file.

    Raises:
        ValueError: naming the first one that is wrong.
    """
    if _field(content, "format", int) != FORMAT:
        raise ValueError(f"format is {shown(content['format'])}, not {FORMAT}")
    for name in ("name", "model_type"):
        _field(content, name, str)
    _texts(content, "metrics")
    settings, answers = _field(content, "settings", dict), _field(content, "answers", list)
    _field(settings, "data", str, "settings.")
    count = settings.get("questions", len(answers))
    if not answers:
        raise ValueError("answers is empty")
    if type(count) is not int or count != len(answers):
        raise ValueError(f"answers has {len(answers)} elements, settings.questions is {shown(count)}")
    for number, answer in enumerate(answers):
        _require(answer, dict, name := f"answers[{number}]")
        _field(answer, "answer", str, f"{name}.")
        _texts(answer, "references", f"{name}.")
        _texts(answer, "images", f"{name}.", empty=True)
        messages = _field(answer, "messages", list, f"{name}.")
        if not messages:
            raise ValueError(f"{name}.messages is empty")
        for place, message in enumerate(messages):
            _require(message, dict, f"{name}.messages[{place}]")
            for key in ("role", "text"):
                _field(message, key, str, f"{name}.messages[{place}].")


def _require(value: Any, kind: type, name: str) -> Any:
    """``value``, if its type is ``kind``; a boolean is no number."""
    if type(value) is not kind:
        found = shown(value) if isinstance(value, float) else kind_of(value)
        raise ValueError(f"{name} is {found}, not {'a whole number' if kind is int else kind_of(kind())}")
    return value


def _field(fields: dict[str, Any], name: str, kind: type, parent: str = "") -> Any:
    """A field that must be there, of a type."""
    if name not in fields:
        raise ValueError(f"{parent}{name} is missing")
    return _require(fields[name], kind, f"{parent}{name}")


def _texts(fields: dict[str, Any], name: str, parent: str = "", *, empty: bool = False) -> list[str]:
    """A field that must be a list of strings, with at least one unless it may be ``empty``."""
    texts = _field(fields, name, list, parent)
    for place, text in enumerate(texts):
        _require(text, str, f"{parent}{name}[{place}]")
    if not texts and not empty:
        raise ValueError(f"{parent}{name} is empty")
    return texts


def summary_table(summary: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The summary for a terminal, one line per group."""
    rows = [["", "questions", *metrics]]
    for group, facts in summary.items():
        found = facts["metrics"]
        rows.append([group, str(facts["questions"]), *(
            f"{found[name]['value']:.4f} [{found[name]['low']:.3f}, {found[name]['high']:.3f}]"
            if name in found else "-" for name in metrics
        )])
    return text_table(rows)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
