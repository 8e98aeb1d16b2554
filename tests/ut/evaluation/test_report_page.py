"""Pages and charts: everything is escaped, series of any kind are drawn, long ones stay small."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mindspeed_mm.evaluation.report.charts import Event, Series, decimate, heat_map, line_chart, linear_ticks
from mindspeed_mm.evaluation.report.page import (
    Html,
    Page,
    badge,
    details,
    facts,
    image,
    key_figures,
    number,
    preformatted,
    sample_card,
    subheading,
    table,
    text,
)
from mindspeed_mm.evaluation.sample import EvaluatedSample

HOSTILE = "</script></title></svg><img src=x onerror=alert(1)>\"' onmouseover=\"alert(2)&amp;"


class Tags(HTMLParser):
    """Every tag and its attributes' names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attributes}


def hover_values(chart: str) -> dict:
    return json.loads(html.unescape(re.search(r'data-values="([^"]*)"', chart)[1]))


def paths(chart: str, kind: str) -> list[str]:
    return re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', chart)


def test_everything_is_escaped():
    sample = EvaluatedSample(
        index=1, data_set=HOSTILE, channel=HOSTILE, question=HOSTILE, expected=HOSTILE, given=HOSTILE + "x",
        exact=False, scores={HOSTILE: 0.5}, images=(b"\xff\xd8",),
    )
    page = Page(HOSTILE, HOSTILE, status=badge(HOSTILE, HOSTILE, since=HOSTILE))
    page.section(
        HOSTILE, HOSTILE, text(HOSTILE), subheading(HOSTILE), facts({HOSTILE: HOSTILE}), preformatted(HOSTILE),
        table([HOSTILE], [[HOSTILE]]), details(HOSTILE, text(HOSTILE)), key_figures([(HOSTILE, HOSTILE, HOSTILE)]),
        image(b"", alt=HOSTILE), sample_card(sample, earlier=(HOSTILE, sample)),
        line_chart(HOSTILE, [Series(HOSTILE, [1, 2], [1, 2])] * 2, x_label=HOSTILE, unit=HOSTILE, note=HOSTILE,
                   events=[Event(1, HOSTILE)], scale="both"),
        heat_map(HOSTILE, [[1.0]], rows=[HOSTILE], columns=[HOSTILE], row_name=HOSTILE, column_name=HOSTILE,
                 unit=HOSTILE, note=HOSTILE),
    )
    rendered = page.render()
    found = Tags(rendered)
    assert not [name for name in found.attributes if name.startswith("on")]
    assert found.names.count("script") == 1 and found.names.count("img") == 2  # the page's, and the two images
    assert "<img src=x" not in rendered


def test_unescaped_text_would_be_found():
    page = Page("title")
    page.section("heading", Html(HOSTILE))
    assert "onerror" in Tags(page.render()).attributes


def test_page_loads_nothing():
    page = Page("title")
    page.section("Loss", line_chart("loss", [Series("loss", [1, 2], [3, 4])], smooth=True))
    rendered = page.render()
    assert "default-src 'none'" in rendered
    assert not re.search(r"https?://|url\(|@import|src=\"(?!data:)", rendered)


def test_page_is_replaced_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    page = Page("猫")
    page.section("图", "一只猫")
    page.write(path)
    assert "一只猫" in path.read_text(encoding="utf-8") and path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    surrogate = Page("\ud800")  # as of a file name that is no UTF-8
    surrogate.write(path)
    assert "<h1>?</h1>" in path.read_text(encoding="utf-8")


def test_answers_show_their_difference():
    card = sample_card(EvaluatedSample(index=0, question="?", expected="一只猫坐着", given="一只狗坐着", exact=False))
    assert "一只<del>猫</del>坐着" in card and "一只<ins>狗</ins>坐着" in card and "differs" in card
    exact = sample_card(EvaluatedSample(index=0, question="?", expected="a cat", given="a cat", exact=True))
    assert "exact" in exact and "<ins>" not in exact and exact.count("a cat") == 1
    earlier = EvaluatedSample(index=0, question="?", expected="a cat", given="a dog", exact=False)
    assert "a <ins>dog</ins>" in sample_card(
        EvaluatedSample(index=0, question="?", expected="a cat", given="a cat", exact=True), earlier=("at 5", earlier)
    )


@pytest.mark.parametrize("y", [[], [None, None], [math.nan, math.inf]], ids=["empty", "none", "not finite"])
def test_no_chart_without_values(y):
    assert line_chart("loss", [Series("loss", range(len(y)), y)]) == ""
    assert line_chart("loss", []) == ""


def test_chart_of_one_point():
    chart = line_chart("loss", [Series("loss", [7], [2.5])])
    assert paths(chart, "point") == ["M500 500h0"]
    assert hover_values(chart)["series"][0]["y"] == [2.5] and hover_values(chart)["x"] == [7]


def test_gaps_interrupt_the_curve():
    chart = line_chart("loss", [Series("loss", [1, 2, 3, 4, 5], [1, 2, None, math.nan, 1])])
    (path,) = paths(chart, "main")
    assert path.count("M") == 2
    assert hover_values(chart)["series"][0]["y"] == [1, 2, None, None, 1]


