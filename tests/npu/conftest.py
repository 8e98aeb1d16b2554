"""Collects these tests only if torch_npu is the simulated one; ``tests/st/test_simulated_npu.py`` runs them so.

    PYTHONPATH=tests/helpers/simulated_npu python -m pytest tests/npu     # the simulated NPU
    MM_TEST_REAL_NPU=1 python -m pytest tests/npu                         # a real NPU: tests of kernels and model
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.helpers.npu_environment import SIMULATED_NPU

_spec = importlib.util.find_spec("torch_npu")
if _spec is None or (SIMULATED_NPU not in Path(_spec.origin).parents and "MM_TEST_REAL_NPU" not in os.environ):
    collect_ignore_glob = ["test_*.py"]
elif SIMULATED_NPU not in Path(_spec.origin).parents:
    collect_ignore = ["test_device.py", "test_refusals.py"]


@pytest.fixture(scope="module")
def device_name() -> str:
    """Overrides that of ``tests/conftest.py``."""
    return "npu"
