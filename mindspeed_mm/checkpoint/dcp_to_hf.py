"""Distributed checkpoint -> Hugging Face directory in the published layout: streaming, atomic, resumable.

The header of a safetensors file fixes where every tensor is, so its chunks can be written in any order by several
threads. Files are written one after another nevertheless: the fewer are open, the less an interruption costs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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

from mindspeed_mm.checkpoint.conversion import (
    ByteBudget,
    ProgressBar,
    ResumeLog,
    check_disk_space,
    counted,
    default_workers,
    format_bytes,
    run_parallel,
    writing,
)
from mindspeed_mm.checkpoint.dcp_format import MODEL_PREFIX
from mindspeed_mm.checkpoint.dcp_reader import ChunkReader, DcpReader
from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    METADATA,
    WrittenFile,
    check_huggingface,
    find_checkpoint,
    finish_directory,
    prepare_directory,
    verify_directory,
    verify_files,
)
from mindspeed_mm.checkpoint.files import FILE_MODE, WRITE_BYTES, combine, crc32, format_checksum
from mindspeed_mm.checkpoint.hf import (
    INDEX,
    LAYOUT_KEY,
    SINGLE,
    check_replaceable,
    config_dtype,
    copy_assets,
    layout_by_shapes,
)
from mindspeed_mm.checkpoint.partial_reader import open_reader
from mindspeed_mm.checkpoint.safetensors_io import build_header, listed, tensor_bytes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.models.state_dict import WeightRule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SPARE_BYTES = 64 << 20  # for tokenizer files and headers
_WORKERS_PER_FILE = 4
"""Linux lets one thread at a time write to a file; the other threads read meanwhile."""


def dcp_to_hf(
    load_dir: str | Path,
    save_dir: str | Path,
    model_assets_dir: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    workers: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    base_dir: str | Path | None = None,
) -> Path:
    """Write a directory that transformers loads, from a converted or a training checkpoint; returns its path.

    Only the model's parameters are read. Experts are always written in the published layout. An interrupted conversion
    leaves no ``save_dir``; the same command resumes it and keeps finished files.

    Args:
        load_dir: a checkpoint directory (``release``, ``iter_XXXXXXX``), or a directory with a tracker file.
        save_dir: must not exist, unless empty or ``overwrite``.
        model_assets_dir: Hugging Face directory that gives config, tokenizer and processor files.
        dtype: ``keep``, ``bf16``, ``fp32``, or ``auto``: a converted checkpoint keeps its types, a training
            checkpoint (fp32) is rounded to the type that the config names.
        max_shard_size: bytes of tensors in one file, at most, unless those of one parameter are more.
        workers: threads; None for two for each core, 8 at most.
        overwrite: replace ``save_dir``.
        check: compare the chunks that are read with the recorded checksums.
        base_dir: directory of a partial checkpoint's base, if it is not where it was.

    Raises:
        UserError: if the checkpoint is incomplete, damaged or of another model, or the target cannot be written.
    """
    load, save, assets = Path(load_dir), Path(save_dir), Path(model_assets_dir)
    checkpoint = find_checkpoint(load, "--load_dir")
    check_huggingface(assets, "--model_assets_dir")
    manifest = verify_directory(checkpoint)
    spec = spec_of(assets)
    model_config = spec.read_config(assets)
    reader = open_reader(checkpoint, manifest, base_dir=base_dir)
    rules = spec.weight_rules(model_config, expert_layout="hub")
    _check(reader, rules, assets)
    outputs = [_output(rule, reader, _target_dtype(dtype, manifest, assets)) for rule in rules]
    files = plan_files(outputs, max_shard_size)
    resume_log = ResumeLog(save, _fingerprint(checkpoint, files, spec.weight_map_version))
    if resume_log.is_done():
        resume_log.remove()
        return save
    check_replaceable(save, overwrite=overwrite, keep=(checkpoint, assets))
    chunk_reader = ChunkReader(reader, check=check)
    if check:
        _check_whole_files(chunk_reader, checkpoint, manifest, rules)
    with writing(save), resume_log.locked():
        # An empty target directory is replaced.
        replace = overwrite or save.is_dir()
        partial = prepare_directory(save, overwrite=replace, resume=True)
        records = resume_log.resume()
        _write_files(partial, files, records, resume_log, chunk_reader, workers or default_workers(), replaces=replace)
        write_index(partial, files)
        written = {output.dtype for output in outputs}
        copy_assets(assets, partial, dtype=written.pop() if len(written) == 1 else None)
        finish_directory(
            partial,
            save,
            {
                "kind": "exported",
                "plan": resume_log.plan,
                "weight_map_version": spec.weight_map_version,
                "expert_layout": "hub",
                "source": {"checkpoint": str(checkpoint), METADATA: manifest["files"][METADATA]},
                "tensors": {name: fact for file in files for name, fact in records[file]["tensors"].items()},
            },
            overwrite=replace,
            written={name: WrittenFile(record["size"], record["checksum"]) for name, record in records.items()},
        )
        resume_log.remove()
    _warn_of_square_experts(spec, model_config)
    return save


def _warn_of_square_experts(spec: ModelSpec, model_config: ModelConfig) -> None:
    if model_config.num_experts and layout_by_shapes({}, spec, model_config) is None:
        print(
            "note: with these widths transformers 5 cannot tell the expert layout from shapes and misreads the "
            "published layout, which was written; load it with transformers 4.57"
        )


def _check_whole_files(
    reader: ChunkReader, checkpoint: Path, manifest: Mapping[str, Any], rules: Sequence[WeightRule]
) -> None:
    """Compare checksums of the files that have none of chunks."""
    unchecked = reader.files_without_chunk_checksums(MODEL_PREFIX + rule.target for rule in rules)
    unchecked &= manifest["files"].keys()  # the manifest does not have the files of a base
    if unchecked:
        print(f"checking {counted(len(unchecked), 'file')} of {checkpoint}, without checksums of chunks")
        verify_files(checkpoint, {name: manifest["files"][name] for name in sorted(unchecked)})


def _check(reader: DcpReader, rules: Sequence[WeightRule], assets: Path) -> None:
    """Refuse a checkpoint whose parameters differ from the config's in name or shape, or have no weight dtype."""
    expected = {MODEL_PREFIX + rule.target: rule.target_shape for rule in rules}
    found = {name: entry for name, entry in reader.tensors.items() if name.startswith(MODEL_PREFIX)}
    wrong = [
        f"{name} is {list(found[name][0])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name][0] != shape
    ]
    allowed = (torch.bfloat16, torch.float16, torch.float32)
    problems = [
        *listed("missing", sorted(expected.keys() - found.keys())),
        *listed("unexpected", sorted(found.keys() - expected.keys())),
        *listed("of another shape", wrong),
        *listed("of a type that no weight has", [name for name, (_, kind) in found.items() if kind not in allowed]),
    ]
    if problems:
        raise UserError(
            f"{reader.path} does not fit {assets / 'config.json'}: {'; '.join(problems)}; "
            "pass the --model_assets_dir of the model that was trained"
        )


