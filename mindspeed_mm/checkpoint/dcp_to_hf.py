"""Distributed checkpoint -> Hugging Face directory in the published layout: streaming, atomic, resumable."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.assets import check_replaceable, config_dtype, copy_assets
from mindspeed_mm.checkpoint.chunk_reader import StoredParameters
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.dcp_writer import PREFIX
from mindspeed_mm.checkpoint.directory import (
    WrittenFile,
    finish_directory,
    prepare_directory,
    verify_directory,
    verify_files,
)
from mindspeed_mm.checkpoint.executor import (
    Progress,
    check_disk_space,
    counted,
    default_workers,
    format_bytes,
    run_parallel,
    writing,
)
from mindspeed_mm.checkpoint.hf_source import layout_by_shapes
from mindspeed_mm.checkpoint.hf_writer import Output, Part, PartWriter, ShardFile, order_parts, plan_files, write_index
from mindspeed_mm.checkpoint.locate import check_huggingface, find_checkpoint
from mindspeed_mm.checkpoint.pieces import listed
from mindspeed_mm.checkpoint.resume_log import Journal
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.models.state_dict import WeightRule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SPARE_BYTES = 64 << 20  # for tokenizer files and headers


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
        check: compare what is read with the recorded checksums.

    Raises:
        UserError: if anything about checkpoint, assets or target is not as it should be.
    """
    load, save, assets = Path(load_dir), Path(save_dir), Path(model_assets_dir)
    checkpoint = find_checkpoint(load, "--load_dir")
    check_huggingface(assets, "--model_assets_dir")
    manifest = verify_directory(checkpoint)
    spec = spec_of(assets)
    model_config = spec.read_config(assets)
    reader = DcpReader(checkpoint, manifest)
    rules = spec.weight_rules(model_config, expert_layout="hub")
    _check(reader, rules, assets)
    outputs = [_output(rule, reader, _target_dtype(dtype, manifest, assets)) for rule in rules]
    files = plan_files(outputs, max_shard_size)
    journal = Journal(save, _fingerprint(checkpoint, files, spec.weight_map_version))
    if journal.is_done():
        journal.remove()
        return save
    check_replaceable(save, overwrite=overwrite, keep=(checkpoint, assets))
    stored = StoredParameters(reader, check=check)
    whole = stored.files_without(PREFIX + rule.target for rule in rules)
    if check and whole:
        print(f"checking {counted(len(whole), 'file')} of {checkpoint}, without checksums of parts")
        verify_files(checkpoint, {name: manifest["files"][name] for name in sorted(whole)})
    with writing(save), journal.locked():
        # An empty directory in the target's place is no loss.
        replace = overwrite or save.is_dir()
        partial = prepare_directory(save, overwrite=replace, resume=True)
        records = journal.resume()
        _write_files(partial, files, records, journal, stored, workers or default_workers(), replaces=replace)
        write_index(partial, files)
        written = {output.dtype for output in outputs}
        copy_assets(assets, partial, dtype=written.pop() if len(written) == 1 else None)
        finish_directory(
            partial,
            save,
            {
                "kind": "exported",
                "plan": journal.plan,
                "weight_map_version": spec.weight_map_version,
                "expert_layout": "hub",
                "source": {"checkpoint": str(checkpoint), ".metadata": manifest["files"][".metadata"]},
                "tensors": {name: fact for file in files for name, fact in records[file]["tensors"].items()},
            },
            overwrite=replace,
            written={name: WrittenFile(record["size"], record["checksum"]) for name, record in records.items()},
        )
        journal.remove()
    _warn_of_square_experts(spec, model_config)
    return save


def _warn_of_square_experts(spec: ModelSpec, model_config: ModelConfig) -> None:
    if model_config.num_experts and layout_by_shapes({}, spec, model_config) is None:
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


def _write_files(
    partial: Path,
    files: Mapping[str, list[Output]],
    records: dict[str, dict[str, Any]],
    journal: Journal,
    stored: StoredParameters,
    workers: int,
    *,
    replaces: bool,
) -> None:
    """Write the files that have no record yet; adds theirs to ``records``."""
    missing = {name: outputs for name, outputs in files.items() if name not in records}
    total = sum(output.nbytes for outputs in missing.values() for output in outputs)
    check_disk_space(partial.parent, total + _SPARE_BYTES, replaces=replaces)
    if records:
        kept = sum(record["size"] for record in records.values())
        print(f"resuming: {len(records)} of {len(files)} files ({format_bytes(kept)}) are already written and verified")
    progress = Progress("dcp_to_hf", total)
    writer = PartWriter(stored, progress)
    shards = [ShardFile(partial / name, outputs, stored) for name, outputs in missing.items()]

    def write(shard: ShardFile, part: Part) -> None:
        if writer.write(shard, part):
            record = shard.finish()
            journal.add(shard.path.name, record)
            records[shard.path.name] = record

    jobs = [functools.partial(write, shard, part) for shard, part in order_parts(shards, workers)]
    try:
        run_parallel(jobs, workers=workers, progress=progress)
    finally:
        progress.close()
        for shard in shards:
            shard.close()


def _fingerprint(checkpoint: Path, files: Mapping[str, list[Output]], weight_map_version: int) -> str:
    """Changes whenever the bytes of the weight files could."""
    manifest = (checkpoint / "manifest.json").stat()
    plan = [[name, [[o.rule.target, str(o.stored), str(o.dtype)] for o in shard]] for name, shard in files.items()]
    facts = [str(checkpoint.resolve()), manifest.st_mtime_ns, manifest.st_size, weight_map_version, plan]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
