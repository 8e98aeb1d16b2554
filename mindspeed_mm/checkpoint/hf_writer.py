"""Writing safetensors files from the tensors of a checkpoint, each file in parts by several threads.

A file's header says where every tensor lies, so its parts can be made in any order. Files are written one after another
nevertheless: the fewer are open, the less an interruption costs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.checksum import combine, crc32, format_checksum
from mindspeed_mm.checkpoint.chunk_reader import StoredParameters
from mindspeed_mm.checkpoint.dcp_writer import PREFIX
from mindspeed_mm.checkpoint.executor import WRITE_BYTES, ByteBudget, Progress
from mindspeed_mm.checkpoint.files import FILE_MODE
from mindspeed_mm.checkpoint.hf_source import INDEX, LAYOUT_KEY, SINGLE
from mindspeed_mm.checkpoint.safetensors_io import build_header, tensor_bytes
from mindspeed_mm.models.state_dict import WeightRule

_WORKERS_PER_FILE = 4
"""Linux lets one thread at a time write to a file; the others read meanwhile."""


@dataclasses.dataclass(frozen=True)
class Output:
    """One rule as it will be written: all its Hugging Face tensors, in this type, one after another in one file."""

    rule: WeightRule
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return math.prod(self.rule.target_shape) * self.dtype.itemsize

    @property
    def row_elements(self) -> int:
        """Elements in one row of the parameter."""
        return math.prod(self.rule.target_shape[1:])


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows [first, last) of an output, to be written from byte ``position`` of its file; ``number`` within the file."""

    output: Output
    first: int
    last: int
    position: int
    number: int


@dataclasses.dataclass(frozen=True)
class _Checksum:
    """Checksum of ``length`` bytes that belong to the tensor ``name``."""

    name: str
    value: int
    length: int


def plan_files(outputs: Sequence[Output], max_shard_size: int) -> dict[str, list[Output]]:
    """Fill files in the order of the weight map; the tensors of one rule stay together.

    Args:
        outputs: all that is written.
        max_shard_size: bytes of tensors in one file, at most, unless those of one rule are more.
    """
    shards: list[list[Output]] = [[]]
    local_shard = 0
    for output in outputs:
        if local_shard and local_shard + output.nbytes > max_shard_size:
            shards.append([])
            local_shard = 0
        shards[-1].append(output)
        local_shard += output.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def write_index(directory: Path, files: Mapping[str, list[Output]]) -> None:
    """The index that names each tensor's file; a single file has none."""
    if list(files) == [SINGLE]:
        return
    weight_of = {
        name: file for file, outputs in files.items() for output in outputs for name, _ in output.rule.sources
    }
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_of.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n")


class ShardFile:
    """One file in the making, and what is known of its parts."""

    def __init__(self, path: Path, outputs: Sequence[Output], stored: StoredParameters) -> None:
        self.path = path
        self._entries = [(name, output.dtype, shape) for output in outputs for name, shape in output.rule.sources]
        self._header = build_header(self._entries, {"format": "pt", LAYOUT_KEY: "hub"})
        self.parts = list(_cut(outputs, len(self._header), stored))
        self._written: dict[int, list[_Checksum]] = {}
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(
        self, part: Part, tensors: Sequence[Tensor], checksums: list[_Checksum], progress: Progress
    ) -> bool:
        """Write the tensors of a part; returns whether it was the last one that was missing."""
        # Threads that wait for the file itself would spin; those that wait for the lock leave the core to others.
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
                os.pwrite(self._descriptor, self._header, 0)
            position = part.position
            for tensor in tensors:
                view = tensor_bytes(tensor)
                while len(view):
                    count = os.pwrite(self._descriptor, view[:WRITE_BYTES], position)
                    position, view = position + count, view[count:]
                    progress.advance(count)
            self._written[part.number] = checksums
            return len(self._written) == len(self.parts)

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk and return its record: size, checksum, and facts of its tensors."""
        tensors = _join(checksum for part in self.parts for checksum in self._written[part.number])
        crc, size = crc32(self._header), len(self._header)
        for value, length in tensors.values():
            crc, size = combine(crc, value, length), size + length
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self.close()
        facts = {
            name: {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "checksum": format_checksum(tensors[name][0]),
            }
            for name, dtype, shape in self._entries
        }
        return {"size": size, "checksum": format_checksum(crc), "tensors": facts}

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _cut(outputs: Sequence[Output], position: int, stored: StoredParameters) -> Iterator[Part]:
    """The parts of a file whose tensors begin at byte ``position``."""
    numbers = itertools.count()
    for output in outputs:
        rule = output.rule
        for first, last in stored.ranges(PREFIX + rule.target) if rule.row_wise else [(0, rule.target_shape[0])]:
            yield Part(output, first, last, position, next(numbers))
            position += (last - first) * output.row_elements * output.dtype.itemsize


def _join(checksums: Iterable[_Checksum]) -> dict[str, tuple[int, int]]:
    """Checksum and length of each whole tensor, from those of its successive parts."""
    joined: dict[str, tuple[int, int]] = {}
    for part in checksums:
        value, length = joined.get(part.name, (0, 0))
        joined[part.name] = (combine(value, part.value, part.length), length + part.length)
    return joined


class PartWriter:
    """Makes parts from a checkpoint and writes them; used by several threads."""

    def __init__(self, stored: StoredParameters, progress: Progress) -> None:
        self._stored = stored
        self._progress = progress
        self._budget = ByteBudget()

    def write(self, file: ShardFile, part: Part) -> bool:
        """Write one part; returns whether its file now has all of them."""
        output, rule, name = part.output, part.output.rule, PREFIX + part.output.rule.target
        # The stored rows, their joined pieces, and the result in its own order and type.
        with self._budget.take(3 * (part.last - part.first) * output.row_elements * output.stored.itemsize):
            stored = self._stored.read(name, (part.first, part.last))
            tensors = [tensor.to(output.dtype) for tensor in rule.to_hf(stored)]
            checksums = [
                _Checksum(source, crc32(tensor_bytes(tensor)), tensor.nbytes)
                for (source, _), tensor in zip(rule.sources, tensors, strict=True)
            ]
            return file.write(part, tensors, checksums, self._progress)


def order_parts(files: Sequence[ShardFile], workers: int) -> list[tuple[ShardFile, Part]]:
    """Parts in the order of writing: one file after another, or several at a time where there are many workers."""
    lanes = max(1, workers // _WORKERS_PER_FILE)
    parts: list[list[tuple[ShardFile, Part]]] = [
        [(file, part) for file in files[lane::lanes] for part in file.parts] for lane in range(lanes)
    ]
    return [item for group in itertools.zip_longest(*parts) for item in group if item is not None]
