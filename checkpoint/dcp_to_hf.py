"""Distributed checkpoint -> Hugging Face directory in the published layout: streaming, atomic, resumable."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.assets import check_replaceable, config_dtype, copy_assets
from checkpoint.dcp_writer import PREFIX
from checkpoint.journal import Journal
from checkpoint.work import (
    WRITE_BYTES,
    ByteBudget,
    Progress,
    check_disk_space,
    default_workers,
    format_bytes,
    run_parallel,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.geometry import Qwen3VLGeometry
from mindspeed_mm.models.weight_map import WEIGHT_MAP_VERSION, WeightRule, weight_map
from mindspeed_mm.training.checkpoint.checksum import combine, crc32, format_checksum
from mindspeed_mm.training.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.training.checkpoint.directory import (
    TRACKER,
    WrittenFile,
    finish_directory,
    prepare_directory,
    resolve_checkpoint,
    verify_directory,
)
from mindspeed_mm.training.checkpoint.hf_source import INDEX, LAYOUT_KEY, SINGLE, layout_by_shapes
from mindspeed_mm.training.checkpoint.pieces import listed, split_rows
from mindspeed_mm.training.checkpoint.safetensors_io import build_header, tensor_bytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SPARE_BYTES = 64 << 20  # for tokenizer files and headers


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
) -> Path:
    """Write a directory that transformers loads from a converted or a training checkpoint; returns its path.

    Only the model's parameters are read, whatever else a training checkpoint holds. Experts are always written in the
    published layout. Interrupted, it leaves no ``save_dir``; started again it keeps finished files.

    Args:
        load_dir: a checkpoint directory (``release``, ``iter_XXXXXXX``), or a directory with a tracker file.
        save_dir: must not exist, unless empty or ``overwrite``.
        model_assets_dir: Hugging Face directory that gives config, tokenizer and processor files.
        dtype: ``keep``, ``bf16``, ``fp32``, or ``auto``: a converted checkpoint keeps its types, a training
            checkpoint (fp32) is rounded to the type that the config names.
        max_shard_size: bytes of tensors in one file, at most, unless those of one parameter are more.
        workers: threads; None for two for each core, 8 at most.
        overwrite: replace ``save_dir``.
        check: compare the files of a training checkpoint with their recorded checksums first.

    Raises:
        UserError: if anything about checkpoint, assets or target is not as it should be.
    """
    load, save, assets = Path(load_dir), Path(save_dir), Path(model_assets_dir)
    checkpoint = resolve_checkpoint(load) if (load / TRACKER).is_file() else load
    manifest = verify_directory(checkpoint)
    geometry = Qwen3VLGeometry.from_pretrained(assets)
    reader = DcpReader(checkpoint, manifest)
    rules = weight_map(geometry, expert_layout="hub")
    _check(reader, rules, assets)
    outputs = [_output(rule, reader, _target_dtype(dtype, manifest, assets)) for rule in rules]
    files = _plan_files(outputs, max_shard_size)
    journal = Journal(save, _fingerprint(checkpoint, files))
    if journal.is_done():
        journal.remove()
        return save
    check_replaceable(save, overwrite=overwrite, keep=(checkpoint, assets))
    if check and "tensors" not in manifest["metadata"]:
        # A training checkpoint has checksums of files only; those of tensors are compared as they are read.
        print(f"checking {len(manifest['files'])} files of {checkpoint}")
        verify_directory(checkpoint, checksums=True)
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save_dir {save} cannot be made: {error.strerror}") from error
    with journal.locked():
        # An empty directory in the target's place is no loss.
        replace = overwrite or save.is_dir()
        partial = prepare_directory(save, overwrite=replace, resume=True)
        records = journal.resume()
        writer = _FileWriter(reader, recorded=manifest["metadata"].get("tensors", {}))
        _write_files(partial, files, records, journal, writer, workers or default_workers())
        _write_index(partial, files)
        written = {output.dtype for output in outputs}
        copy_assets(assets, partial, dtype=written.pop() if len(written) == 1 else None)
        finish_directory(
            partial,
            save,
            {
                "kind": "exported",
                "plan": journal.plan,
                "weight_map_version": WEIGHT_MAP_VERSION,
                "expert_layout": "hub",
                "source": {"checkpoint": str(checkpoint), ".metadata": manifest["files"][".metadata"]},
                "tensors": {name: fact for file in files for name, fact in records[file]["tensors"].items()},
            },
            overwrite=replace,
            written={name: WrittenFile(record["size"], record["checksum"]) for name, record in records.items()},
        )
        journal.remove()
    _warn_of_square_experts(geometry)
    return save


def _warn_of_square_experts(geometry: Qwen3VLGeometry) -> None:
    if geometry.text.num_experts and layout_by_shapes({}, geometry) is None:
        print(
            "note: with these widths transformers 5 cannot tell the expert layout from shapes and misreads the "
            "published layout, which was written; load it with transformers 4.57"
        )


def _check(reader: DcpReader, rules: Sequence[WeightRule], assets: Path) -> None:
    """The checkpoint's parameters are those of the config, by name, shape and kind of type."""
    expected = {PREFIX + rule.target: rule.target_shape for rule in rules}
    found = {name: entry for name, entry in reader.tensors.items() if name.startswith(PREFIX)}
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
    """The type to write; None to keep each tensor's own."""
    if dtype != "auto":
        return DTYPES.get(dtype)
    return None if manifest["metadata"].get("kind") == "converted" else config_dtype(assets)