def _target_dtype(dtype: str, manifest: Mapping[str, Any], assets: Path) -> torch.dtype | None:
    """The dtype to write; None to keep each tensor's own."""
    if dtype != "auto":
        return DTYPES.get(dtype)
    return None if manifest["metadata"].get("kind") == "converted" else config_dtype(assets)


def _output(rule: WeightRule, reader: DcpReader, dtype: torch.dtype | None) -> Output:
    stored = reader.tensors[MODEL_PREFIX + rule.target][1]
    return Output(rule, stored, dtype or stored)


def _write_files(
    partial: Path,
    files: Mapping[str, list[Output]],
    records: dict[str, dict[str, Any]],
    resume_log: ResumeLog,
    reader: ChunkReader,
    workers: int,
    *,
    replaces: bool,
) -> None:
    """Write the files without a record, and add theirs to ``records``."""
    missing = {name: outputs for name, outputs in files.items() if name not in records}
    total = sum(output.nbytes for outputs in missing.values() for output in outputs)
    check_disk_space(partial.parent, total + _SPARE_BYTES, replaces=replaces)
    if records:
        kept = sum(record["size"] for record in records.values())
        print(f"resuming: {len(records)} of {len(files)} files ({format_bytes(kept)}) are already written and verified")
    progress = ProgressBar("dcp_to_hf", total)
    writer = ChunkWriter(reader, progress)
    shards = [ShardFile(partial / name, outputs, reader) for name, outputs in missing.items()]

    def write(shard: ShardFile, chunk: OutputChunk) -> None:
        if writer.write(shard, chunk):
            record = shard.finish()
            resume_log.add(shard.path.name, record)
            records[shard.path.name] = record

    jobs = [functools.partial(write, shard, chunk) for shard, chunk in order_chunks(shards, workers)]
    try:
        run_parallel(jobs, workers=workers, progress=progress)
    finally:
        progress.close()
        for shard in shards:
            shard.close()


def _fingerprint(checkpoint: Path, files: Mapping[str, list[Output]], weight_map_version: int) -> str:
    """A digest that changes whenever the bytes of the weight files could."""
    manifest = (checkpoint / MANIFEST).stat()
    plan = [[name, [[o.rule.target, str(o.stored), str(o.dtype)] for o in shard]] for name, shard in files.items()]
    facts = [str(checkpoint.resolve()), manifest.st_mtime_ns, manifest.st_size, weight_map_version, plan]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Output:
    """The Hugging Face tensors of one rule, to be written one after another to one file.

    Attributes:
        rule: of the tensors.
        stored: dtype in the checkpoint.
        dtype: to write.
    """

    rule: WeightRule
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return math.prod(self.rule.target_shape) * self.dtype.itemsize

    @property
    def row_elements(self) -> int:
        """Elements in one row of the parameter."""
        return math.prod(self.rule.target_shape[1:])


@dataclasses.dataclass(frozen=True)
class OutputChunk:
    """Rows [first, last) of an output, to be written from byte ``position`` of its file; ``number`` within the file."""

    output: Output
    first: int
    last: int
    position: int
    number: int


