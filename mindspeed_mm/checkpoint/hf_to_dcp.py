"""Hugging Face directory -> distributed checkpoint: streaming, atomic, resumable.

torch's own writer needs the whole state dict in memory; here chunks are made on demand and written file by file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.conversion import (
    ByteBudget,
    ProgressBar,
    ResumeLog,
    check_disk_space,
    default_workers,
    format_bytes,
    run_parallel,
    writing,
)
from mindspeed_mm.checkpoint.dcp_format import MODEL_PREFIX, StoredChunk, archive_frame, can_frame, write_metadata
from mindspeed_mm.checkpoint.directory import (
    METADATA,
    RELEASE,
    WrittenFile,
    check_huggingface,
    finish_directory,
    prepare_directory,
    write_tracker,
)
from mindspeed_mm.checkpoint.files import WRITE_BYTES, combine, crc32, format_checksum
from mindspeed_mm.checkpoint.hf import HFSource, ReadRange, config_dtype
from mindspeed_mm.checkpoint.safetensors_io import split_rows, tensor_bytes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.state_dict import WeightRule

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
_SPARE_BYTES = 16 << 20  # for metadata and manifest
_RECORDS_VERSION = 2
"""Increases with the format of the resume log's records, so that those of an older version are not used."""


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
    source = HFSource(hf_dir, expert_layout=expert_layout)
    _check_types(source, dtype)
    if tie_weight and not source.model_config.tie_word_embeddings:
        raise UserError(
            f"--tie_weight was given, but {source.directory / 'config.json'} has tie_word_embeddings false; "
            "leave the option out, or correct the config"
        )
    root, target = Path(dcp_dir), Path(dcp_dir) / RELEASE
    files = plan_files(source, DTYPES[dtype])
    version = source.fingerprint()
    resume_log = ResumeLog(target, _fingerprint(version, source, files))
    if root.exists() and not root.is_dir():
        raise UserError(f"--dcp_dir {root} is a file; name a directory")
    if resume_log.is_done():
        return _point_to(root, target, resume_log)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it, or name another --dcp_dir")
    with writing(target), resume_log.locked():
        partial = prepare_directory(target, overwrite=overwrite, resume=True)
        records = {name: FileRecord.from_json(record) for name, record in resume_log.resume().items()}
        duplicate_reads = source.check_duplicates()
        _write_files(partial, files, source, records, resume_log, workers or default_workers())
        if source.fingerprint() != version:
            raise UserError(f"files of {hf_dir} were changed while they were read; run the same command again")
        write_metadata(partial / METADATA, stored_chunks(files, records))
        reads = [read for record in records.values() for read in record.reads] + duplicate_reads
        finish_directory(
            partial,
            target,
            {
                "kind": "converted",
                "plan": resume_log.plan,
                "weight_map_version": source.spec.weight_map_version,
                "expert_layout": "hub",
                "dtype": dtype,
                "transformers_version": _installed_transformers(),
                "source": {
                    "expert_layout": source.layout,
                    "transformers_version": source.transformers_version(),
                    "files": source.file_facts(reads),
                },
                "model_config": dataclasses.asdict(source.model_config),
                "tensors": tensor_facts(files, records),
            },
            overwrite=overwrite,
            written={name: record.written for name, record in records.items()},
        )
        return _point_to(root, target, resume_log)


def _write_files(
    partial: Path,
    files: dict[str, list[PlannedChunk]],
    source: HFSource,
    records: dict[str, FileRecord],
    resume_log: ResumeLog,
    workers: int,
) -> None:
    """Write the files without a record, and add theirs to ``records``."""
    missing = [name for name in files if name not in records]
    total = sum(chunk.nbytes for name in missing for chunk in files[name])
    check_disk_space(partial.parent, total + _SPARE_BYTES, replaces=(partial.parent / RELEASE).exists())
    if records:
        kept = sum(record.size for record in records.values())
        print(f"resuming: {len(records)} of {len(files)} files ({format_bytes(kept)}) are already written and verified")
    progress = ProgressBar("hf_to_dcp", total)
    budget = ByteBudget()

    def write(name: str) -> None:
        record = write_file(partial / name, files[name], source, budget=budget, progress=progress)
        resume_log.add(name, record.to_json())
        records[name] = record

    try:
        run_parallel([functools.partial(write, name) for name in missing], workers=workers, progress=progress)
    finally:
        progress.close()


