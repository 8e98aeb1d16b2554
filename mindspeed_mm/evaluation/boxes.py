"""Boxes of answers against expected ones. A box is ``[x1, y1, x2, y2]``; any unit, the same for both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IOU_THRESHOLD = 0.5
_RECALLS = np.linspace(0.0, 1.0, 101)


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Area of the intersection over the area of the union; 0 if both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second)) - shared
    return shared / union if union > 0 else 0.0


def mean_iou(given: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Mean intersection over union of the expected boxes; an expected box without a given one counts 0.

    Pairs are formed greedily, the pair with the greatest intersection over union first, each box in one pair at most.
    Further given boxes do not lower it.
    """
    pairs = sorted(
        ((iou(box, wanted), i, j) for i, box in enumerate(given) for j, wanted in enumerate(expected)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    used_given, used_expected, total = set(), set(), 0.0
    for value, i, j in pairs:
        if i not in used_given and j not in used_expected:
            used_given.add(i)
            used_expected.add(j)
            total += value
    return total / len(expected)


def match_boxes(given: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> list[bool]:
    """Which given boxes are right.

    As in COCO's evaluation (Lin et al., 2014): in the order of the answer, a given box takes the expected box with
    the greatest intersection over union among those that are free; it is right if that is at least 0.5.
    """
    free, right = list(expected), []
    for box in given:
        best = max(range(len(free)), key=lambda place: iou(box, free[place]), default=None)
        right.append(best is not None and iou(box, free[best]) >= IOU_THRESHOLD)
        if right[-1]:
            free.pop(best)
    return right


class RankedBoxes:
    """The given boxes of many questions, ranked by their place in their answer, then by question."""

    def __init__(self, ranked: Sequence[Sequence[bool]], expected: Sequence[float]) -> None:
        """Rank the boxes.

        Args:
            ranked: of each question, whether each given box is right, in the order of the answer.
            expected: of each question, number of expected boxes.
        """
        boxes = sorted((place, question, right) for question, rights in enumerate(ranked)
                       for place, right in enumerate(rights))
        self._questions = np.array([question for _, question, _ in boxes], dtype=np.int64)
        self._right = np.array([right for _, _, right in boxes], dtype=float)
        self._expected = np.asarray(expected, dtype=float)

    def average_precision(self, weights: np.ndarray) -> float:
        """Average precision over the questions, each of which counts ``weights`` [n] times.

        Precision, made monotonous from the right, is averaged over the recalls 0, 0.01, ..., 1, as in COCO's evaluation
        (Lin et al., 2014).
        """
        total = float(weights @ self._expected)
        if not len(self._questions) or not total:
            return 0.0
        counts = weights[self._questions].astype(float)
        matched, given = np.cumsum(counts * self._right), np.cumsum(counts)
        precision = np.divide(matched, given, out=np.zeros_like(matched), where=given > 0)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(matched / total, _RECALLS, side="left")
        reached = precision[np.minimum(places, len(precision) - 1)]
        return float(np.mean(np.where(places < len(precision), reached, 0.0)))
