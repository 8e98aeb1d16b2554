"""An interrupted conversion keeps what it has written, after looking at it again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint import conversion, directory, safetensors_io, storage
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.errors import UserError
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # mm-convert would show it


class Converter:
    """One of the two directions, with one worker and small files, and a disk that fills up."""

    def __init__(self, root: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._command, self._patch = root, command, monkeypatch
        monkeypatch.setattr(safetensors_io, "READ_BYTES", 2000)
        monkeypatch.setattr(storage, "FILE_BYTES", 20_000)
        write_hf_directory(root / "hf", random_config(random.Random(1), moe=True), layout="v5")
        if command == "dcp_to_hf":
            hf_to_dcp(root / "hf", root / "dcp")

    def target(self, name: str = "result") -> Path:
        path = self._root / name
        return path / "release" if self._command == "hf_to_dcp" else path

    def run(self, name: str = "result") -> Path:
        if self._command == "hf_to_dcp":
            hf_to_dcp(self._root / "hf", self._root / name, workers=1)
        else:
            dcp_to_hf(self._root / "dcp", self._root / name, self._root / "hf", workers=1, max_shard_size=20_000)
        return self.target(name)

    def run_until_full(self, nbytes: int) -> dict[str, int]:
        """Fail after ``nbytes``; returns the times of the finished files by name."""

        def fail() -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match="is full; finished files are kept: free disk space"):
            self.run_until(nbytes, fail)
        return self.finished()

    def run_until(self, nbytes: int, action: Callable[[], None]) -> None:
        """Run, with an action once when ``nbytes`` are written."""
        written = 0
        advance = conversion.ProgressBar.advance

        def limited(progress: conversion.ProgressBar, count: int) -> None:
            nonlocal written
            written += count
            if written - count <= nbytes < written:
                action()
            advance(progress, count)

        with self._patch.context() as patch:
            patch.setattr(conversion.ProgressBar, "advance", limited)
            self.run()

    def finished(self) -> dict[str, int]:
        """The times of the finished files of an interrupted run, by name."""
        assert not self.target().exists()
        partial = directory.partial_name(self.target())
        names = [path.name.removesuffix(".json") for path in (partial / directory.FINISHED).glob("*.*.json")]
        return {name: (partial / name).stat().st_mtime_ns for name in names}

    def same(self) -> bool:
        """Whether the result has the bytes of one that was never interrupted."""
        once, target = self.run("once"), self.target()
        assert {path.name for path in once.iterdir()} == {path.name for path in target.iterdir()}
        assert not list(target.parent.glob(f".{target.name}.*"))
        return all(path.read_bytes() == (target / path.name).read_bytes() for path in once.iterdir())


@pytest.fixture(params=["hf_to_dcp", "dcp_to_hf"])
def converter(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    return Converter(tmp_path, request.param, monkeypatch)


def test_finished_files_are_kept(converter: Converter, capsys: pytest.CaptureFixture[str]) -> None:
    finished = converter.run_until_full(70_000)
    assert finished
    target = converter.run()
    assert f"resuming: {len(finished)} file" in capsys.readouterr().out
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished
    assert converter.same()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("nbytes", [1000, 70_000])
def test_interrupted_by_a_signal(converter: Converter, number: int, raised: type[BaseException], nbytes: int) -> None:
    """Ctrl-C and kill leave finished files, or nothing."""

    def interrupt() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.5)  # the main thread handles it meanwhile

    with pytest.raises(raised):
        converter.run_until(nbytes, interrupt)
    left = list(converter.target().parent.glob(".*"))
    assert bool(converter.finished()) == (nbytes > 1000)
    assert left == ([directory.partial_name(converter.target())] if nbytes > 1000 else [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    converter.run()
    assert converter.same()


def test_a_finished_file_that_changed_is_written_again(converter: Converter) -> None:
    finished = converter.run_until_full(70_000)
    path = directory.partial_name(converter.target()) / sorted(finished)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    converter.run()
    assert converter.same()


def test_another_plan_starts_afresh(converter: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converter.run_until_full(70_000)
    exports = (tmp_path / "dcp").exists()
    touched = "dcp/release/manifest.json" if exports else "hf/model-00001-of-00003.safetensors"
    path = tmp_path / touched
    path.write_bytes(path.read_bytes())  # another time of change: it could be another file
    converter.run()
    assert "resuming" not in capsys.readouterr().out
    assert converter.same()
