"""HTML pages of an evaluation and of a comparison: summary tables, and the answers with their images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mindspeed_mm.data.images import load_pixels
from mindspeed_mm.errors import UserError
from mindspeed_mm.evaluation.comparison import Comparison
from mindspeed_mm.evaluation.metrics import Metric, final_answer, goodness
from mindspeed_mm.evaluation.report.page import (
    Html,
    Page,
    compared_answers,
    escape,
    facts,
    grid,
    image,
    sample_card,
    table,
)
from mindspeed_mm.evaluation.results import Scored
from mindspeed_mm.evaluation.sample import EvaluatedSample
from mindspeed_mm.models.spec import ModelSpec

MOST_SAMPLES = 100
_THUMBNAIL, _MOST_IMAGES = 256, 4  # pixels a side; images of a question that are shown
_EXPECTED, _GIVEN = "#00c853", "#d50000"
_BOXES_NOTE = "boxes: expected in green, given in red"


def write_report(
    path: Path, result: Mapping[str, Any], scored: Sequence[Scored], metrics: Sequence[Metric], spec: ModelSpec
) -> None:
    """Write the page of an evaluation.

    Args:
        path: of the page.
        result: content of the results file.
        scored: its questions with their answers.
        metrics: of the scores.
        spec: of the model; reads boxes.

    Raises:
        OSError: if it cannot be written.
    """
    page = Page(f"Evaluation of {_model_name(result)}", f"{len(scored)} questions")
    page.section("Scores", summary(result["summary"], result["metrics"]),
                 "Values with their 95% intervals: Wilson's for rates, by bootstrap for others.")
    page.section("Settings", facts(_about(result)))
    values = {index: goodness(one.scores, metrics) for index, one in enumerate(scored) if one.scores}
    wrong = sorted((index for index, value in values.items() if value < 1), key=lambda index: (values[index], index))
    shown = (wrong or list(range(len(scored))))[:MOST_SAMPLES]
    cards = [sample_card(as_sample(index, scored[index], spec)) for index in shown]
    rates = all(metric.kind == "rate" for metric in metrics)
    words = ("are right by every metric", "Wrong answers") if rates else (
        "have the best score in every metric", "Answers below the best score")
    right = f"{len(values) - len(wrong)} of {len(values)} answers {words[0]}."
    heading = f"{words[1]}, worst first ({len(shown)} of {len(wrong)})" if wrong else "Answers"
    page.section(heading, right, grid(*cards), _boxes_note(scored, spec))
    page.write(path)


def _model_name(result: Mapping[str, Any]) -> str:
    """What answered, in a few words: the end of its path, or its name on a server."""
    if "server_model" in result["settings"]:
        return str(result["settings"]["server_model"])
    name, adapter = ("/".join(Path(result[key] or "").parts[-2:]) for key in ("model", "adapter"))
    inside = (result["adapter"] or "").startswith(result["model"])  # the checkpoint of a LoRA run
    return f"{name} with {adapter}" if adapter and not inside else name


def _about(result: Mapping[str, Any]) -> dict[str, Any]:
    """What answered which questions, and how; by the words of the page."""
    settings = result["settings"]
    files = "\n".join(file for some in result["data_files"].values() for file in some)
    drawn = settings["temperature"] > 0
    values = {
        "model": result["model"] or None, "LoRA adapters": result["adapter"], "server": settings.get("server"),
        "model on the server": settings.get("server_model"), "data type": settings.get("dtype"),
        "data": f"{files}\n(hash of the questions: {settings['data']})", "questions": settings["questions"],
        "longest answer": f"{settings['max_new_tokens']} tokens", "answers cut off there": result["truncated_answers"],
        "requests sent again": result["retried_requests"] if "server" in settings else None,
        "temperature": settings["temperature"] if drawn else "0, the most probable token",
        "top-p": settings["top_p"] if drawn else None,
        "top-k": (settings["top_k"] or "all tokens") if drawn else None,
        "repetition penalty": settings["repetition_penalty"], "seed": settings["seed"] if drawn else None,
        "hash of the weights": settings.get("weights"),
    }
    return {name: value for name, value in values.items() if value is not None}


def summary(groups: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> Html:
    """Table of the values by group."""
    rows = []
    for group, found in groups.items():
        values = [found["metrics"].get(name) for name in metrics]
        rows.append([group, found["questions"], *(
            "" if value is None else f"{value['value']:.4f} [{value['low']:.3f}, {value['high']:.3f}]"
            for value in values
        )])
    return table(["", "questions", *metrics], rows, align="lr" + "r" * len(metrics))


def as_sample(index: int, scored: Scored, spec: ModelSpec) -> EvaluatedSample:
    """A question with its answer, as a card shows it; the first image has the boxes of both answers."""
    question = scored.question
    expected, given = question.references[0], scored.answer.text
    return EvaluatedSample(
        index=index, data_set=question.data_set, channel=question.channel, question=_conversation(question),
        expected=" | ".join(question.references), given=given,
        exact=given.split() in [reference.split() for reference in question.references],
        scores={name: score.value for name, score in scored.scores.items()},
        images=thumbnails(question.prompt.images, _boxes(expected, spec), _boxes(given, spec), spec),
    )


def _conversation(question: Any) -> str:
    messages = question.prompt.messages
    if len(messages) == 1:
        return messages[0].text
    return "\n".join(f"{message.role}: {message.text}" for message in messages)


def thumbnails(
    images: Sequence[str], expected: Sequence[Sequence[float]], given: Sequence[Sequence[float]], spec: ModelSpec
) -> tuple[bytes, ...]:
    """JPEG files of a question's images, at most 256 pixels a side; boxes are drawn into the first one."""
    found = []
    for place, source in enumerate(images[:_MOST_IMAGES]):
        try:
            picture = Image.fromarray(load_pixels(source))
        except UserError:  # of a server's answers, when it has been removed since
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        if place == 0 and spec.box_scale:
            for boxes, colour in ((expected, _EXPECTED), (given, _GIVEN)):
                _draw(picture, boxes, colour, spec.box_scale)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return tuple(found)


