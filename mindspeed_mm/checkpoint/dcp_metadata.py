"""``.metadata``, from which PyTorch's distributed checkpoints are read: which piece of which tensor lies where.

The format is a pickle, and unpickling can run any code that the file asks for. Here only the few record types of the
format are admitted, so that a checkpoint from anywhere can be opened: it is data, whatever it says.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the record type of the format itself
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mindspeed_mm.checkpoint.files import new_file
from mindspeed_mm.errors import UserError

METADATA = ".metadata"


@dataclasses.dataclass(frozen=True)
class StoredItem:
    """A piece of a tensor in a file.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        whole: shape of the tensor.
        offsets: where the piece begins on each axis.
        shape: of the piece.
        file: relative to the checkpoint's directory.
        offset, length: which bytes of the file.
        checksum: of these bytes, as in a manifest.
    """

    name: str
    dtype: torch.dtype
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    checksum: str = ""


def write_metadata(path: Path, items: Iterable[StoredItem]) -> None:
    """Write the file for these pieces and flush it to disk."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for item in items:
        entry = tensors.setdefault(
            item.name, TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(item.whole), [])
        )
        offsets = torch.Size(item.offsets)
        storage[MetadataIndex(item.name, offsets, len(entry.chunks))] = _StorageInfo(
            item.file, item.offset, item.length
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.shape)))
    # The default planner records how a nested state dict was flattened; ours is flat.
    metadata = Metadata(tensors, planner_data={name: (name,) for name in tensors}, storage_data=storage)
    with new_file(path) as file:
        file.write(pickle.dumps(metadata, protocol=4))


def read_metadata(path: Path) -> Metadata:
    """Read the file; nothing that it names is run.

    Raises:
        UserError: if it is missing, damaged, or holds anything but the records of the format.
    """
    try:
        content = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}, so it is no distributed checkpoint") from error
    except _Foreign as error:
        raise UserError(
            f"{path} asks for {error}, which is no part of a checkpoint; it was not run. Do not trust this checkpoint: "
            "take it from its source again"
        ) from error
    except Exception as error:  # unpickling damaged bytes raises almost anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({reason}); restore it or make the checkpoint again") from error
    if not isinstance(content, Metadata) or not isinstance(content.state_dict_metadata, dict):
        raise UserError(f"{path} holds no description of a checkpoint; make the checkpoint again")
    return content


class _Foreign(pickle.UnpicklingError):
    """Something is asked for that the format does not have."""


_RECORDS = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    **{
        (records.__name__, name): getattr(records, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the records of the format and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return _joined  # the place that it was written to, which nobody reads
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        try:
            return _RECORDS[module, name]
        except KeyError:
            raise _Foreign(f"{module}.{name}") from None


def _joined(*parts: str) -> str:
    return "/".join(map(str, parts))
