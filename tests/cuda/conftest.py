"""Collects these tests only on a machine with a CUDA GPU: ``python -m pytest tests/cuda``."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def device_name() -> str:
    """Overrides that of ``tests/conftest.py``."""
    return "cuda"
