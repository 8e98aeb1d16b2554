"""Hugging Face directory -> distributed checkpoint.

torch plans and writes; each chunk is read and converted when the writer wants it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from mindspeed_mm.checkpoint import storage
from mindspeed_mm.checkpoint.conversion import (
    DTYPES,
    ProgressBar,
    default_workers,
    digest,
    locked,
    remaining,
    resumable,
    writing,
)
from mindspeed_mm.checkpoint.directory import (
    MODEL_CONFIG_KEY,
    RELEASE,
    AtomicDirectory,
    WrittenFile,
    check_huggingface,
    write_tracker,
)
from mindspeed_mm.checkpoint.files import combine, crc32, format_checksum
from mindspeed_mm.checkpoint.huggingface import HFReader, ReadRange, config_dtype
from mindspeed_mm.checkpoint.safetensors_io import split_rows, tensor_bytes
from mindspeed_mm.checkpoint.save_directory import complete_iterations
from mindspeed_mm.checkpoint.shards import write_items
from mindspeed_mm.checkpoint.storage import CheckpointWriter, SavePlanner
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory


def hf_to_dcp(
    hf_dir: str | Path,
    dcp_dir: str | Path,
    *,
    expert_layout: str = "auto",
    dtype: str = "keep",
    workers: int | None = None,
    overwrite: bool = False,
    tie_weight: bool = False,
) -> Path:
    """Write ``dcp_dir/release`` and the tracker from a Hugging Face directory; returns the checkpoint's path.

    An interrupted conversion leaves no ``release``; the same command resumes it and keeps finished files.

    Args:
        hf_dir: with config.json and safetensors files.
        dcp_dir: created if needed.
        expert_layout: ``auto``, ``hub`` or ``v5``: expert layout of ``hf_dir``.
        dtype: ``keep``, ``bf16`` or ``fp32``.
        workers: threads; None for two for each core, 8 at most.
        overwrite: replace an existing ``release``.
        tie_weight: refuse a model whose embeddings are not tied.

    Raises:
        UserError: if the source is incomplete or inconsistent, or the target cannot be written.
    """
    check_huggingface(Path(hf_dir), "--hf_dir")
    reader = HFReader(hf_dir, expert_layout=expert_layout)
    _check_types(reader, dtype)
    if tie_weight and not reader.model_config.tie_word_embeddings:
        raise UserError(
            f"--tie_weight was given, but {reader.path / 'config.json'} has tie_word_embeddings false; "
            "leave the option out, or correct the config"
        )
    facts = {
        "weight_map_version": reader.spec.weight_map_version,
        "expert_layout": "hub",
        "source": {"expert_layout": reader.layout, "transformers_version": reader.transformers_version()},
        MODEL_CONFIG_KEY: dataclasses.asdict(reader.model_config),
    }
    return write_checkpoint(reader, dcp_dir, dtype=dtype, facts=facts, workers=workers, overwrite=overwrite)


def write_checkpoint(
    reader: Any,
    dcp_dir: str | Path,
    *,
    dtype: str,
    facts: Mapping[str, Any],
    workers: int | None,
    overwrite: bool,
    title: str = "hf_to_dcp",
) -> Path:
    """Write all parameters of a reader to ``dcp_dir/release``, and the tracker; returns the checkpoint's path.

    Args:
        reader: of the source; a ``SafetensorsReader``, or what has its attributes and methods.
        dcp_dir: created if needed.
        dtype: ``keep``, ``bf16`` or ``fp32``.
        facts: for the manifest.
        workers: threads; None for the default.
        overwrite: replace an existing ``release``.
        title: of the progress bar.
    """
    root, target = Path(dcp_dir), Path(dcp_dir) / RELEASE
    if root.exists() and not root.is_dir():
        raise UserError(f"--dcp_dir {root} is a file; name a directory")
    if os.path.realpath(root) == os.path.realpath(reader.path):  # Path.resolve raises for a loop of links
        raise UserError(f"--dcp_dir {root} is --hf_dir, which is read from; name another directory")
    if not overwrite and is_directory(root) and (iterations := complete_iterations(root)):
        raise UserError(
            f"--dcp_dir {root} has checkpoints of a training run, the last of iteration {iterations[-1]}, and its "
            "tracker file would no longer name that one; name another directory, or add --overwrite"
        )
    source = reader.fingerprint()
    tensors = {name: _ConvertedTensor(reader, name, DTYPES[dtype]) for name in reader.tensors}
    plan = digest([source, version("torch"), storage.FILE_BYTES, facts, [[*t.describe()] for t in tensors.values()]])
    directory = AtomicDirectory(target, overwrite=overwrite)
    unused: list[ReadRange] = []

    def commit(files: Mapping[str, WrittenFile]) -> None:
        reads = [ReadRange(*read) for file in files.values() for read in file.facts["reads"]] + unused
        if reader.fingerprint() != source:
            raise UserError(f"files of {reader.path} were changed while they were read; run the same command again")
        content = {
            "kind": "converted",
            "plan": plan,
            "dtype": dtype,
            "transformers_version": version("transformers"),
            **facts,
            "source": {**facts.get("source", {}), "files": reader.file_facts(reads)},
            "tensors": _tensor_facts(files, tensors),
        }
        directory.commit(content, files)

    committed = directory.is_committed(plan)
    if not committed:
        directory.check()
    with writing(target), locked(target):
        if not committed:
            with resumable(directory, plan) as finished:
                unused += reader.read_unused()  # first, as it may refuse the source
                _save(tensors, directory, finished, workers or default_workers(), commit, title)
        write_tracker(root, RELEASE)
    directory.clean_up()  # after the lock file is gone, so that the same command completes this after a kill
    return target


def _save(
    tensors: Mapping[str, _ConvertedTensor],
    directory: AtomicDirectory,
    finished: Mapping[str, WrittenFile],
    workers: int,
    commit: Callable[[Mapping[str, WrittenFile]], None],
    title: str,
) -> None:
    """Let torch write the tensors into the partial directory and commit it."""
    progress = ProgressBar(title)
    writer = CheckpointWriter(
        directory.partial,
        prepare=lambda nbytes: progress.begin(remaining(directory, nbytes, finished)),
        commit=commit,
        finished=finished,
        on_file=lambda name, file: directory.record(name, _with_facts(file, tensors)),
        advance=progress.advance,
        threads=workers,
        min_files=1,
    )
    with warnings.catch_warnings(), contextlib.closing(progress):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(dict(tensors), storage_writer=writer, planner=SavePlanner(), no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from None
        progress.print_totals()


class _ConvertedTensor:
    """A parameter that is read and converted chunk by chunk, while torch's writer writes it."""

    def __init__(self, reader: Any, name: str, dtype: torch.dtype | None) -> None:
        self._reader, self._name = reader, name
        self.shape, stored = reader.tensors[name]
        self.dtype = dtype if dtype is not None and stored.is_floating_point else stored
        self._keeps_bytes = self.dtype == stored
        rows = self.shape[0] if self.shape else 1
        self._rows = split_rows(rows, math.prod(self.shape[1:]) * self.dtype.itemsize)
        self.facts: dict[int, tuple[list[ReadRange], int]] = {}

    def describe(self) -> Iterator[Any]:
        """What determines its bytes in the checkpoint."""
        yield from (self._name, str(self.dtype), self.shape, self._rows)

    def chunk_bytes(self, first: int) -> int:
        """Bytes of the chunk that begins with row ``first``."""
        rows = next(last - start for start, last in self._rows if start == first)
        return rows * math.prod(self.shape[1:]) * self.dtype.itemsize

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        if not self.shape:
            return write_items(fqn, self.dtype, (), [ChunkStorageMetadata(torch.Size(()), torch.Size(()))])
        tail = self.shape[1:]
        chunks = [
            ChunkStorageMetadata(torch.Size((first, *[0] * len(tail))), torch.Size((last - first, *tail)))
            for first, last in self._rows
        ]
        return write_items(fqn, self.dtype, self.shape, chunks)

    def chunk(self, offsets: Sequence[int]) -> Tensor:
        """The values of the chunk that begins at ``offsets``."""
        first = offsets[0] if offsets else 0
        reads: list[ReadRange] = []
        values = self._reader.read(self._name, next(rows for rows in self._rows if rows[0] == first), reads)
        values = values.to(self.dtype)
        same = self._keeps_bytes and self._reader.is_copy(self._name)
        self.facts[first] = reads, reads[0].crc if same else crc32(tensor_bytes(values))
        return values


