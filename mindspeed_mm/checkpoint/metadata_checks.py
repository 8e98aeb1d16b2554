"""Checks of what ``.metadata`` holds: a pickle of records whose fields may have any values.

Every element of every tensor must be in one stored chunk, no more and no less: torch fills what the chunks describe and
leaves the rest of a tensor as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from mindspeed_mm.checkpoint.directory import is_count, is_shape
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import inside, shorten

_REMEDY = "make the checkpoint again"


def check_tensor(file: Path, name: Any, entry: TensorStorageMetadata, storage_data: Mapping[Any, Any]) -> None:
    """Refuse a tensor that is not stored exactly once, or whose records have values of other types or ranges.

    Args:
        file: ``.metadata``, for messages.
        name: of the tensor.
        entry: its record.
        storage_data: where its chunks are.

    Raises:
        UserError: saying what is wrong.
    """
    where = f"{file}: {shorten(name)}"
    if not isinstance(name, str):
        raise UserError(f"{where} is not the name of a tensor; {_REMEDY}")
    if not is_shape(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
        raise UserError(f"{where} has shape {shorten(entry.size, 80)} and type {shorten(entry.properties.dtype, 40)}, "
                        f"which no tensor has; {_REMEDY}")
    for chunk in entry.chunks:
        _check_chunk(where, entry.size, chunk)
        info = storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise UserError(f"{file} does not say where {shorten(name)} is; {_REMEDY}")
        inside(file, info.relative_path)  # for the message: the name is one of the file's
        path = file.parent / info.relative_path
        if path.name != info.relative_path:
            raise UserError(f"{where} is in {shorten(info.relative_path)}, not a file in the directory; {_REMEDY}")
        if not is_count(info.offset) or not is_count(info.length):
            raise UserError(f"{where} is at byte {shorten(info.offset, 40)} of {path.name} with "
                            f"{shorten(info.length, 40)} bytes; both must be whole numbers from 0; {_REMEDY}")
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{path}: {shorten(name)} is stored compressed or transformed, which is not supported")
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
        raise UserError(f"{file.parent}: {shorten(name)} is not completely stored; load another checkpoint")
    if _overlap(entry.chunks):
        raise UserError(f"{where} has chunks that overlap, so another part of it is not stored; {_REMEDY}")


def _check_chunk(where: str, size: Sequence[int], chunk: ChunkStorageMetadata) -> None:
    offsets, sizes = chunk.offsets, chunk.sizes
    fits = (
        isinstance(offsets, torch.Size) and is_shape(sizes) and all(map(is_count, offsets))
        and len(offsets) == len(sizes) == len(size)
        and all(first + count <= extent for first, count, extent in zip(offsets, sizes, size, strict=True))
    )
    if not fits:
        raise UserError(f"{where} has shape {list(size)}, and a chunk {shorten(sizes, 80)} at {shorten(offsets, 80)} "
                        f"is not within it; {_REMEDY}")


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether any two chunks share an element."""
    boxes = sorted(
        [(first, first + count) for first, count in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks if 0 not in chunk.sizes
    )
    if boxes and not boxes[0]:
        return len(boxes) > 1  # scalars
    open_boxes: list[list[tuple[int, int]]] = []  # those that reach the first row of the next
    for box in boxes:
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        for other in open_boxes:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return True
        open_boxes.append(box)
    return False
