"""Files of checkpoints and weights that were changed: refused in one line, never believed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.directory import (
    TRACKER,
    checkpoint_to_load,
    read_manifest,
    read_tracker,
    resolve_checkpoint,
    write_tracker,
)
from mindspeed_mm.checkpoint.huggingface import INDEX, SINGLE, read_headers
from mindspeed_mm.checkpoint.state import PROGRESS_FILE, Progress
from mindspeed_mm.errors import UserError
from tests.helpers.checkpoint_directory import commit_directory
from tests.helpers.tiny_recipe import write_recipe

PROGRESS = {"iteration": 40, "consumed_samples": 160, "schedule": None, "seed": 1, "samples_per_epoch": 26}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of iteration 40."""
    with commit_directory(tmp_path / "iter_0000040", {}) as partial:
        (partial / PROGRESS_FILE).write_text(json.dumps(PROGRESS))
    write_tracker(tmp_path, 40)
    return tmp_path / "iter_0000040"


def test_a_changed_counter_is_found_by_its_checksum(saved):
    manifest = read_manifest(saved)
    assert Progress.read(saved, manifest).iteration == 40
    (saved / PROGRESS_FILE).write_text(json.dumps({**PROGRESS, "iteration": 30}))
    with pytest.raises(UserError, match="progress.json has another checksum"):
        Progress.read(saved, manifest)


@pytest.mark.parametrize(
    "change",
    [{"iteration": -5}, {"iteration": "40"}, {"consumed_samples": None}, {"iteration": True}, {"seed": 1.5},
     {"schedule": [1]}, {"iteration": 10**30}, {"more": 1}],
)
def test_counters_of_a_wrong_kind(saved, change):
    (saved / PROGRESS_FILE).write_text(json.dumps({**PROGRESS, **change}))
    with pytest.raises(UserError, match="progress.json"):
        Progress.read(saved)


@pytest.mark.parametrize("text", ["-5", "\u00b2", "9" * 40, "", "iter_40", "release\nx"])
def test_trackers(tmp_path, text):
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(UserError, match=TRACKER):
        read_tracker(tmp_path)


@pytest.mark.parametrize("name", [TRACKER, "iter_0000040/manifest.json", "iter_0000040/progress.json"])
def test_a_fifo_does_not_hang(saved, name):
    path = saved.parent / name
    manifest = read_manifest(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError):
        checkpoint_to_load(saved.parent, plain=False)
        Progress.read(saved, {**manifest, "files": {}})


def test_an_iteration_can_be_named_itself(saved):
    with commit_directory(saved.parent / "iter_0000050", {}) as partial:
        (partial / PROGRESS_FILE).write_text("{}")
    write_tracker(saved.parent, 50)
    assert resolve_checkpoint(saved.parent).name == "iter_0000050"
    assert checkpoint_to_load(saved, plain=False)[0] == saved


@pytest.mark.parametrize(
    "change",
    [{"../x": {"size": 1, "checksum": "c"}}, {"/etc/passwd": {"size": 1, "checksum": "c"}}, {"a": None},
     {"a": {"size": "1", "checksum": "c"}}, {"a": {"size": 1}}, {"a": {"size": 1, "checksum": "c", "items": [[1]]}}],
)
def test_manifests(saved, change):
    manifest = read_manifest(saved)
    (saved / "manifest.json").write_text(json.dumps({**manifest, "files": change}))
    with pytest.raises(UserError):
        read_manifest(saved)


def test_weight_indexes_stay_in_their_directory_and_are_not_ambiguous(tmp_path):
    directory = write_recipe(tmp_path, records=1) / "checkpoint"
    names = list(read_headers(directory)[SINGLE].tensors)
    (tmp_path / "x").mkdir()
    shutil.copy(directory / SINGLE, tmp_path / "x/outside.safetensors")
    for file in ("../x/outside.safetensors", str(tmp_path / "x/outside.safetensors"), 3):
        (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
        with pytest.raises(UserError, match="has both"):
            read_headers(directory)
        (directory / SINGLE).rename(directory / "w.safetensors")
        with pytest.raises(UserError, match="leads out of the directory|a tensor's file is a number"):
            read_headers(directory)
        (directory / "w.safetensors").rename(directory / SINGLE)
