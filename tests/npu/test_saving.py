"""Saving from a device: asynchronous through pinned staging buffers, synchronous chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.state import load_tensors
from mindspeed_mm.checkpoint.storage import CheckpointReader

pytestmark = pytest.mark.usefixtures("process_group")


@dataclasses.dataclass
class Standing:
    iteration: int


class State:
    """Tensors on the device."""

    def __init__(self) -> None:
        self.tensors = {
            "model.a": torch.arange(300.0).view(20, 15).to("npu"),
            "model.b": torch.arange(8.0).to(torch.bfloat16).to("npu"),
            "optimizer.step": torch.tensor(3.0, device="npu"),
        }

    def state_dict(self) -> Mapping[str, Tensor]:
        return {**self.tensors, "rng.0.cpu": torch.get_rng_state()}

    def expected_bytes(self) -> int:
        return 10_000


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_from_the_device(tmp_path: Path, asynchronous: bool) -> None:
    state = State()
    before = {name: tensor.cpu() for name, tensor in state.tensors.items()}
    saver = CheckpointManager(state, SaveOptions(tmp_path, asynchronous=asynchronous), backend=select_backend("npu"))
    for iteration in (1, 2):
        saver.start(Standing(iteration))
        for tensor in state.tensors.values():
            tensor.add_(1)
    saver.finish()
    path = tmp_path / "iter_0000002"
    reader = CheckpointReader(path, directory.verify_directory(path, checksums=True))
    load_tensors(reader, state.tensors)
    for name, tensor in state.tensors.items():
        assert tensor.device.type == "npu" and torch.equal(tensor.cpu(), before[name] + 1), name
