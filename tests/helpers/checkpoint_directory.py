"""Checkpoint directories written by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import AtomicDirectory


@contextlib.contextmanager
def commit_directory(target: Path, metadata: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, committed to ``target`` when the block ends without an error."""
    directory = AtomicDirectory(target, overwrite=overwrite)
    yield directory.prepare()
    directory.commit(metadata)
