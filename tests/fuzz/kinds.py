"""All kinds of broken input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.fuzz import data, datasets, environments, models
from tests.fuzz.outcomes import Outcomes

KINDS = {**data.KINDS, **datasets.KINDS, **models.KINDS, **environments.KINDS}


def run_kinds(directory: Path, kinds: Iterable[str], count: int, seed: int) -> Iterator[tuple[str, Outcomes]]:
    """Try ``count`` inputs of each kind, and fewer of the kinds whose inputs take long."""
    for kind in kinds:
        (directory / kind).mkdir()
        yield kind, KINDS[kind](directory / kind, count, seed)
