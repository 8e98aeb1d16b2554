"""Notices values that lie far above what the last steps had, by robust statistics: one outlier does not move them."""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW = 100
_NEEDED = 20
_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution, as a multiple of its standard deviation
_SMALLEST_SPREAD = 0.01  # of the median: a curve that has become flat makes no alarm of every ripple


class SpikeDetector:
    """Compares each value with the median of the last 100, in units of their spread."""

    def __init__(self, name: str, *, factor: float) -> None:
        """Begin without a history; the first 20 values raise no alarm.

        Args:
            name: of the value, for the message.
            factor: standard deviations, estimated from the median absolute deviation, above the median; 0: no alarm.
        """
        self._name = name
        self._factor = factor
        self._values: deque[float] = deque(maxlen=_WINDOW)

    def check(self, value: float) -> str | None:
        """Take note of a step's value, unless it is not finite; returns what to say of it where it is a spike."""
        if not math.isfinite(value):
            return None
        message = None
        if self._factor and len(self._values) >= _NEEDED:
            median = statistics.median(self._values)
            deviation = statistics.median(abs(other - median) for other in self._values)
            spread = max(_TO_SIGMA * deviation, _SMALLEST_SPREAD * abs(median))
            if value > median + self._factor * spread:
                message = (
                    f"{self._name} {value:.6g} lies {(value - median) / spread:.1f} standard deviations above the "
                    f"median {median:.6g} of the last {len(self._values)} steps"
                )
        self._values.append(value)
        return message
