"""What importing the model starts."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, time
import mindspeed_mm.models.qwen3vl
time.sleep(1)
children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
assert not children, [open(f"/proc/{child}/cmdline").read() for child in children]
"""


def test_no_process_is_started_beside_it():
    """torch 2.7 would start a pool of compilers for megatron-core's decorators."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
