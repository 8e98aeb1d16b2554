"""Intervals and tests of evaluation results; random draws have a fixed seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mindspeed_mm.evaluation.metrics import Metric, Score

Z_95 = 1.959963984540054
_DRAWS, _SEED = 1000, 0


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """95% interval of a rate.

    Source: Wilson (1927): ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with z = 1.96.
    """
    rate, square = right / total, Z_95**2 / total
    centre = (rate + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(rate * (1 - rate) / total + square / (4 * total)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(metric: Metric, scores: Sequence[Score]) -> tuple[float, float]:
    """95% interval of a metric by resampling the questions 1000 times: the percentile bootstrap (Efron, 1979)."""
    values = list(map(metric.over(scores), _draws(len(scores))))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def interval(metric: Metric, scores: Sequence[Score]) -> tuple[float, float]:
    """95% interval of a metric: Wilson's for a rate, otherwise by bootstrap."""
    if metric.kind == "rate":
        return wilson_interval(sum(score.value for score in scores), len(scores))
    return bootstrap_interval(metric, scores)


def paired_interval(metric: Metric, first: Sequence[Score], second: Sequence[Score]) -> tuple[float, float]:
    """95% interval of the difference second - first, by resampling the questions for both alike.

    Source: the paired bootstrap (Efron and Tibshirani, 1993; for language models Koehn, 2004).
    """
    before, after = metric.over(first), metric.over(second)
    values = [after(weights) - before(weights) for weights in _draws(len(first))]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided p-value that as many answers would be fixed as broken.

    Source: McNemar (1947), exact: ``fixed`` is binomial with ``fixed + broken`` draws and probability 1/2.
    """
    changed = fixed + broken
    tail = sum(math.comb(changed, k) for k in range(min(fixed, broken) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def _draws(count: int) -> Iterator[np.ndarray]:
    """How often each of ``count`` questions is drawn: 1000 times int [count]."""
    generator = np.random.default_rng(_SEED)
    for _ in range(_DRAWS):
        yield np.bincount(generator.integers(0, count, count), minlength=count)
