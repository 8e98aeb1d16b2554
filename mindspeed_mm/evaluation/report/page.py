"""Self-contained HTML pages: one file without references to others, readable in light and dark mode and on paper.

All functions escape what they are given and return :class:`Html`, which no function escapes again.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import write_atomically
from mindspeed_mm.evaluation.report.assets import SCRIPT, STYLE
from mindspeed_mm.evaluation.sample import EvaluatedSample

_LONGEST_TEXT = 4000  # characters of a question or an answer
_COMPARED_WORDS = 400  # comparing takes quadratic time
_WORD = re.compile(r"[^\W\u2e80-\uffff]+|\s+|.", re.DOTALL)  # a CJK character is a word


class Html(str):
    """Markup, in which everything that came from outside is escaped already."""

    __slots__ = ()


class Page:
    """A page of sections, each with a heading that the page's contents list links to."""

    def __init__(self, title: str, subtitle: str = "", *, status: Html | str = "", refresh_seconds: int = 0) -> None:
        """An empty page.

        Args:
            title: of the page and of the browser's tab.
            subtitle: a line below it.
            status: stands beside the title, such as a :func:`badge`.
            refresh_seconds: how often an open page loads itself again; 0: never.
        """
        self._title = title
        self._subtitle = subtitle
        self._status = status
        self._refresh = refresh_seconds
        self._sections: list[tuple[str, Html]] = []

    def section(self, heading: str, *parts: str) -> None:
        """Add a section. A part that is no :class:`Html` becomes a paragraph of text; empty parts are left out."""
        self._sections.append((heading, join(*(part if isinstance(part, Html) else text(part) for part in parts))))

    def render(self) -> str:
        """The whole document."""
        # Nothing may be loaded, and no script but the page's own may run. Style attributes need 'unsafe-inline'.
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_content_hash(SCRIPT)}"
        links = "".join(
            f'<a href="#section-{number}">{escape(heading)}</a>'
            for number, (heading, _) in enumerate(self._sections, start=1)
        )
        sections = "".join(
            f'<section id="section-{number}" aria-labelledby="heading-{number}">'
            f'<h2 id="heading-{number}">{escape(heading)}</h2>{content}</section>\n'
            for number, (heading, content) in enumerate(self._sections, start=1)
        )
        navigation = f'<nav aria-label="Sections">{links}</nav>' if len(self._sections) > 2 else ""
        subtitle = f'<p class="subtitle">{escape(self._subtitle)}</p>' if self._subtitle else ""
        refresh = f' data-refresh="{self._refresh}"' if self._refresh else ""
        return (
            f'<!DOCTYPE html>\n<html lang="en"{refresh}>\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self._title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f'<header><div class="title"><h1>{escape(self._title)}</h1>{escape(self._status)}</div>'
            f"{subtitle}</header>\n{navigation}\n{sections}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Replace the file at ``path``, so that a reader sees the old page or the new one; raises OSError."""
        write_atomically(path, self.render().encode("utf-8", errors="replace"))


def escape(value: Any) -> Html:
    """The text of a value as markup; :class:`Html` as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def escape_path(path: str) -> Html:
    """A path or name as markup that is broken at slashes rather than anywhere."""
    return Html(f'<span class="path">{escape(path).replace("/", "/<wbr>")}</span>')


def small(content: str) -> Html:
    """A remark after a value."""
    return Html(f"<small>{escape(content)}</small>")


def join(*parts: str) -> Html:
    """All parts, one after another."""
    return Html("".join(map(escape, parts)))


def text(content: str, *, muted: bool = False) -> Html:
    """A paragraph; nothing for an empty text."""
    return Html(f"<p{' class=muted' if muted else ''}>{escape(content)}</p>") if content else Html("")


def subheading(content: str) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{escape(content)}</h3>")


def grid(*parts: Html, narrow: bool = False) -> Html:
    """Parts side by side where the page is wide enough; ``narrow`` parts fit more often."""
    inside = "".join(part for part in parts if part)
    return Html(f'<div class="grid{" narrow" if narrow else ""}">{inside}</div>') if inside else Html("")


def details(summary: str, *parts: Html, expanded: bool = False) -> Html:
    """Parts that the reader may unfold."""
    return Html(f"<details{' open' if expanded else ''}><summary>{escape(summary)}</summary>{join(*parts)}</details>")


def preformatted(content: str) -> Html:
    """Text in a fixed-width font, as it is."""
    return Html(f"<pre tabindex=0>{escape(content)}</pre>")


def progress_bar(share: float) -> Html:
    """A bar; ``share`` between 0 and 1."""
    percent = 100.0 * min(1.0, max(0.0, share))
    return Html(
        f'<div class="progress" role="progressbar" aria-label="progress" aria-valuenow="{percent:.0f}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{percent:.2f}%"></i></div>'
    )


def badge(content: str, kind: str = "neutral", *, since: str = "") -> Html:
    """A short word in colour.

    Args:
        content: the word.
        kind: good, bad, active, warning or neutral.
        since: UTC time, ISO 8601: where the page is looked at five minutes later or more, the badge says how much,
            and that the run may have ended.
    """
    moment = f' data-since="{escape(since)}"' if since else ""
    return Html(f'<span class="badge {escape(kind)}"{moment}>{escape(content)}</span>')


def key_figures(figures: Iterable[tuple[str, str, str]]) -> Html:
    """Large numbers: (label, value, remark) of each."""
    figures = list(figures)
    columns = len(figures) if len(figures) <= 6 else (len(figures) + 1) // 2  # in one row or two
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>"
        f"{f'<dd class=remark>{escape(remark)}</dd>' if remark else ''}</div>"
        for label, value, remark in figures
    )
    return Html(f'<dl class="figures" style="--columns:{columns}">{tiles}</dl>') if tiles else Html("")


def table(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], *, align: str | None = None, wrapped: bool = False
) -> Html:
    """A table that scrolls sideways where it is too wide.

    Args:
        headers: of the columns.
        rows: their cells; None is an empty cell.
        align: a letter for each column, ``l`` or ``r``; by default columns of numbers are aligned right.
        wrapped: long headers take several lines.
    """
    rows = [list(row) for row in rows]
    sides = align or "".join(
        "r" if any(cells) and all(isinstance(cell, (int, float, type(None))) for cell in cells) else "l"
        for cells in ([row[column] for row in rows] for column in range(len(headers)))
    )
    classes = [" class=right" if side == "r" else "" for side in sides]
    head = "".join(f"<th scope=col{side}>{escape(name)}</th>" for side, name in zip(classes, headers, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{_cell(cell)}</td>" for side, cell in zip(classes, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    kind = " class=wrapped" if wrapped else ""
    return Html(
        f'<div class="scroll" tabindex=0><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def facts(mapping: Mapping[str, Any]) -> Html:
    """A table of names and values, without headers; values of None are left out."""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{_cell(value)}</td></tr>\n"
        for name, value in mapping.items() if value is not None
    )
    return Html(f'<div class="scroll" tabindex=0><table class="facts"><tbody>\n{rows}</tbody></table></div>')


def image(jpeg_bytes: bytes, *, alt: str, width: int | None = None) -> Html:
    """A JPEG file, inside the page; ``width`` in pixels."""
    size = f' width="{width}"' if width else ""
    data = base64.b64encode(jpeg_bytes).decode()
    return Html(f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}"{size}>')


def sample_card(sample: EvaluatedSample, *, earlier: tuple[str, EvaluatedSample] | None = None) -> Html:
    """A question with its images, the expected answer and the model's, with their differences marked.

    Args:
        sample: what was evaluated.
        earlier: the same question in an earlier evaluation, and a word for that, to show the progress.
    """
    verdict = badge("exact", "good") if sample.exact else badge("differs", "warning")
    names = " · ".join(name for name in (sample.data_set, sample.channel) if name)
    scores = " · ".join(f"{name} {number(value)}" for name, value in sample.scores.items())
    images = "".join(
        image(content, alt=f"Image {position} of sample {sample.index}")
        for position, content in enumerate(sample.images, start=1)
    )
    expected, given = _shortened(sample.expected), _shortened(sample.given)
    answers = (
        _answer("answer", given) if sample.exact and sample.expected == sample.given
        else _answer("expected", _marked(expected, given, "del")) + _answer("given", _marked(given, expected, "ins"))
    )
    if earlier is not None:
        label, former = earlier
        answers += _answer(label, _marked(_shortened(former.given), expected, "ins"))
    return Html(
        f'<article class="sample"><header><span class="muted">sample {sample.index}'
        f"{f' · {escape(names)}' if names else ''}</span>{verdict}</header>"
        f'{f"<div class=images>{images}</div>" if images else ""}'
        f'<div class="question" tabindex=0>{escape(_shortened(sample.question))}</div>'
        f"<dl>{answers}</dl>{f'<footer class=muted>{escape(scores)}</footer>' if scores else ''}</article>"
    )


def compared_answers(expected: str, given: Mapping[str, str]) -> Html:
    """The expected answer, and below it those of several models by their names, with their differences from it marked.

    They stand below their names, which may be long.
    """
    wanted = _shortened(expected)
    answers = _answer("expected", wanted)
    for name, content in given.items():
        answers += _answer(name, _marked(_shortened(content), wanted, "ins"))
    return Html(f"<dl>{answers}</dl>")


def number(value: float | None) -> str:
    """A number for people: about four digits, thousands apart; a dash for none."""
    if value is None or value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000 or value == int(value):
        return f"{round(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def _answer(kind: str, content: str) -> str:
    shown = escape(content) if content else Html('<span class="muted">empty</span>')
    return f'<div><dt>{escape(kind)}</dt><dd tabindex=0>{shown}</dd></div>'


def _shortened(content: str) -> str:
    return content if len(content) <= _LONGEST_TEXT else f"{content[:_LONGEST_TEXT]} … ({len(content)} characters)"


def _marked(content: str, other: str, tag: str) -> Html:
    """``content`` with the words marked that ``other`` has not; as it is if both are long."""
    own, others = _WORD.findall(content), _WORD.findall(other)
    if max(len(own), len(others)) > _COMPARED_WORDS:
        return escape(content)
    found = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, own, others, autojunk=False).get_opcodes():
        words = escape("".join(own[start:end]))
        if words:
            found.append(words if kind == "equal" else f"<{tag}>{words}</{tag}>")
    return Html("".join(found))


def _cell(value: Any) -> Html:
    if value is None:
        return Html("")
    return escape(number(value) if isinstance(value, float) else value)


def _content_hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
