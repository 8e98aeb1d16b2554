"""Charts as inline SVG: curves over steps, and matrices in colours.

Drawings stretch with the page, and labels, which are HTML, keep their size. Paths use integers from 0 to 1000.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mindspeed_mm.evaluation.report.page import Html, escape, escape_path, number

_SIZE = 1000  # of a drawing
_COLORS = 8
_COLUMNS = 250  # into which long series are divided: two points each
_FEW_POINTS = 40  # of which each gets a dot, if steps lie between them
_SHORT = 10  # points: a dot each in any case, and no mean
_SMOOTHED_FROM = 50  # points
_LEVELS = 11
_CELL_PIXELS = 34  # at most, of a cell's height
_MARGIN = 0.05  # of the range, above and below

# from low to high; the middle one of the diverging scale is neutral
SEQUENTIAL = (
    "#eef3fb", "#d5e3f7", "#b9d1f2", "#9abced", "#7aa6e6", "#5c8fdd",
    "#4478cf", "#3262bb", "#254da2", "#1b3a84", "#132a64",
)
DIVERGING = (
    "#17457f", "#2f6bab", "#5b93c7", "#93b9dc", "#c8dbec", "#eeeeee",
    "#fbdcc3", "#f5b38a", "#e58455", "#c9542f", "#952d1b",
)


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: for the legend.
        x: ascending.
        y: as many; None and NaN leave a gap.
        color: of the palette; None: by its place in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """A vertical line in a chart.

    Attributes:
        x: where.
        name: what happened.
        bad: whether that is bad.
        kind: of all such events, in a word for the legend; empty: not there.
    """

    x: float
    name: str
    bad: bool = False
    kind: str = ""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "iteration",
    unit: str = "",
    scale: Literal["linear", "log", "both"] = "linear",
    smooth: bool = False,
    zero: bool = False,
    events: Sequence[Event] = (),
    note: str = "",
    wide: bool = False,
) -> Html:
    """Curves with axes, a legend, and the values under the pointer.

    A long series is drawn by the least and the greatest value of each of 250 parts.

    Args:
        title: caption.
        series: those without a finite value are left out; without any there is no chart.
        x_label: what x is.
        unit: of y, in the caption and after values under the pointer.
        scale: of y; both: the reader switches, beginning with linear. A logarithmic one leaves out values <= 0.
        smooth: draw a centred mean over a fiftieth of the series over the raw curve, if it has 50 points or more;
            beside such a one also over a shorter curve that has a point in about every step.
        zero: the y axis begins at 0.
        events: vertical lines, those in the range of the curves; the legend has their kinds.
        note: beside the title.
        wide: taller, for a chart of the page's width.
    """
    smooth = smooth and any(len(one.x) >= _SMOOTHED_FROM for one in series)
    curves = [
        _Curve.of(one, color=index % _COLORS if one.color is None else one.color, smooth=smooth)
        for index, one in enumerate(series)
    ]
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return Html("")
    low, high = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)
    events = [event for event in events if low <= event.x <= high]
    if low == high:
        low, high = low - 0.5, high + 0.5
    both = scale == "both" and any((curve.y > 0).any() for curve in curves)
    drawings = [
        _drawing(title, curves, (low, high), x_label=x_label, logarithmic=kind == "log", zero=zero, events=events,
                 hidden=both and kind == "log", named=both)
        for kind in (("linear", "log") if both else ("log",) if scale == "log" else ("linear",))
    ]
    switch = '<button type="button" aria-pressed="false">log scale</button>' if both else ""
    remarks = [unit.strip(), _mean_remark(curves), note]
    remark = f"<small>{escape(' · '.join(filter(None, remarks)))}</small>" if any(remarks) else ""
    return Html(
        f'<figure class="chart lines{" wide" if wide else ""}"><figcaption><span>{escape(title)}</span>{remark}{switch}'
        f'</figcaption>{_legend(curves, events)}<div class="frame">{"".join(drawings)}'
        f'{_x_labels(low, high)}<div class="plot" tabindex=0 role="application" '
        f'aria-label="{escape(title)}: values by arrow keys" '
        f'data-values="{_hover_values(curves, (low, high), x_label=x_label, unit=unit)}"></div></div></figure>'
    )


def heat_map(
    title: str,
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[Any],
    columns: Sequence[Any],
    row_name: str,
    column_name: str,
    unit: str = "",
    center: float | None = None,
    note: str = "",
) -> Html:
    """A matrix in colours, with the values under the pointer.

    Args:
        title: caption.
        values: [rows, columns]; NaN stays empty.
        rows: label of each row, from above.
        columns: label of each column.
        row_name: what a row is.
        column_name: what a column is.
        unit: after values.
        center: a positive value of neutral colour, from which the colours go both ways by the values' ratio to it, a
            quarter to fourfold or as far as the values go; None: from the least value to the greatest.
        note: beside the title.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if not matrix.size or not np.isfinite(matrix).any():
        return Html("")
    levels, bounds, colors = _levels(matrix, center)
    paths = "".join(
        f'<path stroke="{colors[level]}" stroke-width="1.02" d="{path}"/>'
        for level in range(_LEVELS) if (path := _cells(levels == level))
    )
    height, width = matrix.shape
    # cells of about equal sides, but a map no flatter than 1 : 6 and no taller than 1 : 1.6; small maps stay small
    ratio = min(6.0, max(1.6, width / height))
    widest = f"max-width:{_CELL_PIXELS * ratio * height:.0f}px"
    described = (
        f"{height} × {width} values by {row_name} and {column_name}, from {number(float(np.nanmin(matrix)))} "
        f"to {number(float(np.nanmax(matrix)))}"
    )
    data = {
        "values": [[_rounded(value, 3) for value in row] for row in matrix.tolist()],
        "rows": list(map(str, rows)), "columns": list(map(str, columns)),
        "row": row_name, "column": column_name, "unit": unit,
    }
    labels = "".join(
        f'<span class="label y" style="top:{100 * (index + 0.5) / height:.2f}%">{escape(rows[index])}</span>'
        for index in _some(height, 12)
    ) + "".join(
        f'<span class="label x" style="left:{100 * (index + 0.5) / width:.2f}%">{escape(columns[index])}</span>'
        for index in _some(width, 10)
    )
    swatches = "".join(f'<i style="background:{color}"></i>' for color in colors)
    remark = f"<small>{escape(note)}</small>" if note else ""
    return Html(
        f'<figure class="chart heat wide"><figcaption><span>{escape(title)}</span>{remark}</figcaption>'
        f'<div class="key"><span>{number(bounds[0])}{escape(unit)}</span><span class="swatches">{swatches}</span>'
        f"<span>{number(bounds[1])}{escape(unit)}</span><span>rows: {escape(row_name)}, columns: {escape(column_name)}"
        f'</span></div><div class="frame" style="aspect-ratio:{ratio:.3f};{widest}">'
        f'<svg viewBox="0 -0.5 {width} {height}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>{paths}</svg>{labels}"
        f'<div class="plot" tabindex=0 role="application" aria-label="{escape(title)}: values by arrow keys" '
        f'data-values="{_json(data)}"></div></div></figure>'
    )


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A series as arrays; ``smoothed`` is None where it is drawn as it is."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int
    smoothed: np.ndarray | None
    window: int

    @classmethod
    def of(cls, series: Series, *, color: int, smooth: bool) -> _Curve:
        x = np.asarray(series.x, dtype=np.float64)
        y = np.array(series.y, dtype=np.float64)  # None becomes NaN
        y[~np.isfinite(y)] = np.nan
        window = max(5, len(y) // 50) | 1
        long_enough = len(y) >= _SMOOTHED_FROM or (len(y) > _SHORT and _is_dense(x))
        smoothed = _centred_mean(y, window) if smooth and long_enough else None
        return cls(series.name, x, y, color, smoothed, window)

    @property
    def has_dots(self) -> bool:
        return len(self.x) <= _SHORT or (len(self.x) <= _FEW_POINTS and not _is_dense(self.x))


def _is_dense(x: np.ndarray) -> bool:
    """Whether there is a point in at least half of the steps."""
    return bool(len(x) and 2 * len(x) > x[-1] - x[0])


def _mean_remark(curves: Sequence[_Curve]) -> str:
    """Over how many points the means are, and of which curves, if not of all."""
    smoothed = [curve for curve in curves if curve.smoothed is not None]
    if not smoothed:
        return ""
    least, most = min(curve.window for curve in smoothed), max(curve.window for curve in smoothed)
    over = f"mean over {least} points" if least == most else f"mean over a fiftieth, {least} to {most} points"
    names = [] if len(smoothed) == len(curves) else [curve.name for curve in smoothed]
    return f"{', '.join(names) if len(names) <= 3 else 'longer curves'}: {over}" if names else over


def _centred_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in the window around each point; NaN stays."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = window // 2
    start = np.maximum(np.arange(len(y)) - half, 0)
    end = np.minimum(np.arange(len(y)) + half + 1, len(y))
    mean = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(finite, mean, np.nan)


def decimate(x: np.ndarray, y: np.ndarray, columns: int = _COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """At most two points of each of ``columns`` equal parts of the series: its least and its greatest value, in order.

    A part without a finite value leaves a gap: one NaN.
    """
    if len(y) <= 2 * columns:
        return x, y
    edges = np.linspace(0, len(y), columns + 1).astype(np.int64)[:-1]
    nothing = np.logical_and.reduceat(~np.isfinite(y), edges)
    chosen = []
    bounds = [*edges.tolist(), len(y)]
    for column, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        part = y[start:end]
        if nothing[column]:
            chosen.append(start)
        else:
            chosen += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
    return x[chosen], y[chosen]


def _drawing(
    title: str, curves: Sequence[_Curve], x_range: tuple[float, float], *, x_label: str, logarithmic: bool, zero: bool,
    events: Sequence[Event], hidden: bool, named: bool,
) -> str:
    """One SVG with its labels of the y axis."""
    low, high = _y_range(curves, logarithmic=logarithmic, zero=zero)
    ticks = _log_ticks(low, high) if logarithmic else linear_ticks(low, high)

    def across(x: np.ndarray | float) -> Any:
        return (np.asarray(x, dtype=np.float64) - x_range[0]) / (x_range[1] - x_range[0]) * _SIZE

    def down(y: np.ndarray | float) -> Any:
        y = np.asarray(y, dtype=np.float64)
        if logarithmic:
            y = np.log(np.where(y > 0, y, np.nan))
            return _SIZE - (y - math.log(low)) / (math.log(high) - math.log(low)) * _SIZE
        return _SIZE - (y - low) / (high - low) * _SIZE

    grid = "".join(f"M0 {float(down(tick)):.0f}H{_SIZE}" for tick in ticks)
    parts = [f'<path class="ticks" d="{grid}"/><path class="axis" d="M0 {_SIZE}H{_SIZE}"/>']
    for event in events:
        kind, line = " bad" if event.bad else "", f"M{float(across(event.x)):.0f} 0V{_SIZE}"
        parts.append(f'<path class="event{kind}" d="{line}"><title>{escape(event.name)}</title></path>')
    described = []
    for curve in curves:
        style = f'style="stroke:var(--s{curve.color})"'
        x, y = decimate(curve.x, curve.y)
        path = _path(across(x), down(y))
        parts.append(f'<path class="{"main" if curve.smoothed is None else "raw"}" {style} d="{path}"/>')
        if curve.smoothed is not None:
            x, y = decimate(curve.x, curve.smoothed, _COLUMNS // 2)
            parts.append(f'<path class="main" {style} d="{_path(across(x), down(y))}"/>')
        if curve.has_dots:
            parts.append(f'<path class="point" {style} d="{_dots(across(curve.x), down(curve.y))}"/>')
        finite = curve.y[np.isfinite(curve.y)]
        described.append(f"{curve.name}: {len(finite)} values, first {number(float(finite[0]))}, last "
                         f"{number(float(finite[-1]))}, least {number(float(finite.min()))}, greatest "
                         f"{number(float(finite.max()))}")
    labels = "".join(
        f'<span class="label y" style="top:{float(down(tick)) / _SIZE * 100:.2f}%">{number(tick)}</span>'
        for tick in ticks
    )
    scale = "log" if logarithmic else "linear"
    return (
        f'<div{f" data-scale={scale}" if named else ""}{" hidden" if hidden else ""}>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img">'
        f'<title>{escape(title)}, {scale} scale</title>'
        f'<desc>By {escape(x_label)}. {escape("; ".join(described))}</desc>{"".join(parts)}</svg>{labels}</div>'
    )


def _y_range(curves: Sequence[_Curve], *, logarithmic: bool, zero: bool) -> tuple[float, float]:
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    if logarithmic:
        values = values[values > 0]
        if not values.size:
            return 0.1, 1.0
        low, high = float(values.min()), float(values.max())
        margin = (high / low) ** _MARGIN if high > low else 1.5
        return low / margin, high * margin
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return (0.0 if zero and low == 0 else low - margin), high + margin
    margin = _MARGIN * (high - low)
    return (low if zero and low == 0 else low - margin), (high if zero and high == 0 else high + margin)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between the bounds, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return ticks if len(ticks) >= 3 else linear_ticks(low, high, 4)


def _x_labels(low: float, high: float) -> str:
    ticks = [tick for tick in linear_ticks(low, high, 6) if tick == int(tick) or high - low < 3]
    labels = []
    for index, tick in enumerate(ticks):
        place = (tick - low) / (high - low) * 100
        kind = " last" if place > 96 else ""  # inside the page
        kind += " second" if index % 2 == len(ticks) % 2 else ""  # a narrow page leaves them out
        labels.append(f'<span class="label x{kind}" style="left:{place:.2f}%">{number(tick)}</span>')
    return "".join(labels)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Path commands in integers, relative ones after the first; NaN interrupts the curve."""
    parts, former = [], None
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if b != b:
            former = None
            continue
        point = (round(a), round(b))
        if former is None:
            parts.append(f"M{point[0]} {point[1]}h0")
        elif point != former:
            parts.append(f"l{point[0] - former[0]} {point[1] - former[1]}")
        former = point
    return "".join(parts).replace(" -", "-")


def _dots(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{a:.0f} {b:.0f}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True) if b == b)


def _hover_values(curves: Sequence[_Curve], x_range: tuple[float, float], *, x_label: str, unit: str) -> Html:
    """Values of all curves at common places, at most ``_COLUMNS``."""
    places = np.unique(np.concatenate([curve.x for curve in curves]))
    if len(places) > _COLUMNS:
        places = places[np.linspace(0, len(places) - 1, _COLUMNS).round().astype(np.int64)]
        # curves with few points, as of evaluations, keep them all
        few = [curve.x for curve in curves if len(curve.x) <= _COLUMNS // 4]
        places = np.unique(np.concatenate([places, *few]))
    found = []
    for curve in curves:
        values = curve.y if curve.smoothed is None or len(curve.y) <= _COLUMNS else curve.smoothed
        index = np.minimum(np.searchsorted(curve.x, places), len(curve.x) - 1)
        own = np.where(curve.x[index] == places, values[index], np.nan)
        found.append({"name": curve.name, "color": curve.color, "y": [_rounded(value) for value in own.tolist()]})
    x = [int(place) if place == int(place) else place for place in places.tolist()]
    return _json({"x": x, "range": x_range, "label": x_label, "unit": unit, "series": found})


def _legend(curves: Sequence[_Curve], events: Sequence[Event]) -> str:
    """Names of the curves, of several, and the kinds of vertical lines."""
    entries = [
        f'<li><i style="background:var(--s{curve.color})"></i>{escape_path(curve.name)}</li>' for curve in curves
    ] if len(curves) > 1 else []
    for bad in (False, True):
        kinds = dict.fromkeys(event.kind for event in events if event.bad == bad and event.kind)
        if kinds:
            name = f'event{" bad" if bad else ""}'
            entries.append(f'<li><i class="{name}"></i>{escape(", ".join(kinds))}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def _levels(matrix: np.ndarray, center: float | None) -> tuple[np.ndarray, tuple[float, float], Sequence[str]]:
    """The colour level of each cell, -1 for none, what the ends of the scale are, and the colours."""
    finite = np.isfinite(matrix)
    if center is None:
        low, high = float(matrix[finite].min()), float(matrix[finite].max())
        share, colors = (matrix - low) / ((high - low) or 1.0), SEQUENTIAL
    else:
        ratios = np.log2(np.maximum(matrix, 1e-12) / center)
        reach = max(2.0, min(6.0, float(np.abs(np.maximum(ratios[finite], -2.0)).max())))
        share, colors = (ratios / reach + 1.0) / 2.0, DIVERGING
        low, high = center * 2.0**-reach, center * 2.0**reach
    levels = np.clip(np.floor(np.where(finite, share, 0.0) * _LEVELS), 0, _LEVELS - 1).astype(np.int64)
    return np.where(finite, levels, -1), (low, high), colors


def _cells(chosen: np.ndarray) -> str:
    """Path of horizontal lines through the cells that are chosen, one for each run of neighbours."""
    parts = []
    for row, cells in enumerate(chosen):
        changes = np.flatnonzero(np.diff(np.concatenate([[False], cells, [False]]).astype(np.int8)))
        parts += [f"M{start} {row}h{end - start}" for start, end in zip(changes[::2], changes[1::2], strict=True)]
    return "".join(parts)


def _some(count: int, most: int) -> range:
    """Indices from 0 at equal distances, round ones, at most ``most``."""
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 4, 5, 8))
    return range(0, count, next(step for step in steps if math.ceil(count / step) <= most))


def _rounded(value: float, digits: int = 5) -> float | int | None:
    if value != value or math.isinf(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def _json(data: Any) -> Html:
    return escape(json.dumps(data, separators=(",", ":"), ensure_ascii=False))
