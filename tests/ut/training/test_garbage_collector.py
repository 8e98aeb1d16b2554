"""The end of a process: nothing is printed after a run's last line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("library", ["triton", "json"])
def test_nothing_is_reported_at_the_end(library):
    """Triton's bindings report what is left as leaked; other imports are left to the system."""
    pytest.importorskip(library)
    program = (
        "from mindspeed_mm.training.garbage_collector import uncollected_imports\n"
        f"with uncollected_imports():\n    import {library}\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
