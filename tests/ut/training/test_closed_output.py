"""A reader that goes away, as of ``| head``."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import logging
from mindspeed_mm.training.logging_setup import setup_logging
setup_logging(0)
for number in range(20_000):
    logging.getLogger("mindspeed_mm").info(f"line {number}")
"""


def test_a_closed_console_is_said_once_and_is_no_failure():
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith("line 0\n")
    process.stdout.close()
    assert process.stderr.read() == "warning: standard output is closed; training goes on\n"
    assert process.wait(20) == 0
