"""What a command costs before it does anything."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path


def seconds_of(*command: str) -> float:
    """Processor time of a child process, which other programs on the machine hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=Path(__file__).parents[2], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_instant():
    assert min(seconds_of("pretrain_transformers.py", "--help") for _ in range(3)) < 0.5


def test_a_heavy_import_would_be_noticed():
    assert seconds_of("-c", "import torch") > 0.5
