"""What tests of several files share, because it takes long to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.resumed_runs import Runs, quick_runs
from tests.helpers.tiny_recipe import write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe on disk."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def quick(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two processes' runs: resumed, stopped, killed, and with bad numbers."""
    return quick_runs(recipe, tmp_path_factory.mktemp("two processes"))