def test_logarithmic_scale_leaves_out_what_is_not_positive():
    chart = line_chart("norm", [Series("norm", [1, 2, 3, 4], [1.0, 0.0, -1.0, 100.0])], scale="log")
    assert paths(chart, "main")[0].count("M") == 2
    assert line_chart("norm", [Series("norm", [1, 2], [-1.0, 0.0])], scale="both").count("<svg") == 1
    assert line_chart("norm", [Series("norm", [1, 2], [1.0, 2.0])], scale="both").count("<svg") == 2


def test_curves_of_different_steps_share_a_chart():
    chart = line_chart("loss", [Series("a", [1, 2, 3], [1, 1, 1]), Series("b", [2, 4], [2, 2])])
    values = hover_values(chart)
    assert values["x"] == [1, 2, 3, 4]
    assert [one["y"] for one in values["series"]] == [[1, 1, 1, None], [None, 2, None, 2]]


def test_decimation_keeps_extremes_and_order():
    x, y = np.arange(10_000.0), np.zeros(10_000)
    y[1234], y[8765], y[5000:5100] = 9.0, -9.0, math.nan
    some_x, some_y = decimate(x, y)
    assert len(some_x) <= 600 and (np.diff(some_x) > 0).all()
    assert {1234.0, 8765.0} <= set(some_x.tolist()) and np.isnan(some_y).any()
    assert some_y[some_x == 1234.0] == 9.0


def test_a_hundred_thousand_steps_stay_small():
    steps = np.arange(1, 100_001)
    noise = np.random.default_rng(0).normal(1.0, 0.1, len(steps))
    page = Page("long run")
    charts = [line_chart("loss", [Series("loss", steps, noise)], smooth=True, scale="both" if index < 2 else "linear")
              for index in range(10)]
    page.section("Curves", *charts)
    assert len(page.render()) < 200_000


def test_smoothing_is_over_the_raw_curve():
    steps, values = range(100), [float(step % 2) for step in range(100)]
    chart = line_chart("loss", [Series("loss", steps, values)], smooth=True)
    assert len(paths(chart, "raw")) == 1 and len(paths(chart, "main")) == 1
    assert "mean over 5 points" in chart
    assert not paths(line_chart("loss", [Series("loss", steps, values)]), "raw")


def test_runs_of_different_length_are_smoothed_alike():
    curves = [Series("long", range(200), np.arange(200.0)), Series("short", range(40), np.arange(40.0))]
    chart = line_chart("loss", curves, smooth=True)
    assert len(paths(chart, "raw")) == len(paths(chart, "main")) == 2 and not paths(chart, "point")
    assert "<small>mean over 5 points</small>" in chart
    # one that has no point in most steps is drawn as it is, with dots, and the remark says of which the means are
    chart = line_chart("loss", [curves[0], Series("validation", range(0, 200, 10), np.arange(20.0))], smooth=True)
    assert len(paths(chart, "raw")) == len(paths(chart, "point")) == 1
    assert "<small>long: mean over 5 points</small>" in chart
    chart = line_chart("loss", [Series("long", range(5000), np.arange(5000.0)), curves[1]], smooth=True)
    assert "mean over a fiftieth, 5 to 101 points" in chart
    # without a long one there is no mean, and no dots where points are in every step
    chart = line_chart("loss", [curves[1]], smooth=True)
    assert not paths(chart, "raw") and not paths(chart, "point") and "mean" not in chart


def test_legend_names_the_events_in_sight():
    events = [Event(2, "resume at 2", kind="resumed"), Event(2, "again", kind="resumed"), Event(9, "out", kind="late"),
              Event(1, "bad", bad=True, kind="failed")]  # fmt: skip
    chart = line_chart("loss", [Series("loss", [1, 2, 3], [1, 2, 3])], events=events)
    assert re.findall(r"<li>(.*?)</li>", chart) == ['<i class="event"></i>resumed', '<i class="event bad"></i>failed']


def test_heat_map_has_every_cell_once():
    values = np.arange(24.0).reshape(4, 6) + 1.0
    labels = {"rows": range(4), "columns": range(6), "row_name": "layer", "column_name": "expert"}
    chart = heat_map("load", values, **labels, center=4.0)
    cells = sum(int(length) for length in re.findall(r"h(\d+)", "".join(re.findall(r' d="([^"]*)"', chart))))
    assert cells == 24 and hover_values(chart)["values"] == values.tolist()
    values[1, 1] = math.nan
    chart = heat_map("load", values, **labels)
    assert hover_values(chart)["values"][1][1] is None
    assert heat_map("load", [], rows=[], columns=[], row_name="layer", column_name="expert") == ""


def test_heat_map_of_equal_values_is_neutral():
    chart = heat_map("load", np.ones((2, 2)), rows="ab", columns="cd", row_name="r", column_name="c", center=1.0)
    assert re.findall(r'<path stroke="([^"]*)"', chart) == ["#eeeeee"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (95.0, 304.0, [100.0, 150.0, 200.0, 250.0, 300.0]),
        (-1e-9, 0.0, None),
    ],
)
def test_ticks_are_round(low, high, ticks):
    found = linear_ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low - 1e-12 <= tick <= high for tick in found)
    assert ticks is None or found == ticks


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (math.nan, "–"), (math.inf, "∞"), (0.0, "0"), (3.0, "3"), (0.123456, "0.1235"), (1234567.0,
     "1\u202f234\u202f567"), (2.5e-5, "2.5e-5"), (-1e-7, "-1e-7")],
)  # fmt: skip
def test_numbers_for_people(value, expected):
    assert number(value) == expected
