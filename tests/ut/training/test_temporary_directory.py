"""A temporary directory in which data workers could not open their sockets is refused before training."""

from __future__ import annotations

import multiprocessing.connection
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.preflight import check_temporary_directory


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("length", [75, 76])
def test_the_longest_that_serves(base: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    path = base / ("d" * (length - len(str(base)) - 1))
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    socket = Path(tempfile.mkdtemp(prefix="pymp-")) / "listener-12345678"  # as multiprocessing names it
    check_temporary_directory(num_workers=0)
    if length == 75:
        check_temporary_directory(num_workers=2)
        multiprocessing.connection.Listener(str(socket)).close()
        return
    with pytest.raises(OSError, match="too long"):
        multiprocessing.connection.Listener(str(socket))
    with pytest.raises(UserError, match=f"TMPDIR {path} has 76 characters.* may have 75; set TMPDIR"):
        check_temporary_directory(num_workers=2)
