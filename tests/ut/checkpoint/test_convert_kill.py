"""SIGKILL at many moments: the target is absent or complete, and starting again gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("command", "points"),
    [
        ("hf_to_dcp", 5),
        ("dcp_to_hf", 4),
        pytest.param("hf_to_dcp", 50, marks=pytest.mark.slow),
        pytest.param("dcp_to_hf", 50, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(tmp_path: Path, command: str, points: int) -> None:
    driver = Path(__file__).with_name("kill_driver.py")
    repository = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), command, str(points)],
        capture_output=True, text=True, timeout=300, cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{points} of " in result.stdout
