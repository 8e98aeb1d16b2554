"""Hugging Face directory -> distributed checkpoint: streaming, atomic, resumable."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.assets import config_dtype
from mindspeed_mm.checkpoint.dcp_metadata import METADATA, write_metadata
from mindspeed_mm.checkpoint.dcp_writer import FileRecord, Piece, plan_files, stored_items, tensor_facts, write_file
from mindspeed_mm.checkpoint.directory import (
    RELEASE,
    finish_directory,
    prepare_directory,
    write_tracker,
)
from mindspeed_mm.checkpoint.executor import (
    ByteBudget,
    Progress,
    check_disk_space,
    default_workers,
    format_bytes,
    run_parallel,
    writing,
)
from mindspeed_mm.checkpoint.hf_source import HFSource
from mindspeed_mm.checkpoint.locate import check_huggingface
from mindspeed_mm.checkpoint.resume_log import Journal
from mindspeed_mm.errors import UserError

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
_SPARE_BYTES = 16 << 20  # for metadata and manifest
_RECORDS_VERSION = 2
"""Counts up when the journal's records get another form, so that those of an older program are not believed."""


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

    Interrupted at any moment it leaves no ``release``; started again with the same source and options it keeps the
    files that are finished.

    Args:
        hf_dir: with config.json and safetensors files.
        dcp_dir: created if needed.
        expert_layout: ``auto``, ``hub`` or ``v5``: how the experts lie in ``hf_dir``.
        dtype: ``keep``, ``bf16`` or ``fp32``.
        workers: threads; None for two for each core, 8 at most.
        overwrite: replace an existing ``release``.
        tie_weight: insist that the model's embeddings are tied.

    Raises:
        UserError: if anything about source or target is not as it should be.
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
    journal = Journal(target, _fingerprint(version, source, files))
    if root.exists() and not root.is_dir():
        raise UserError(f"--dcp_dir {root} is a file; name a directory")
    if journal.is_done():
        return _point_to(root, target, journal)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it, or name another --dcp_dir")
    with writing(target), journal.locked():
        partial = prepare_directory(target, overwrite=overwrite, resume=True)
        records = {name: FileRecord.from_json(record) for name, record in journal.resume().items()}
        dropped_reads = source.check_dropped()
        _write_files(partial, files, source, records, journal, workers or default_workers())
        if source.fingerprint() != version:
            raise UserError(f"files of {hf_dir} were changed while they were read; run the same command again")
        write_metadata(partial / METADATA, stored_items(files, records))
        reads = [read for record in records.values() for read in record.reads] + dropped_reads
        finish_directory(
            partial,
            target,
            {
                "kind": "converted",
                "plan": journal.plan,
                "weight_map_version": source.spec.weight_map_version,
                "expert_layout": "hub",
                "dtype": dtype,
                "transformers_version": _installed_transformers(),
                "source": {
                    "expert_layout": source.layout,
                    "transformers_version": source.transformers_version(),
                    "files": source.file_facts(reads),
                },
                "geometry": dataclasses.asdict(source.model_config),
                "tensors": tensor_facts(files, records),
            },
            overwrite=overwrite,
            written={name: record.written for name, record in records.items()},
        )
        return _point_to(root, target, journal)


def _write_files(
    partial: Path,
    files: dict[str, list[Piece]],
    source: HFSource,
    records: dict[str, FileRecord],
    journal: Journal,
    workers: int,
) -> None:
    """Write the files that have no record yet; adds theirs to ``records``."""
    missing = [name for name in files if name not in records]
    total = sum(piece.nbytes for name in missing for piece in files[name])
    check_disk_space(partial.parent, total + _SPARE_BYTES, replaces=(partial.parent / RELEASE).exists())
    if records:
        kept = sum(record.size for record in records.values())
        print(f"resuming: {len(records)} of {len(files)} files ({format_bytes(kept)}) are already written and verified")
    progress = Progress("hf_to_dcp", total)
    budget = ByteBudget()

    def write(name: str) -> None:
        record = write_file(partial / name, files[name], source, budget=budget, progress=progress)
        journal.add(name, record.to_json())
        records[name] = record

    try:
        run_parallel([functools.partial(write, name) for name in missing], workers=workers, progress=progress)
    finally:
        progress.close()


def _point_to(root: Path, target: Path, journal: Journal) -> Path:
    write_tracker(root, RELEASE)
    journal.remove()
    return target


def _check_types(source: HFSource, dtype: str) -> None:
    """Types are kept only where all tensors have the one that ``config.json`` names."""
    named = config_dtype(source.directory)
    wrong = [name for name, tensor in source.tensors.items() if tensor.dtype != named]
    if dtype == "keep" and named is not None and wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{source.directory / 'config.json'} says {str(named).removeprefix('torch.')}, but the type is another in "
            f"{names}; pass --dtype bf16 or fp32 to convert all, or correct config.json"
        )


def _fingerprint(version: list[list[Any]], source: HFSource, files: dict[str, list[Piece]]) -> str:
    """Changes whenever the bytes of the result could."""
    pieces = [
        [name, [[p.rule.target, p.first, p.last, str(p.dtype)] for p in pieces]] for name, pieces in files.items()
    ]
    versions = [source.spec.weight_map_version, _RECORDS_VERSION, torch.__version__]
    facts: list[Any] = [version, source.layout, versions, pieces]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _installed_transformers() -> str:
    from importlib.metadata import version

    return version("transformers")