def _point_to(root: Path, target: Path, resume_log: ResumeLog) -> Path:
    write_tracker(root, RELEASE)
    resume_log.remove()
    return target


def _check_types(source: HFSource, dtype: str) -> None:
    """Refuse to keep dtypes that differ from the one in ``config.json``."""
    named = config_dtype(source.directory)
    wrong = [name for name, tensor in source.tensors.items() if tensor.dtype != named]
    if dtype == "keep" and named is not None and wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{source.directory / 'config.json'} says {str(named).removeprefix('torch.')}, but another dtype is in "
            f"{names}; pass --dtype bf16 or fp32 to convert all, or correct config.json"
        )


def _fingerprint(version: list[list[Any]], source: HFSource, files: dict[str, list[PlannedChunk]]) -> str:
    """A digest that changes whenever the bytes of the result could."""
    chunks = [
        [name, [[p.rule.target, p.first, p.last, str(p.dtype)] for p in chunks]] for name, chunks in files.items()
    ]
    versions = [source.spec.weight_map_version, _RECORDS_VERSION, torch.__version__]
    facts: list[Any] = [version, source.layout, versions, chunks]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _installed_transformers() -> str:
    from importlib.metadata import version

    return version("transformers")


FILE_BYTES = 1 << 30
"""Maximum size of a file: the work that an interruption can cost, per worker."""


@dataclasses.dataclass(frozen=True)
class PlannedChunk:
    """Rows [first, last) of one mcore parameter, to be stored as one chunk."""

    rule: WeightRule
    first: int
    last: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chunk."""
        return (self.last - self.first, *self.rule.target_shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk's values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass
class ChunkRecord:
    """A chunk in a finished file: its byte range, the CRC-32 of its values, and the checksum of its bytes."""

    target: str
    first: int
    rows: int
    offset: int
    length: int
    crc: int
    checksum: str


@dataclasses.dataclass
class FileRecord:
    """Chunks of one finished file, and the source bytes that were read for it; an entry of the resume log."""

    size: int
    checksum: str
    chunks: list[ChunkRecord]
    reads: list[ReadRange]

    @property
    def written(self) -> WrittenFile:
        """For the manifest."""
        return WrittenFile(self.size, self.checksum, [(c.offset, c.length, c.checksum) for c in self.chunks])

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists."""
        content = dataclasses.asdict(self)
        content["items"] = content.pop("chunks")
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> FileRecord:
        """Inverse of ``to_json``."""
        chunks = [ChunkRecord(**chunk) for chunk in content["items"]]
        return cls(content["size"], content["checksum"], chunks, [ReadRange(**read) for read in content["reads"]])


def plan_files(source: HFSource, dtype: torch.dtype | None) -> dict[str, list[PlannedChunk]]:
    """Divide all parameters into chunks and the chunks into files, in the order of the weight map.

    Args:
        source: to convert.
        dtype: to store; None for each tensor's own.
    """
    files: list[list[PlannedChunk]] = [[]]
    nbytes = 0
    for rule in source.rules:
        stored = dtype or source.dtype_of(rule)
        rows = rule.target_shape[0]
        row_bytes = math.prod(rule.target_shape[1:]) * stored.itemsize
        for first, last in split_rows(rows, row_bytes) if rule.row_wise else [(0, rows)]:
            chunk = PlannedChunk(rule, first, last, stored)
            if nbytes and nbytes + chunk.nbytes > FILE_BYTES:
                files.append([])
                nbytes = 0
            files[-1].append(chunk)
            nbytes += chunk.nbytes
    return {f"__0_{number}.distcp": chunks for number, chunks in enumerate(files)}


