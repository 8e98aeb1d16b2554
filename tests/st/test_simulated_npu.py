"""Runs ``tests/npu`` with a simulated NPU, under the operator signatures of two torch_npu versions."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.npu_environment import HAS_COMPILER, npu_environment

pytestmark = [
    pytest.mark.st,
    pytest.mark.skipif(not HAS_COMPILER, reason="the simulated NPU is compiled on first use, and there is no g++"),
]


@pytest.mark.parametrize(("version", "files"), [
    ("2.7.1", ["tests/npu"]), ("2.13.0", ["tests/npu/test_kernels.py", "tests/npu/test_refusals.py"])
])
def test_on_the_simulated_device(version, files):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files],
        env=npu_environment(version=version), capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
