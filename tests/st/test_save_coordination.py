"""Two processes that save: everything once, and one's trouble is known to both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.st
def test_two_processes_agree(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(Path(__file__).parents[1] / "drivers/save_coordination.py"), str(tmp_path)],
        cwd=root, timeout=180, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": passed") == 5
