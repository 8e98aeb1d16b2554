"""SIGKILL at many moments: the target is absent or complete, and starting again gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("points", "mode"),
    [
        (4, []),
        pytest.param(70, [], marks=pytest.mark.slow),
        pytest.param(40, ["overwrite"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", ["hf_to_dcp", "dcp_to_hf"])
def test_killed_at_any_moment(tmp_path: Path, command: str, points: int, mode: list[str]) -> None:
    repository = Path(__file__).parents[3]
    driver = repository / "tests/drivers/kill_conversion.py"
    result = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), command, str(points), *mode],
        capture_output=True, text=True, timeout=600, cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{points} of " in result.stdout
    print(result.stdout.splitlines()[-1])
