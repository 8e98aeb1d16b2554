"""Checkpoint directories written by hand."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as records

from mindspeed_mm.checkpoint.directory import METADATA, AtomicDirectory
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.models.spec import spec_of


@contextlib.contextmanager
def commit_directory(target: Path, metadata: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, committed to ``target`` when the block ends without an error."""
    directory = AtomicDirectory(target, overwrite=overwrite)
    yield directory.prepare()
    directory.commit(metadata)


def write_metadata(directory: Path, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
    """``.metadata`` that lists tensors of these shapes, without saying where they are."""
    entries: dict[str, Any] = {
        name: records.TensorStorageMetadata(records.TensorProperties(dtype=dtype), torch.Size(shape), [])
        for name, shape in tensors.items()
    }
    (directory / METADATA).write_bytes(pickle.dumps(records.Metadata(entries, storage_data={})))


def parameter_shapes(hf_directory: Path) -> dict[str, tuple[int, ...]]:
    """All parameters of a model in a checkpoint, by the ``config.json`` of its Hugging Face directory."""
    spec = spec_of(hf_directory)
    rules = spec.weight_rules(spec.read_config(hf_directory), expert_layout="hub")
    return {MODEL_PREFIX + rule.target: rule.target_shape for rule in rules}