def _with_facts(file: WrittenFile, tensors: Mapping[str, _ConvertedTensor]) -> WrittenFile:
    """A file with what was read for it, and the checksum of the values of each chunk."""
    facts = [tensors[name].facts.pop(offsets[0] if offsets else 0) for name, offsets, *_ in file.chunks]
    reads = [dataclasses.astuple(read) for reads, _ in facts for read in reads]
    return dataclasses.replace(file, facts={"reads": reads, "values": [crc for _, crc in facts]})


def _tensor_facts(
    files: Mapping[str, WrittenFile], tensors: Mapping[str, _ConvertedTensor]
) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every parameter, whose chunks are in order."""
    crcs: dict[str, int] = {}
    for file in files.values():
        for (name, offsets, *_), crc in zip(file.chunks, file.facts["values"], strict=True):
            tensor = tensors[name]
            first = offsets[0] if offsets else 0
            crcs[name] = combine(crcs[name], crc, tensor.chunk_bytes(first)) if name in crcs else crc
    return {
        name: {
            "shape": list(tensors[name].shape),
            "dtype": str(tensors[name].dtype).removeprefix("torch."),
            "checksum": format_checksum(crc),
        }
        for name, crc in crcs.items()
    }


def _check_types(reader: HFReader, dtype: str) -> None:
    """Refuse to keep dtypes that differ from the one in ``config.json``."""
    named = config_dtype(reader.path)
    wrong = [name for name, tensor in reader.stored.items() if tensor.dtype != named]
    if dtype == "keep" and named is not None and wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{reader.path / 'config.json'} says {str(named).removeprefix('torch.')}, but another dtype is in "
            f"{names}; pass --dtype bf16 or fp32 to convert all, or correct config.json"
        )
