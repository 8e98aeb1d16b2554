"""Reading a partial checkpoint together with its base, for conversion and verification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from mindspeed_mm.checkpoint.dcp_format import MODEL_PREFIX
from mindspeed_mm.checkpoint.dcp_reader import DcpReader, Rows
from mindspeed_mm.checkpoint.directory import verify_directory
from mindspeed_mm.checkpoint.hf import HFSource
from mindspeed_mm.checkpoint.partial import find_base


def open_reader(checkpoint: Path, manifest: Mapping[str, Any], *, base_dir: str | Path | None) -> DcpReader:
    """The tensors of a checkpoint, and for a partial one those of its base.

    Args:
        checkpoint: its directory.
        manifest: its manifest.
        base_dir: where the base is now; None for where it was.

    Raises:
        UserError: if the checkpoint or its base is damaged, or the base is missing or another one.
    """
    reader = DcpReader(checkpoint, manifest)
    moved_to = None if base_dir is None else str(base_dir)
    base = find_base(manifest, checkpoint, moved_to=moved_to, option="--base_dir")
    if base is None:
        return reader
    if base.kind == "huggingface":
        return _PartialReader(reader, _HFReader(HFSource(base.path)))
    return _PartialReader(reader, DcpReader(Path(base.path), verify_directory(base.path)))


class _HFReader:
    """Parameters of a Hugging Face directory by their names in a checkpoint; as far as needed, a ``DcpReader``."""

    def __init__(self, source: HFSource) -> None:
        self._source = source
        self._rules = {MODEL_PREFIX + rule.target: rule for rule in source.rules}
        self.tensors = {name: (rule.target_shape, source.dtype_of(rule)) for name, rule in self._rules.items()}
        self.files_with_chunk_checksums: set[str] = set()

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A parameter, or rows [a, b) of it."""
        rule = self._rules[name]
        if rule.row_wise:
            return rule.to_mcore([self._source.read(rule.sources[0][0], rows)[0]])
        whole = rule.to_mcore([self._source.read(source)[0] for source, _ in rule.sources])
        return whole if rows is None else whole[rows[0] : rows[1]]

    def chunks(self, name: str) -> list[tuple[ChunkStorageMetadata, Any]]:
        """The whole parameter, in a file without checksums of chunks."""
        shape = self.tensors[name][0]
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
        return [(chunk, SimpleNamespace(relative_path=f"{name} of the base", offset=0, length=math.prod(shape)))]


class _PartialReader(DcpReader):
    """A reader that takes from the base what the checkpoint does not hold."""

    def __init__(self, own: DcpReader, base: DcpReader | _HFReader) -> None:
        self._own, self._base, self.path = own, base, own.path
        parameters = {name: entry for name, entry in base.tensors.items() if name.startswith(MODEL_PREFIX)}
        self.tensors = {**parameters, **own.tensors}
        self.files_with_chunk_checksums = own.files_with_chunk_checksums | base.files_with_chunk_checksums

    def _of(self, name: str) -> Any:
        return self._own if name in self._own.tensors else self._base

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """See ``DcpReader``."""
        return self._of(name).read(name, rows)

    def chunks(self, name: str) -> list[tuple[ChunkStorageMetadata, Any]]:
        """See ``DcpReader``."""
        return self._of(name).chunks(name)

    def read_chunk(self, name: str, chunk: ChunkStorageMetadata, *, check: bool) -> Tensor:
        """See ``DcpReader``."""
        return self._of(name).read_chunk(name, chunk, check=check)
