"""The place for checkpoints, before anything is started."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.save_directory import (
    check_new_stage,
    check_writable,
    disk_space_warning,
    earlier_run_warning,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.state_dict import mcore_shapes
from mindspeed_mm.tools.memory.plan import checkpoint_bytes
from tests.helpers.checkpoint_directory import commit_directory
from tests.helpers.tiny_config import tiny_config

GB = 10**9


def test_place_is_there_or_can_be_made(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save .*file/save: .*file is not a directory"):
        check_writable(tmp_path / "file" / "save")
    with pytest.raises(UserError, match=r"--save .* cannot be read: File name too long; name another directory"):
        check_writable(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("loop", "nowhere/save"):
        with pytest.raises(UserError, match="(loop|nowhere) is not a directory"):
            check_writable(tmp_path / name)
    if Path("/proc/self").exists():
        with pytest.raises(UserError, match="a directory cannot be created in /proc"):
            check_writable(Path("/proc/save"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "nowhere"]


def test_place_that_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write anywhere
    with pytest.raises(UserError, match="is not writable by this user"):
        check_writable(tmp_path / "save")


@pytest.mark.parametrize(
    ("count", "keep_last", "words"),
    [
        (2, None, None),
        (3, None, "120.0 GB free and a checkpoint of this run takes about 50.0 GB, of which up to 3 .*; --keep-last"),
        (9, 1, None),
        (9, 2, "up to 3 will exist at the same time; lower --keep-last"),
    ],
)
def test_room_for_all_that_will_lie_there(tmp_path: Path, monkeypatch, count: int, keep_last, words) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=120 * GB))
    line = disk_space_warning(tmp_path / "save", nbytes=50 * GB, count=count, keep_last=keep_last)
    if words is None:
        assert line is None
    else:
        assert line is not None and re.search(words, line)
    small = disk_space_warning(tmp_path, nbytes=9_600_000, count=10**6, keep_last=None)
    assert "120.0 GB free and a checkpoint of this run takes about 9.6 MB" in small
    assert "no save will succeed" in disk_space_warning(tmp_path, nbytes=130 * GB, count=1, keep_last=None)


def test_checkpoints_of_an_earlier_run_are_said(tmp_path: Path) -> None:
    save = tmp_path / "save"
    assert earlier_run_warning(None, None) is None and earlier_run_warning(str(save), None) is None
    for iteration in (5, 20):
        with commit_directory(save / f"iter_{iteration:07d}", {}):
            pass
    for load in (None, str(tmp_path / "weights")):
        line = earlier_run_warning(str(save), load)
        assert f"--save {save} has checkpoints of an earlier run, the last of iteration 20" in line
        assert f"to continue that run: --load {save}, else name another directory" in line
    for load in (save, save / "iter_0000005", tmp_path / "weights/../save"):
        assert earlier_run_warning(str(save), str(load)) is None
        with pytest.raises(UserError, match="its checkpoints would replace those of the first in --save .*another"):
            check_new_stage(str(save), str(load))
    check_new_stage(str(save), str(tmp_path / "weights"))
    check_new_stage(str(tmp_path / "new"), str(save))


@pytest.mark.parametrize("processes", [1, 4])
def test_bytes_of_a_checkpoint(processes: int) -> None:
    """Whatever the layout, it holds the whole model in fp32, and moments of the text decoder, which trains."""
    model_config = tiny_config()
    plan = Plan(
        model_config=model_config,
        world_size=processes,
        sharding_size=processes,
        expert_size=processes // 2 or 1,
        tokens=8,
        patches=4,
        target_tokens=8,
        frozen=["vision_encoder", "vision_projector"],
    )
    sizes = {
        name: math.prod(shape) for name, shape in mcore_shapes(weight_rules(model_config, expert_layout="hub")).items()
    }
    trained = sum(size for name, size in sizes.items() if not name.startswith("image_encoder"))
    assert checkpoint_bytes(plan, moments=False) == 4 * sum(sizes.values())
    assert checkpoint_bytes(plan, moments=True) == 4 * sum(sizes.values()) + 8 * trained
    assert checkpoint_bytes(plan, moments=True, trainable_only=True) == 12 * trained
    narrow = dataclasses.replace(plan, frozen_param_bytes=2)
    assert checkpoint_bytes(narrow, moments=True) == 2 * (sum(sizes.values()) - trained) + 12 * trained


def test_imports_no_torch() -> None:
    code = "import sys, mindspeed_mm.checkpoint.save_directory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
