"""torch's own tools read what is written here, and a checkpoint of plain torch is loaded on request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory, safetensors_io, shards
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.state import load_checkpoint, model_state
from mindspeed_mm.checkpoint.storage import read_metadata
from mindspeed_mm.errors import UserError
from tests.helpers.saved_state import SavedProgress, SavedTensors
from tests.ut.checkpoint.test_convert import expected_mcore
from tests.ut.checkpoint.tiny import random_config, write_hf_directory


@pytest.fixture(params=["saved", "converted"])
def written(request, tmp_path: Path, monkeypatch, process_group) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of several chunks a tensor, and its tensors."""
    if request.param == "converted":
        monkeypatch.setattr(safetensors_io, "READ_BYTES", 500)
        hub = write_hf_directory(tmp_path / "hf", random_config(random.Random(3), moe=True), any_bits=True)
        return hf_to_dcp(tmp_path / "hf", tmp_path / "dcp"), expected_mcore(hub, tmp_path / "hf")
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.a": torch.randn(40, 30, generator=generator), "model.b": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.a.step": torch.tensor(3.0), "rng.0.cpu": torch.arange(90, dtype=torch.uint8),
    }
    manager = CheckpointManager(SavedTensors(tensors), SaveOptions(tmp_path / "save"), backend=select_backend("cpu"))
    manager.start(SavedProgress(1))
    manager.finish()
    return directory.resolve_checkpoint(tmp_path / "save"), tensors


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(*(values.reshape(-1).view(torch.uint8) for values in (found[name], tensor))), name


def test_metadata_as_torch_reads_them(written) -> None:
    path, expected = written
    ours, theirs = read_metadata(path / directory.METADATA), dcp.FileSystemReader(path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert ours.state_dict_metadata.keys() == expected.keys()
    assert len(ours.storage_data) > len(expected)
    assert all(file.stat().st_mode & 0o777 == 0o640 for file in path.iterdir())


def test_plain_reader(written) -> None:
    path, expected = written
    state = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert_same(state, expected)


def test_dcp_to_torch_save(written, tmp_path: Path) -> None:
    path, expected = written
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt", weights_only=True), expected)


@pytest.mark.usefixtures("process_group")
def test_plain_checkpoint_is_loaded_on_request(tmp_path: Path) -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    dcp.save(dict(model_state(model)), storage_writer=dcp.FileSystemWriter(tmp_path / "plain"), no_dist=True)
    options = {"model": other, "optimizer": None, "backend": select_backend("cpu"), "with_rng": False}
    with pytest.raises(UserError, match="no manifest.json"):
        load_checkpoint(tmp_path / "plain", **options)
    with pytest.raises(UserError, match="latest_checkpointed_iteration.txt"):
        directory.checkpoint_to_load(tmp_path / "plain", plain=False)
    path, manifest = directory.checkpoint_to_load(tmp_path / "plain", plain=True)
    assert path == tmp_path / "plain" and manifest["files"] == {}
    assert load_checkpoint(path, **options, check="none").iteration == 0
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    with pytest.raises(UserError, match="is a checkpoint of another model"):
        load_checkpoint(path, **{**options, "model": nn.Linear(5, 4)}, check="none")
