"""Which checkpoints of a run are the best by a metric of its evaluations. This module imports no torch.

```
ROOT/best_checkpointed_iteration.txt       iteration of the best checkpoint; written last
ROOT/best_checkpoints.json                 metric, and iteration and value of the best checkpoints, best first
```
``ROOT/best`` stands for the best checkpoint wherever one is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import BEST_TRACKER, iteration_name
from mindspeed_mm.checkpoint.files import write_atomically
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, is_present, shorten

BEST_FILE = "best_checkpoints.json"
_HIGHER_IS_BETTER = ("validation_token_accuracy", "validation_exact_match")
_SPARE = 2  # times as many are remembered as are kept: a save may fail


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric, or of that of one data set or channel, is the better one."""
    return metric.partition("/")[0] in _HIGHER_IS_BETTER


@dataclasses.dataclass
class BestSoFar:
    """The evaluations of a run so far, as far as later decisions depend on them; a part of its progress.

    Attributes:
        metric: by which checkpoints are compared.
        ranking: (iteration, value) of the checkpoints that were among the best when they were saved, best first.
        only: those of them that were saved for that alone, into the present ``--save`` directory.
        runs: identities of the run that wrote the progress and of those that it continues; only a checkpoint whose
            manifest names one of them is one of the ranking.
        reference: value that the next one has to improve on; None before the first.
        waited: evaluations since then.
    """

    metric: str
    ranking: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    only: list[int] = dataclasses.field(default_factory=list)
    runs: list[str] = dataclasses.field(default_factory=list)
    reference: float | None = None
    waited: int = 0

    @classmethod
    def read(cls, content: Any, file: Path | str) -> BestSoFar:
        """From what ``dataclasses.asdict`` made, by way of JSON.

        Raises:
            UserError: if it is anything else.
        """
        try:
            found = cls(**content)
            found.ranking = [(iteration, value) for iteration, value in found.ranking]
            numbers = [*(iteration for iteration, _ in found.ranking), *found.only, found.waited]
            values = [value for _, value in found.ranking] + ([] if found.reference is None else [found.reference])
            valid = (
                isinstance(found.metric, str)
                and isinstance(found.runs, list)
                and all(isinstance(run, str) for run in found.runs)
                and all(type(number) is int and number >= 0 for number in numbers)
                and all(type(value) in (int, float) and math.isfinite(value) for value in values)
            )
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(f"{file}: best is {shorten(content)}, not what a run writes; restore it, or load another "
                            "checkpoint")
        return found

    def add_run(self, identity: str) -> None:
        """Note a run that continues the others, or one that is continued."""
        if identity not in self.runs:
            self.runs.append(identity)

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another; NaN never is."""
        return value > other if higher_is_better(self.metric) else value < other

    def add(self, iteration: int, value: float, *, keep: int) -> bool:
        """Rank an evaluation.

        Args:
            iteration: after which it was made.
            value: of the metric.
            keep: number of best checkpoints to keep.

        Returns:
            Whether it is among the best; of equal ones the earlier is the better.
        """
        self.ranking = [entry for entry in self.ranking if entry[0] != iteration]
        place = sum(not self.better(value, other) for _, other in self.ranking)
        if place >= keep or not math.isfinite(value):
            return False
        self.ranking.insert(place, (iteration, value))
        del self.ranking[_SPARE * keep :]
        return True

    def wait(self, value: float, *, threshold: float) -> int:
        """Count an evaluation; returns how many in a row, up to it, have not improved by ``threshold``."""
        if math.isfinite(value):
            gain = math.inf if self.reference is None else abs(value - self.reference)
            if self.reference is None or (self.better(value, self.reference) and gain >= threshold):
                self.reference, self.waited = value, 0
                return 0
        self.waited += 1
        return self.waited

    def kept(self, on_disk: Collection[int], *, keep: int) -> list[tuple[int, float]]:
        """(iteration, value) of the best ``keep`` checkpoints of those that are complete."""
        return [entry for entry in self.ranking if entry[0] in on_disk][:keep]


def best_of_progress(progress: Mapping[str, Any]) -> BestSoFar | None:
    """What a run's progress, as a mapping, has of the best checkpoints."""
    content = progress.get("best")
    return None if content is None else BestSoFar.read(content, "progress")


def write_best(root: Path, best: BestSoFar, kept: list[tuple[int, float]]) -> None:
    """Record the best checkpoints in ``root``, once they are complete: the tracker last. Called by one rank.

    Files that say so already are left. Without any, a tracker that an earlier run has left is removed.

    Raises:
        OSError: if a file cannot be written.
    """
    for name, content in _files(best, kept).items():
        if content is None:
            (root / name).unlink(missing_ok=True)
        elif _content(root / name) != content:
            write_atomically(root / name, content)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if is_file(path) else None
    except OSError:
        return None


def _files(best: BestSoFar, kept: list[tuple[int, float]]) -> dict[str, bytes | None]:
    """Name -> content of the files of the best checkpoints, in the order of writing; None: there is none."""
    content = {
        "metric": best.metric,
        "higher_is_better": higher_is_better(best.metric),
        "ranking": [
            {"iteration": iteration, "value": value, "directory": iteration_name(iteration)}
            for iteration, value in kept
        ],
    }
    tracked = str(kept[0][0]).encode() if kept else None
    return {BEST_FILE: (json.dumps(content, indent=1) + "\n").encode(), BEST_TRACKER: tracked}


def check_best_files(root: Path) -> None:
    """Refuse a ``--save`` directory in which the best checkpoints cannot be recorded.

    Raises:
        UserError: naming what is in the way.
    """
    for name in (BEST_FILE, BEST_TRACKER):
        if is_present(root / name) and not is_file(root / name):
            raise UserError(f"{root / name} is not a regular file, and --keep-best records the best checkpoints there; "
                            "remove it, or name another --save directory")
