"""The metrics of a run's steps, from ``metrics.jsonl`` or as they come, in columns."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import open_regular

METRICS_FILE = "metrics.jsonl"
"""In the ``--save`` directory."""
_FILE_BYTES = 10**11
_LARGEST = 1e100  # values beyond cannot be drawn; they are left out, as NaN is


def _is_iteration(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**53


class History:
    """Metrics by name, each with a value or NaN for every step.

    Attributes:
        started, updated: UTC times of the first and the last step, ISO 8601; empty where unknown.
    """

    def __init__(self) -> None:
        """No steps yet."""
        self._columns: dict[str, array[float]] = {}
        self._iterations: array[float] = array("d")
        self.started = ""
        self.updated = ""

    @classmethod
    def read(cls, path: Path) -> History:
        """The steps of a ``metrics.jsonl``; lines that are no step, such as a torn one at the end, are left out.

        Raises:
            UserError: if it cannot be read.
        """
        history = cls()
        try:
            with os.fdopen(open_regular(path, limit=_FILE_BYTES), "rb") as file:
                for line in file:
                    try:
                        metrics = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(metrics, dict) and _is_iteration(metrics.get("iteration")):
                        history.add(metrics.pop("iteration"), metrics)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}; name the --save directory of a run "
                            "that trained a step") from error
        return history

    def add(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Add a step, later than those before; of its metrics those that are numbers."""
        steps = len(self._iterations)
        if steps and iteration <= self._iterations[-1]:
            return
        self._iterations.append(iteration)
        if time := metrics.get("time"):
            self.updated = str(time)
            self.started = self.started or self.updated
        for column in self._columns.values():
            column.append(math.nan)
        self._fill(metrics)

    def amend(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics, as of an evaluation, to the last step, if that is ``iteration``."""
        if len(self._iterations) and self._iterations[-1] == iteration:
            self._fill(metrics)

    def _fill(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST:
                column = self._columns.get(name)
                if column is None:
                    column = self._columns[name] = array("d", [math.nan]) * len(self._iterations)
                column[-1] = value

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._iterations)

    @property
    def iteration(self) -> int:
        """Of the last step; 0 without one."""
        return int(self._iterations[-1]) if len(self) else 0

    @property
    def iterations(self) -> np.ndarray:
        """Of all steps."""
        return np.array(self._iterations)

    def names(self, prefix: str) -> list[str]:
        """Metrics that begin with ``prefix``, without it."""
        return sorted(name.removeprefix(prefix) for name in self._columns if name.startswith(prefix))

    def column(self, name: str) -> np.ndarray:
        """A value or NaN for each step."""
        return np.array(self._columns[name]) if name in self._columns else np.full(len(self), math.nan)

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations and values of the steps that have a finite one."""
        values = self.column(name)
        finite = np.isfinite(values)
        return self.iterations[finite], values[finite]

    def last(self, name: str, *, count: int = 1) -> float | None:
        """Mean of the last ``count`` finite values; None without one."""
        _, values = self.points(name)
        return float(values[-count:].mean()) if len(values) else None