@dataclasses.dataclass(frozen=True)
class _Checksum:
    """Checksum of ``length`` bytes of the tensor ``name``."""

    name: str
    value: int
    length: int


def plan_files(outputs: Sequence[Output], max_shard_size: int) -> dict[str, list[Output]]:
    """Divide outputs into files in the order of the weight map; the tensors of one rule stay together.

    Args:
        outputs: to write.
        max_shard_size: bytes of tensors in one file, at most, unless those of one rule are more.
    """
    shards: list[list[Output]] = [[]]
    nbytes = 0
    for output in outputs:
        if nbytes and nbytes + output.nbytes > max_shard_size:
            shards.append([])
            nbytes = 0
        shards[-1].append(output)
        nbytes += output.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def write_index(directory: Path, files: Mapping[str, list[Output]]) -> None:
    """Write the index from tensor to file; a single file has none."""
    if list(files) == [SINGLE]:
        return
    weight_of = {
        name: file for file, outputs in files.items() for output in outputs for name, _ in output.rule.sources
    }
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_of.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n")


class ShardFile:
    """A safetensors file being written, and the checksums of its written chunks."""

    def __init__(self, path: Path, outputs: Sequence[Output], reader: ChunkReader) -> None:
        self.path = path
        self._entries = [(name, output.dtype, shape) for output in outputs for name, shape in output.rule.sources]
        self._header = build_header(self._entries, {"format": "pt", LAYOUT_KEY: "hub"})
        self.chunks = list(_cut(outputs, len(self._header), reader))
        self._written: dict[int, list[_Checksum]] = {}
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(
        self, chunk: OutputChunk, tensors: Sequence[Tensor], checksums: list[_Checksum], progress: ProgressBar
    ) -> bool:
        """Write the tensors of a chunk; returns whether the file is complete."""
        # Threads that wait for the file itself would spin; waiting for the lock leaves the core free.
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
                os.pwrite(self._descriptor, self._header, 0)
            position = chunk.position
            for tensor in tensors:
                view = tensor_bytes(tensor)
                while len(view):
                    count = os.pwrite(self._descriptor, view[:WRITE_BYTES], position)
                    position, view = position + count, view[count:]
                    progress.advance(count)
            self._written[chunk.number] = checksums
            return len(self._written) == len(self.chunks)

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk and return its record: size, checksum, and entries of its tensors."""
        tensors = _combine_per_tensor(checksum for chunk in self.chunks for checksum in self._written[chunk.number])
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


def _cut(outputs: Sequence[Output], position: int, reader: ChunkReader) -> Iterator[OutputChunk]:
    """The chunks of a file whose data begin at byte ``position``."""
    numbers = itertools.count()
    for output in outputs:
        rule = output.rule
        for first, last in reader.ranges(MODEL_PREFIX + rule.target) if rule.row_wise else [(0, rule.target_shape[0])]:
            yield OutputChunk(output, first, last, position, next(numbers))
            position += (last - first) * output.row_elements * output.dtype.itemsize


def _combine_per_tensor(checksums: Iterable[_Checksum]) -> dict[str, tuple[int, int]]:
    """Checksum and length of each tensor, from those of its successive chunks."""
    combined: dict[str, tuple[int, int]] = {}
    for chunk in checksums:
        value, length = combined.get(chunk.name, (0, 0))
        combined[chunk.name] = (combine(value, chunk.value, chunk.length), length + chunk.length)
    return combined


class ChunkWriter:
    """Converts and writes chunks; used by several threads."""

    def __init__(self, reader: ChunkReader, progress: ProgressBar) -> None:
        self._reader = reader
        self._progress = progress
        self._budget = ByteBudget()

    def write(self, file: ShardFile, chunk: OutputChunk) -> bool:
        """Convert and write one chunk; returns whether its file is complete."""
        output, rule, name = chunk.output, chunk.output.rule, MODEL_PREFIX + chunk.output.rule.target
        # The stored rows, their assembled chunks, and the result in its own order and dtype.
        with self._budget.take(3 * (chunk.last - chunk.first) * output.row_elements * output.stored.itemsize):
            stored = self._reader.read(name, (chunk.first, chunk.last))
            tensors = [tensor.to(output.dtype) for tensor in rule.to_hf(stored)]
            checksums = [
                _Checksum(source, crc32(tensor_bytes(tensor)), tensor.nbytes)
                for (source, _), tensor in zip(rule.sources, tensors, strict=True)
            ]
            return file.write(chunk, tensors, checksums, self._progress)


def order_chunks(files: Sequence[ShardFile], workers: int) -> list[tuple[ShardFile, OutputChunk]]:
    """Chunks in the order of writing: one file after another, or several files at a time with many workers."""
    lanes = max(1, workers // _WORKERS_PER_FILE)
    chunks: list[list[tuple[ShardFile, OutputChunk]]] = [
        [(file, chunk) for file in files[lane::lanes] for chunk in file.chunks] for lane in range(lanes)
    ]
    return [job for group in itertools.zip_longest(*chunks) for job in group if job is not None]