def _draw(picture: Image.Image, boxes: Sequence[Sequence[float]], colour: str, scale: float) -> None:
    """Draw boxes and points, in units of which an image has ``scale`` a side."""
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        corners = [number / scale * picture.size[place % 2] for place, number in enumerate(box)]
        if len(corners) == 2:
            corners = [corners[0] - 3, corners[1] - 3, corners[0] + 3, corners[1] + 3]
        left, right = sorted(corners[::2])
        top, bottom = sorted(corners[1::2])
        pen.rectangle((left, top, right, bottom), outline=colour, width=2)


def _boxes(text: str, spec: ModelSpec) -> list[list[float]]:
    return spec.boxes_in(final_answer(text))


def _boxes_note(scored: Sequence[Scored], spec: ModelSpec) -> str:
    return _BOXES_NOTE if any(_boxes(one.question.references[0], spec) for one in scored) else ""


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison.

    Raises:
        OSError: if it cannot be written.
    """
    names = comparison.names
    page = Page("Comparison of evaluations", f"{comparison.count} questions; differences are to {names[0]}")
    header, *rows = comparison.rows
    page.section("Scores", table(header, rows, align="l" + "r" * (len(header) - 1), wrapped=True), *comparison.notes)
    for name, changed in zip(names[1:], comparison.changes, strict=True):
        if not changed.better and not changed.worse:
            page.section(name, f"By {changed.metric.name} no answer is better or worse.")
        for kind, places in changed.kinds.items():
            shown = places[:MOST_SAMPLES]
            cards = [_changed_card(comparison, place, name) for place in shown]
            if cards:
                page.section(f"{name}: {kind} by {changed.metric.name} ({len(shown)} of {len(places)})", grid(*cards))
    page.write(path)


def _changed_card(comparison: Comparison, place: int, name: str) -> Html:
    """A question with the answers of the first results and of ``name``."""
    base, other = comparison.names[0], name
    first = comparison.answers[0][place]
    second = comparison.answers[comparison.names.index(name)][place]
    pictures = thumbnails(
        [source for source in first["images"] if not source.startswith("data:")],
        _boxes(first["references"][0], comparison.spec), _boxes(second["answer"], comparison.spec), comparison.spec,
    )
    images = "".join(image(content, alt=f"Image of question {place}") for content in pictures)
    answers = compared_answers(" | ".join(first["references"]), {base: first["answer"], other: second["answer"]})
    return Html(
        f'<article class="sample compared"><header><span class="muted">sample {place}</span></header>'
        f'{f"<div class=images>{images}</div>" if images else ""}'
        f'<div class="question">{escape(first["messages"][-1]["text"])}</div>{answers}</article>'
    )
