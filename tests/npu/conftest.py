"""These tests run where torch_npu is the simulated one; ``tests/st/test_simulated_npu.py`` starts them there.

By hand: ``PYTHONPATH=tests/helpers/simulated_npu python -m pytest tests/npu``. On a machine with an NPU,
``MM_TEST_REAL_NPU=1 python -m pytest tests/npu`` runs those of kernels and model on it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tests.helpers.npu_environment import SIMULATED_NPU

_spec = importlib.util.find_spec("torch_npu")
if _spec is None or (SIMULATED_NPU not in Path(_spec.origin).parents and "MM_TEST_REAL_NPU" not in os.environ):
    collect_ignore_glob = ["test_*.py"]
elif SIMULATED_NPU not in Path(_spec.origin).parents:
    collect_ignore = ["test_device.py", "test_refusals.py"]
