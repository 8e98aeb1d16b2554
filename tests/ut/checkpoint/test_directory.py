"""Checkpoint directories: atomic, complete or refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint import directory as d
from mindspeed_mm.checkpoint.files import combine, crc32, file_checksum, format_checksum
from mindspeed_mm.errors import UserError
from tests.helpers.checkpoint_directory import commit_directory


def _write(root: Path, name: str = "iter_0000010", content: bytes = b"payload", **options) -> Path:
    with commit_directory(root / name, {"iteration": 10}, **options) as partial:
        (partial / "__0_0.distcp").write_bytes(content)
        (partial / ".metadata").write_bytes(b"meta")
        (partial / "rng").mkdir(exist_ok=True)
        (partial / "rng" / "0.bin").write_bytes(b"x" * 100)
    return root / name


def test_commit_and_verify(tmp_path: Path) -> None:
    path = _write(tmp_path)
    manifest = d.verify_directory(path, checksums=True)
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata", "rng/0.bin"}
    assert manifest["metadata"] == {"iteration": 10}
    assert not d.partial_name(path).exists()


def test_existing_target_needs_overwrite(tmp_path: Path) -> None:
    path = _write(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        _write(tmp_path, content=b"new")
    assert (path / "__0_0.distcp").read_bytes() == b"payload"
    _write(tmp_path, content=b"new", overwrite=True)
    assert (path / "__0_0.distcp").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_old_checkpoint_stays_while_the_new_one_is_written(tmp_path: Path) -> None:
    path = _write(tmp_path)
    d.AtomicDirectory(path, overwrite=True).prepare()
    d.verify_directory(path, checksums=True)


def _leave_file(directory: d.AtomicDirectory, name: str = "left") -> d.WrittenFile:
    (directory.partial / name).write_bytes(b"1")
    return d.WrittenFile(1, file_checksum(directory.partial / name), chunks=[["a", [0], 0, 0, 1, "crc32:00000000"]])


def test_prepare_drops_what_was_left(tmp_path: Path) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    directory.prepare()
    _leave_file(directory)
    assert not (directory.prepare() / "left").exists()


def test_resume_keeps_recorded_files_of_the_same_plan(tmp_path: Path) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    assert directory.resume("plan") == {}
    left = directory.record("left", _leave_file(directory))
    _leave_file(directory, "not recorded")
    assert directory.resume("plan") == {"left": left} and left.chunks[0][:2] == ["a", [0]]
    assert {path.name for path in directory.partial.iterdir()} == {"left", d.FINISHED}
    assert directory.resume("another plan") == {}
    assert not (directory.partial / "left").exists()


@pytest.mark.parametrize("content", [b"", b"2", b"12"])
def test_resume_drops_files_that_differ_from_their_record(tmp_path: Path, content: bytes) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    directory.resume("plan")
    directory.record("left", _leave_file(directory))
    directory.record("intact", _leave_file(directory, "intact"))
    (directory.partial / "left").write_bytes(content)
    assert list(directory.resume("plan")) == ["intact"]
    assert not (directory.partial / "left").exists()


def test_error_leaves_only_what_can_be_resumed(tmp_path: Path) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    directory.resume("plan")
    directory.abandon()
    assert not directory.partial.exists()
    directory.resume("plan")
    left = directory.record("left", _leave_file(directory))
    directory.abandon()
    assert directory.resume("plan") == {"left": left}


def test_committed_is_known_until_it_is_cleaned_up(tmp_path: Path) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    directory.resume("plan")
    written = {"left": directory.record("left", _leave_file(directory))}
    assert not directory.is_committed("plan")
    directory.commit({}, written)
    assert directory.is_committed("plan") and not directory.is_committed("another plan")
    directory.clean_up()
    assert not directory.is_committed("plan")
    assert sorted(path.name for path in directory.target.iterdir()) == ["left", d.MANIFEST]
    assert d.verify_directory(directory.target, checksums=True)["files"].keys() == {"left"}


def test_known_checksums_are_taken(tmp_path: Path) -> None:
    directory = d.AtomicDirectory(tmp_path / "release")
    partial = directory.prepare()
    (partial / "a").write_bytes(b"a")
    (partial / "b").write_bytes(b"b")
    directory.commit({}, {"a": d.WrittenFile(1, file_checksum(partial / "a"))})
    d.verify_directory(tmp_path / "release", checksums=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "not a complete checkpoint"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json, line 1, column 2 is not valid JSON"),
        (lambda p: (p / "manifest.json").write_text("[]"), "holds a list; it must hold an object"),
        (lambda p: (p / "manifest.json").write_text('{"files": {}, "format": 99}'), "format 99"),
        (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda p: (p / "__0_0.distcp").write_bytes(b"payl"), "has 4 bytes instead of 7"),
        (lambda p: (p / "__0_0.distcp").write_bytes(b"pAyload"), "another checksum"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil, message: str) -> None:
    path = _write(tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=message):
        d.verify_directory(path, checksums=True)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        d.verify_directory(tmp_path / "nothing")


def test_tracker(tmp_path: Path) -> None:
    assert d.read_tracker(tmp_path) is None
    for value in ("release", 10):
        d.write_tracker(tmp_path, value)
        assert d.read_tracker(tmp_path) == value
    assert (tmp_path / d.TRACKER).read_text() == "10"
    assert d.iteration_name(10) == "iter_0000010"
    (tmp_path / d.TRACKER).write_text("latest")
    with pytest.raises(UserError, match="'latest'"):
        d.read_tracker(tmp_path)


def test_resolve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2"):
        d.resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="step 2"):
        d.resolve_checkpoint(tmp_path)
    d.write_tracker(tmp_path, 10)
    with pytest.raises(UserError, match="iter_0000010"):
        d.resolve_checkpoint(tmp_path)
    path = _write(tmp_path)
    assert d.resolve_checkpoint(tmp_path) == path


def test_checksums_combine() -> None:
    rng = random.Random(0)
    for _ in range(50):
        data = rng.randbytes(rng.randrange(0, 5000))
        cut = rng.randrange(0, len(data) + 1)
        first, second = zlib.crc32(data[:cut]), zlib.crc32(data[cut:])
        assert combine(first, second, len(data) - cut) == zlib.crc32(data)


def test_file_checksum(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "f").write_bytes(data)
    assert file_checksum(tmp_path / "f") == format_checksum(zlib.crc32(data))


def test_checksums_are_those_of_zlib() -> None:
    rng = random.Random(1)
    for length in (0, 1, 15, 64, 1000, 100_001):
        data, start = rng.randbytes(length), rng.getrandbits(32)
        assert crc32(memoryview(data), start) == zlib.crc32(data, start)


def test_zlib_serves_where_isal_is_missing() -> None:
    code = (
        "import sys, zlib; sys.modules['isal'] = None\n"
        "from mindspeed_mm.checkpoint import files; assert files.crc32 is zlib.crc32"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_no_torch() -> None:
    code = "import sys, mindspeed_mm.checkpoint.directory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the rename leaves no checkpoint, whatever was written."""
    monkeypatch.setattr(d.os, "rename", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        _write(tmp_path)
    partial = d.partial_name(tmp_path / "iter_0000010")
    assert not (tmp_path / "iter_0000010").exists()
    assert json.loads((partial / d.MANIFEST).read_text())["metadata"] == {"iteration": 10}
