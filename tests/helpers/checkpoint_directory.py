"""Checkpoint directories with any content, made by the same functions as real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import finish_directory, prepare_directory


@contextlib.contextmanager
def commit_directory(target: Path, metadata: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into; it becomes the checkpoint ``target`` at the end of the block."""
    partial = prepare_directory(target, overwrite=overwrite)
    yield partial
    finish_directory(partial, target, metadata, overwrite=overwrite)
