"""``.metadata``: read by torch and by this package, whichever wrote it, without running code."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from mindspeed_mm.checkpoint.directory import METADATA
from mindspeed_mm.checkpoint.metadata_file import read_entries
from mindspeed_mm.checkpoint.storage import CheckpointReader, read_metadata
from mindspeed_mm.errors import UserError


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_torchs_own_file_is_read(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, 4, dtype=torch.bfloat16), "b": torch.tensor(2.0), "other": {"kind": "text"}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    ours, theirs = read_metadata(tmp_path / METADATA), dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert CheckpointReader(tmp_path).tensors == {"a": ((3, 4), torch.bfloat16), "b": ((), torch.float32)}
    assert read_entries(tmp_path, None) == {"a": ((3, 4), "bfloat16"), "b": ((), "float32")}


@pytest.mark.parametrize("place", ["whole", "planner_data", "state", "storage"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, place: str) -> None:
    trap, path = Malicious(tmp_path / "proof"), tmp_path / METADATA
    content = {
        "whole": trap,
        "planner_data": Metadata({}, planner_data={"x": trap}, storage_data={}),
        "state": Metadata({"x": trap}, planner_data={}, storage_data={}),
        "storage": Metadata({}, planner_data={}, storage_data={"x": trap}),
    }[place]
    path.write_bytes(pickle.dumps(content))
    for read in (CheckpointReader, functools.partial(read_entries, manifest=None)):
        with pytest.raises(UserError, match=r"asks for posix.mkdir.*not run.*trust"):
            read(tmp_path)
    assert not trap.path.exists()
    pickle.loads(path.read_bytes())  # as torch's own reader does: the file is a real trap
    assert trap.path.exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": 1}), pickle.dumps(Metadata(None))])
def test_damage_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    for read in (lambda: read_metadata(tmp_path / METADATA), lambda: read_entries(tmp_path, None)):
        with pytest.raises(UserError, match=r"\.metadata .*(create|make) the checkpoint again") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for read in (lambda: read_metadata(tmp_path / METADATA), lambda: read_entries(tmp_path, None)):
        with pytest.raises(UserError, match="not a distributed checkpoint"):
            read()


def test_malicious_chunk_runs_nothing(tmp_path: Path) -> None:
    """A stored tensor is a pickle too."""
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    info = next(iter(read_metadata(tmp_path / METADATA).storage_data.values()))
    trap = Malicious(tmp_path / "proof")
    torch.save({"a": trap}, tmp_path / info.relative_path)
    metadata = read_metadata(tmp_path / METADATA)
    next(iter(metadata.storage_data.values())).length = (tmp_path / info.relative_path).stat().st_size
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="cannot be read"):
        CheckpointReader(tmp_path).read("a")
    assert not trap.path.exists()
    torch.load(tmp_path / info.relative_path, weights_only=False)
    assert trap.path.exists()


@pytest.mark.parametrize("stored", [torch.ones(3, dtype=torch.float64), torch.ones(4)])
def test_chunk_of_another_kind_than_described(tmp_path: Path, stored: torch.Tensor) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    metadata = read_metadata(tmp_path / METADATA)
    info = next(iter(metadata.storage_data.values()))
    torch.save(stored, tmp_path / info.relative_path)
    info.length = (tmp_path / info.relative_path).stat().st_size
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"a is stored as \[\d\] torch.float\d\d and .metadata says \[3\]"):
        CheckpointReader(tmp_path).read("a")
