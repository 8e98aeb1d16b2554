"""What one process does for all in a save: make room, make the directory, and turn the parts into a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint import directory, retention
from mindspeed_mm.checkpoint.dcp_metadata import METADATA, StoredItem, write_metadata
from mindspeed_mm.checkpoint.files import new_file, remove
from mindspeed_mm.checkpoint.shard_writer import read_shard
from mindspeed_mm.errors import UserError

PROGRESS_FILE = "progress.json"
_OVERHEAD = 0.01  # of archives, metadata and manifest, as a share of the values
_SPARE_BYTES = 16 << 20


def prepare(target: Path, *, nbytes: int) -> Path:
    """Clean up after an earlier save, see that there is room, and make the directory to write into.

    Args:
        target: place of the checkpoint.
        nbytes: of the values of all processes.

    Raises:
        UserError: if the disk has less room than is needed.
        OSError: if the directory cannot be made.
    """
    retention.clean(target.parent)
    needed = int(nbytes * (1 + _OVERHEAD)) + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"{target.parent} has {gigabytes(free)} free and the checkpoint needs {gigabytes(needed)}; make room, "
            "or let --keep-last delete old checkpoints"
        )
    return directory.prepare_directory(target, overwrite=True)


def commit(
    partial: Path,
    target: Path,
    *,
    names: Sequence[str],
    shards: Sequence[Mapping[str, Any]],
    progress: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Make a checkpoint of the parts that all processes have written, and point the tracker to it.

    Args:
        partial: what ``prepare`` returned.
        target: place of the checkpoint.
        names: of all tensors that there must be.
        shards: what ``Shard.to_json`` says of every file.
        progress: where the run stands.
        metadata: facts for the manifest.

    Raises:
        UserError: if a part is missing.
        OSError: if writing failed; then the tracker points to the checkpoint that it pointed to before.
    """
    written: dict[str, directory.WrittenFile] = {}
    items: list[StoredItem] = []
    for shard in shards:
        written[shard["name"]], parts = read_shard(shard)
        items += parts
    _check_complete(items, names)
    write_metadata(partial / METADATA, items)
    with new_file(partial / PROGRESS_FILE) as file:
        file.write(json.dumps(dict(progress), indent=1).encode())
    directory.finish_directory(partial, target, metadata, overwrite=True, written=written)
    directory.write_tracker(target.parent, progress["iteration"])


def abandon(partial: Path) -> None:
    """Remove what was written for a checkpoint that will not be; nobody may be writing there any more."""
    remove(partial)


def gigabytes(count: float) -> str:
    """12345678901 -> ``12.35 GB``."""
    return f"{count / 1e9:.2f} GB"


def _check_complete(items: Sequence[StoredItem], names: Sequence[str]) -> None:
    """Every element of every tensor is stored once; anything else is a mistake of this program."""
    places: dict[str, dict[tuple[int, ...], StoredItem]] = {}
    for item in items:
        of_tensor = places.setdefault(item.name, {})
        if item.offsets in of_tensor:
            raise AssertionError(f"{item.name} at {item.offsets} was written twice")
        of_tensor[item.offsets] = item
    if missing := set(names) - places.keys():
        raise AssertionError(f"{min(missing)} was not written")
    for name, of_tensor in places.items():
        whole = math.prod(next(iter(of_tensor.values())).whole)
        stored = sum(math.prod(item.shape) for item in of_tensor.values())
        if stored != whole:
            raise AssertionError(f"{stored} of {whole} elements of {name} were written")