def _output(rule: WeightRule, reader: DcpReader, dtype: torch.dtype | None) -> Output:
    stored = reader.tensors[PREFIX + rule.target][1]
    return Output(rule, stored, dtype or stored)


def _plan_files(outputs: Sequence[Output], max_shard_size: int) -> dict[str, list[Output]]:
    """Fill files in the order of the weight map; the tensors of one rule stay together."""
    shards: list[list[Output]] = [[]]
    held = 0
    for output in outputs:
        if held and held + output.nbytes > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(output)
        held += output.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _write_files(
    partial: Path,
    files: Mapping[str, list[Output]],
    records: dict[str, dict[str, Any]],
    journal: Journal,
    writer: _FileWriter,
    workers: int,
) -> None:
    """Write the files that have no record yet; adds theirs to ``records``."""
    missing = [name for name in files if name not in records]
    total = sum(output.nbytes for name in missing for output in files[name])
    check_disk_space(partial, total + _SPARE_BYTES)
    if records:
        kept = sum(record["size"] for record in records.values())
        print(f"resuming: {len(records)} of {len(files)} files ({format_bytes(kept)}) are already written and verified")
    progress = Progress("dcp_to_hf", total)

    def write(name: str) -> None:
        record = writer.write(partial / name, files[name], progress)
        journal.add(name, record)
        records[name] = record

    try:
        run_parallel([functools.partial(write, name) for name in missing], workers=workers, progress=progress)
    except OSError as error:
        reason = f"{partial} cannot be written: {error.strerror}"
        raise UserError(f"{reason}; finished files are kept, run the command again") from error
    finally:
        progress.close()


class _FileWriter:
    """Writes safetensors files from the tensors of a checkpoint; used by several threads."""

    def __init__(self, reader: DcpReader, *, recorded: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            reader: the checkpoint.
            recorded: the manifest's facts of tensors; what is read must have the checksums given there.
        """
        self._reader = reader
        self._recorded = recorded
        self._budget = ByteBudget()

    def write(self, path: Path, outputs: Sequence[Output], progress: Progress) -> dict[str, Any]:
        """Write one file, flush it to disk and return its record: size, checksum, and facts of its tensors."""
        entries = [(name, output.dtype, shape) for output in outputs for name, shape in output.rule.sources]
        header = build_header(entries, {"format": "pt", LAYOUT_KEY: "hub"})
        crc, size = crc32(header), len(header)
        facts: dict[str, Any] = {}
        with path.open("wb", buffering=0) as file:
            file.write(header)
            for output in outputs:
                for name, part, part_crc in self._parts(output):
                    _write_all(file.fileno(), part, progress)
                    crc, size = combine(crc, part_crc, part.nbytes), size + part.nbytes
                    known = facts.get(name)
                    joined = combine(known["crc"], part_crc, part.nbytes) if known else part_crc
                    facts[name] = {"crc": joined, "dtype": str(part.dtype).removeprefix("torch.")}
            os.fsync(file.fileno())
        for name, _, shape in entries:
            facts[name] = {
                "shape": list(shape),
                "dtype": facts[name]["dtype"],
                "checksum": format_checksum(facts[name]["crc"]),
            }
        return {"size": size, "checksum": format_checksum(crc), "tensors": facts}

    def _parts(self, output: Output) -> Iterator[tuple[str, Tensor, int]]:
        """The Hugging Face tensors of a rule in order, large ones in ranges of rows, each with its checksum."""
        rule, name = output.rule, PREFIX + output.rule.target
        rows = rule.target_shape[0]
        row_bytes = math.prod(rule.target_shape[1:]) * output.stored.itemsize
        stored_crc = 0
        for first, last in split_rows(rows, row_bytes) if rule.row_wise else [(0, rows)]:
            # The stored rows, their joined pieces, and the result in its own order and type.
            with self._budget.take(3 * (last - first) * row_bytes):
                tensor = self._reader.read(name, (first, last))
                piece_crc = crc32(tensor_bytes(tensor))
                stored_crc = combine(stored_crc, piece_crc, tensor.nbytes)
                same_bytes = rule.is_copy and output.dtype == output.stored
                for (source, _), part in zip(rule.sources, rule.to_hf(tensor), strict=True):
                    part = part.to(output.dtype)
                    yield source, part, piece_crc if same_bytes else crc32(tensor_bytes(part))
        expected = self._recorded.get(name, {}).get("checksum")
        if expected not in (None, format_checksum(stored_crc)):
            raise UserError(
                f"{self._reader.path}: {name} has another checksum than recorded; restore the file or make it again"
            )


def _write_all(descriptor: int, tensor: Tensor, progress: Progress) -> None:
    view = tensor_bytes(tensor)
    while len(view):
        count = os.write(descriptor, view[:WRITE_BYTES])
        progress.advance(count)
        view = view[count:]


def _write_index(partial: Path, files: Mapping[str, list[Output]]) -> None:
    """The index that names each tensor's file; a single file has none."""
    if list(files) == [SINGLE]:
        return
    weight_of = {
        name: file for file, outputs in files.items() for output in outputs for name, _ in output.rule.sources
    }
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_of.items()))}
    (partial / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _fingerprint(checkpoint: Path, files: Mapping[str, list[Output]]) -> str:
    """Changes whenever the bytes of the weight files could."""
    manifest = (checkpoint / "manifest.json").stat()
    plan = [[name, [[o.rule.target, str(o.stored), str(o.dtype)] for o in shard]] for name, shard in files.items()]
    facts = [str(checkpoint.resolve()), manifest.st_mtime_ns, manifest.st_size, WEIGHT_MAP_VERSION, plan]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
