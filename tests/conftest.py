"""Process groups of tests: the only place that creates them, apart from the programs in ``tests/drivers``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by Triton when it is imported: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidia0").exists() else "1")


@pytest.fixture(scope="module")
def device_name() -> str:
    """The device of :func:`process_group`; ``tests/npu`` overrides it."""
    return "cpu"


@pytest.fixture(scope="module")
def process_group(device_name: str) -> Iterator[Any]:
    """A process group of one rank, with one thread per operator; gives the backend."""
    import torch

    from mindspeed_mm.backend.device import select_backend
    from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed

    torch.set_num_threads(1)
    backend = select_backend(device_name)
    init_distributed(backend, timeout_minutes=1)
    yield backend
    shutdown_distributed()


@pytest.fixture
def fake_process_group() -> Iterator[Callable[[int], None]]:
    """Makes this process rank 0 of a group of any size, whose collectives do nothing."""
    import torch.distributed as dist

    from tests.helpers.process_groups import init_fake_process_group

    yield lambda world_size: init_fake_process_group(0, world_size)
    dist.destroy_process_group()
