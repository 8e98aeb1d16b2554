"""Saving by one rank: bitwise, synchronous and asynchronous, and with disk errors."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mindspeed_mm import progress
from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.checkpoint import directory, shards, storage
from mindspeed_mm.checkpoint import manager as manager_module
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.state import load_tensors
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from tests.helpers.log_lines import log_lines

pytestmark = pytest.mark.usefixtures("process_group")


@dataclasses.dataclass
class SavedProgress:
    iteration: int


class State:
    """A few tensors of several types and shapes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            "model.a": torch.randn(40, 30, generator=generator),
            "model.b": torch.randn(7, generator=generator).to(torch.bfloat16),
            "model.turned": torch.randn(6, 50, generator=generator).t(),
            "model.part": torch.randn(100, generator=generator)[10:20],
            "optimizer.step": torch.tensor(3.0),
        }
        self.generator = torch.arange(100, dtype=torch.uint8)

    def state_dict(self) -> Mapping[str, Tensor]:
        return {**self.tensors, "rng.0.cpu": self.generator}

    def expected_bytes(self) -> int:
        return 10_000

    def everything(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def train(self) -> None:
        for tensor in self.tensors.values():
            tensor.add_(1)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the manager logs."""
    messages: list[str] = []
    with log_lines(messages.append):
        yield messages


def manager_of(state: State, root: Path, **options) -> CheckpointManager:
    return CheckpointManager(state, SaveOptions(root, **options), backend=select_backend("cpu"))


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors, by torch's own reader."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


def loaded(path: Path, like: Mapping[str, Tensor], **options) -> dict[str, Tensor]:
    state = {name: torch.full_like(tensor, 77) for name, tensor in like.items()}
    load_tensors(CheckpointReader(path, directory.verify_directory(path), **options), state)
    return state


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in first if first[name].dtype != second[name].dtype] == []


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 500])
def test_saved_is_what_was_there(
    tmp_path: Path, monkeypatch, asynchronous: bool, chunk_bytes: int, lines: list[str]
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(storage, "MIN_FILE_BYTES", 2000)
    state = State()
    before = state.everything()
    manager = manager_of(state, tmp_path, asynchronous=asynchronous)
    manager.start(SavedProgress(5))
    state.train()
    manager.finish()
    path = directory.resolve_checkpoint(tmp_path)
    assert path.name == "iter_0000005"
    directory.verify_directory(path, checksums=True)
    assert_same(stored(path), before)
    assert_same(loaded(path, before), before)
    assert len(list(path.glob("__0_*.distcp"))) > 1
    assert json.loads((path / "progress.json").read_text()) == {"iteration": 5}
    assert len(lines) == 1 and ("training blocked for" in lines[0]) is asynchronous, lines
    assert os.listdir(tmp_path) == [path.name, directory.TRACKER] or sorted(os.listdir(tmp_path)) == sorted(
        [path.name, directory.TRACKER]
    )


def test_loading_reports_all_bytes(tmp_path: Path, monkeypatch, caplog) -> None:
    """Chunk by chunk, in the end as many as there are."""
    caplog.set_level("INFO", "mindspeed_mm")
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    state = State()
    manager = manager_of(state, tmp_path)
    manager.start(SavedProgress(5))
    manager.finish()
    loaded(directory.resolve_checkpoint(tmp_path), state.everything())
    said = [line for line in caplog.messages if line.startswith("loading, on rank 0: ")]
    assert len(said) > 3 and "(100%)" in said[-1] and " 0:00:00 left" in said[-1]
    assert not any("(100%)" in line for line in said[: len(said) // 2])


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Nothing reaches the disk until it is set."""
    event, fsync = threading.Event(), os.fsync

    def waiting(descriptor: int) -> None:
        assert event.wait(30)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", waiting)
    return event


def test_training_continues_during_a_save(tmp_path: Path, gate: threading.Event, lines: list[str]) -> None:
    gate.set()
    state = State()
    manager = manager_of(state, tmp_path, asynchronous=True)
    gate.clear()
    before = state.everything()
    manager.start(SavedProgress(1))
    state.train()
    manager.poll()
    assert lines == [] and directory.read_tracker(tmp_path) is None
    gate.set()
    manager.wait()
    assert_same(stored(tmp_path / "iter_0000001"), before)
    assert not torch.equal(before["model.a"], state.tensors["model.a"])


def test_a_file_system_that_hangs_ends_the_run(
    tmp_path: Path, gate: threading.Event, monkeypatch, lines: list[str]
) -> None:
    gate.set()
    monkeypatch.setattr(manager_module, "_REPORT_SECONDS", 0.05)
    manager = manager_of(State(), tmp_path, asynchronous=True, timeout_minutes=0.01)
    gate.clear()
    manager.start(SavedProgress(1))
    with pytest.raises(UserError, match=r"iteration 1 has made no progress for 0.01 minutes.*0.00 GB on disk;"):
        manager.wait()
    assert "waiting for the save of iteration 1" in lines[0]
    gate.set()
    manager.wait()


def test_one_save_in_flight(tmp_path: Path, gate: threading.Event, lines: list[str]) -> None:
    gate.set()
    state = State()
    manager = manager_of(state, tmp_path, asynchronous=True)
    gate.clear()
    manager.start(SavedProgress(1))
    threading.Timer(0.5, gate.set).start()
    state.train()
    second = state.everything()
    manager.start(SavedProgress(2))
    assert directory.read_tracker(tmp_path) == 1  # complete before the next begins
    state.train()
    manager.finish()
    assert [line.split()[0] for line in lines] == ["saved", "waited", "saved"]
    assert_same(stored(tmp_path / "iter_0000002"), second)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_permissions_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        manager_of(State(), tmp_path / "with space" / "save").start(SavedProgress(1))
    finally:
        os.umask(before)
    paths = [tmp_path / "with space" / "save", *(tmp_path / "with space" / "save").rglob("*")]
    assert len(paths) == 7
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_symlinks_and_a_read_only_source(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    state = State()
    manager_of(state, tmp_path / "link").start(SavedProgress(1))
    path = directory.resolve_checkpoint(tmp_path / "link")
    paths = [tmp_path / "disk", *(tmp_path / "disk").rglob("*")]
    for part in paths:
        part.chmod(0o500 if part.is_dir() else 0o400)
    contents = {part: part.stat() for part in paths}
    assert_same(loaded(path, state.everything(), check="all"), state.everything())
    assert all(part.stat().st_mtime_ns == before.st_mtime_ns for part, before in contents.items())


def iterations(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("iter_*"))


def test_keep_last_and_keep_every(tmp_path: Path, lines: list[str]) -> None:
    state = State()
    manager_of(state, tmp_path).start(SavedProgress(100))  # of another lineage: later than all that follow
    manager = manager_of(state, tmp_path, keep_last=2, keep_every=4)
    (tmp_path / "iter_0000003").mkdir()  # no checkpoint, so not deleted
    for iteration in (1, 2, 4, 5, 6, 8, 9):
        manager.start(SavedProgress(iteration))
    assert iterations(tmp_path) == [3, 4, 8, 9, 100]
    assert directory.read_tracker(tmp_path) == 9
    assert any(line == "deleted iter_0000005 (--keep-last)" for line in lines)


def fill_disk(monkeypatch, *, after: int, code: int = errno.ENOSPC) -> None:
    """Let every write fail, from the ``after``-th on."""
    write, count = os.write, iter(range(10**9))

    def failing(descriptor: int, data) -> int:
        if next(count) >= after:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("after", range(12))
def test_full_disk_leaves_the_run_and_the_last_checkpoint(
    tmp_path: Path, monkeypatch, asynchronous: bool, after: int, lines: list[str]
) -> None:
    state = State()
    manager = manager_of(state, tmp_path, asynchronous=asynchronous)
    manager.start(SavedProgress(1))
    manager.wait()
    good = state.everything()
    state.train()
    with monkeypatch.context() as patch:
        fill_disk(patch, after=after)
        manager.start(SavedProgress(2))
        manager.wait()
    failed = manager.failures == 1
    assert failed or after > 4  # enough writes for a whole save
    if failed:
        assert "No space left on device" in lines[-1] and "GB free" in lines[-1] and "iter_0000001" in lines[-1]
        assert "\n" not in lines[-1]
        assert directory.read_tracker(tmp_path) == 1
        assert_same(stored(directory.resolve_checkpoint(tmp_path)), good)
    state.train()
    manager.start(SavedProgress(3))
    manager.finish()
    assert manager.failures == 0 and directory.read_tracker(tmp_path) == 3
    assert_same(stored(tmp_path / "iter_0000003"), state.everything())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_too_many_failures_end_the_run(tmp_path: Path, monkeypatch, asynchronous: bool, lines: list[str]) -> None:
    state = State()
    manager = manager_of(state, tmp_path, asynchronous=asynchronous, failure_limit=2)
    manager.start(SavedProgress(1))
    manager.wait()
    with monkeypatch.context() as patch:
        fill_disk(patch, after=2, code=errno.EIO)
        manager.start(SavedProgress(2))
        with pytest.raises(UserError, match=r"2 saves in a row failed.*Input/output error.*iter_0000001"):
            manager.start(SavedProgress(3))
    assert directory.read_tracker(tmp_path) == 1


def test_a_limit_of_one_holds_for_asynchronous_saves(tmp_path: Path, monkeypatch) -> None:
    manager = manager_of(State(), tmp_path, asynchronous=True, failure_limit=1)
    with monkeypatch.context() as patch:
        fill_disk(patch, after=2)
        manager.start(SavedProgress(2))
        while manager.failures == 0:
            manager.poll()
    with pytest.raises(UserError, match=r"1 save failed \(--save-failure-limit 1\)"):
        manager.start(SavedProgress(3))


def test_copies_must_fit_into_memory(tmp_path: Path, monkeypatch) -> None:
    state = State()
    monkeypatch.setattr(state, "expected_bytes", lambda: 10**15)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--async-save .* 2000000.0 GB for the 2 ranks .*leave --async-save out"):
        manager_of(state, tmp_path, asynchronous=True)
    manager_of(state, tmp_path).start(SavedProgress(1))


def test_failure_of_the_last_save_is_an_error(tmp_path: Path, monkeypatch) -> None:
    manager = manager_of(State(), tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        fill_disk(patch, after=0)
        manager.start(SavedProgress(2))
        with pytest.raises(UserError, match="last checkpoint of the run was not written.*nothing has been saved"):
            manager.finish()


def test_space_is_looked_at_first(tmp_path: Path, monkeypatch, lines: list[str]) -> None:
    state = State()
    manager = manager_of(state, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    manager.start(SavedProgress(1))
    assert "0.00 GB free and the checkpoint needs 0.02 GB; free disk space" in lines[0]
    assert os.listdir(tmp_path) == []


def test_files_beside_the_tensors_are_part_of_a_checkpoint(tmp_path: Path, lines: list[str]) -> None:
    """Written once the tensors can be read, recorded in the manifest; an error in it is an error of the save."""
    state, full = State(), []

    def complete(checkpoint: Path) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoint / "adapter"))
        (checkpoint / "adapter").mkdir()
        torch.save(CheckpointReader(checkpoint).read("model.a"), checkpoint / "adapter" / "a.pt")

    manager = manager_of(state, tmp_path, complete=complete, complete_bytes=1000)
    manager.start(SavedProgress(1))
    first = tmp_path / "iter_0000001"
    assert torch.equal(torch.load(first / "adapter/a.pt"), state.tensors["model.a"])
    assert "adapter/a.pt" in directory.verify_directory(first)["files"]
    full.append(True)
    manager.start(SavedProgress(2))
    assert manager.failures == 1 and directory.read_tracker(tmp_path) == 1 and not (tmp_path / "iter_0000002").exists()
    assert "could not be written: No space left on device" in lines[-1]
    full.clear()
    manager.start(SavedProgress(3))
    assert manager.failures == 0 and (tmp_path / "iter_0000003/adapter/a.pt").is_file()


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save .*cannot be written"):
        manager_of(State(), tmp_path / "file" / "save")


def test_left_overs_are_cleaned(tmp_path: Path, lines: list[str]) -> None:
    state = State()
    for iteration in (1, 2):
        manager_of(state, tmp_path).start(SavedProgress(iteration))
    good = state.everything()
    (tmp_path / "iter_0000002").rename(tmp_path / ".iter_0000002.replaced")  # killed between two renames
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000002.partial")
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000001.replaced")
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000000.deleted")
    (tmp_path / f".{directory.TRACKER}.tmp").write_text("9")
    (tmp_path / ".release.partial").mkdir()  # mm-convert's
    lines.clear()
    assert_same(stored(directory.resolve_checkpoint(tmp_path)), good)  # found where it is, for a read-only source
    manager_of(state, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".release.partial", "iter_0000001", "iter_0000002", directory.TRACKER]
    assert directory.resolve_checkpoint(tmp_path) == tmp_path / "iter_0000002"
    assert len(lines) == 4 and any("restored iter_0000002" in line for line in lines)


def test_shutdown_ends_the_threads_of_the_saves_group(tmp_path: Path) -> None:
    """Or one of them may want to release a tensor while Python ends, which aborts a run that was finished."""
    code = (
        "import os, pathlib, sys\n"
        "from tests.ut.checkpoint.test_manager import SavedProgress, State, manager_of\n"
        "from mindspeed_mm.backend.device import select_backend\n"
        "from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed\n"
        "init_distributed(select_backend('cpu'), timeout_minutes=1)\n"
        "manager = manager_of(State(), pathlib.Path(sys.argv[1]))\n"
        "manager.start(SavedProgress(1))\n"
        "manager.finish()\n"
        "shutdown_distributed()\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3], check=True, capture_output=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.stdout == "1\n"


def test_a_removed_directory_is_made_again(tmp_path: Path, lines: list[str]) -> None:
    """Else the rest of a run would be lost because its first part was removed."""
    state, root = State(), tmp_path / "save"
    manager = manager_of(state, root)
    manager.start(SavedProgress(5))
    shutil.rmtree(root)
    manager.start(SavedProgress(6))
    manager.finish()
    assert_same(stored(directory.resolve_checkpoint(root)), state.everything())
    assert any(f"--save {root} was removed during training and is recreated" in line for line in lines)