def write_file(
    path: Path, chunks: Sequence[PlannedChunk], source: HFSource, *, budget: ByteBudget, progress: ProgressBar
) -> FileRecord:
    """Write one file of chunks, flush it to disk and return its record."""
    records: list[ChunkRecord] = []
    reads: list[ReadRange] = []
    with path.open("wb") as file:
        stream = _CountingStream(file, progress)
        for chunk in chunks:
            # Source, result, and a cast copy.
            with budget.take(3 * chunk.nbytes):
                offset = stream.position
                tensor, crc = _resolve(chunk, source, reads)
                checksum = format_checksum(stream.save(tensor, crc))
                del tensor
            length = stream.position - offset
            rows = chunk.last - chunk.first
            records.append(ChunkRecord(chunk.rule.target, chunk.first, rows, offset, length, crc, checksum))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(stream.position, format_checksum(stream.crc), records, reads)


def _resolve(chunk: PlannedChunk, source: HFSource, reads: list[ReadRange]) -> tuple[torch.Tensor, int]:
    """The values of a chunk and their checksum; appends the ranges that were read to ``reads``."""
    rows = (chunk.first, chunk.last) if chunk.rule.row_wise else None
    sources = [source.read(name, rows) for name, _ in chunk.rule.sources]
    reads.extend(read for _, read in sources)
    tensor = chunk.rule.to_mcore([values for values, _ in sources]).to(chunk.dtype)
    if chunk.rule.is_copy and chunk.dtype == sources[0][0].dtype:
        return tensor, sources[0][1].crc
    return tensor, crc32(tensor_bytes(tensor))


class _CountingStream:
    """A binary file that tracks its position and checksum and advances the progress bar."""

    def __init__(self, file: Any, progress: ProgressBar) -> None:
        self._file = file
        self._progress = progress
        self.position = 0
        self.crc = 0

    def save(self, tensor: torch.Tensor, crc: int) -> int:
        """Write a tensor as ``torch.save`` does; ``crc`` is that of its values. Returns the checksum of the archive."""
        before, start, self.crc = self.crc, self.position, 0
        if can_frame(tensor):
            head, tail = archive_frame(tensor, crc)
            self.write(head)
            self._write_buffer(tensor_bytes(tensor))
            self.crc = combine(self.crc, crc, tensor.nbytes)
            self.write(tail)
        else:
            torch.save(tensor, self)
        whole = self.crc
        self.crc = combine(before, whole, self.position - start)
        return whole

    def write(self, data: Any) -> int:
        """Write any buffer; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self.crc = crc32(view, self.crc)
        self._write_buffer(view)
        return len(view)

    def flush(self) -> None:
        """The file is flushed once, when it is complete."""

    def _write_buffer(self, view: memoryview) -> None:
        for start in range(0, len(view), WRITE_BYTES):
            written = self._file.write(view[start : start + WRITE_BYTES])
            self._progress.advance(written)
        self.position += len(view)


def stored_chunks(files: dict[str, list[PlannedChunk]], records: dict[str, FileRecord]) -> list[StoredChunk]:
    """All chunks, for ``.metadata``."""
    return [
        StoredChunk(
            name=MODEL_PREFIX + chunk.rule.target,
            dtype=chunk.dtype,
            global_shape=chunk.rule.target_shape,
            offsets=(chunk.first, *[0] * (len(chunk.shape) - 1)),
            shape=chunk.shape,
            file=file,
            offset=record.offset,
            length=record.length,
            checksum=record.checksum,
        )
        for file, chunks in files.items()
        for chunk, record in zip(chunks, records[file].chunks, strict=True)
    ]


def tensor_facts(files: dict[str, list[PlannedChunk]], records: dict[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """Shape, type and checksum of every parameter, for the manifest."""
    crcs: dict[str, int] = {}
    facts: dict[str, dict[str, Any]] = {}
    for file, chunks in files.items():
        for chunk, record in zip(chunks, records[file].chunks, strict=True):
            name = MODEL_PREFIX + chunk.rule.target
            # The chunks of a tensor are in order, so their checksums combine to that of the tensor.
            crcs[name] = combine(crcs[name], record.crc, chunk.nbytes) if name in crcs else record.crc
            facts[name] = {
                "shape": list(chunk.rule.target_shape),
                "dtype": str(chunk.dtype).removeprefix("torch."),
                "checksum": format_checksum(crcs[name]),
            }
    return facts
