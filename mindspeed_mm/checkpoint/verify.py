"""Comparing a distributed checkpoint with a Hugging Face directory, bit for bit and without a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.dcp_writer import PREFIX
from mindspeed_mm.checkpoint.directory import verify_directory
from mindspeed_mm.checkpoint.executor import ByteBudget, Progress, counted, default_workers, run_parallel
from mindspeed_mm.checkpoint.hf_source import HFSource
from mindspeed_mm.checkpoint.locate import check_huggingface, find_checkpoint
from mindspeed_mm.checkpoint.pieces import split_rows
from mindspeed_mm.models.state_dict import WeightRule, mcore_shapes


def verify(
    dcp_dir: str | Path, hf_dir: str | Path, *, expert_layout: str = "auto", workers: int | None = None
) -> list[str]:
    """Compare all tensors; returns one line for each that differs, none when the two hold the same.

    Where ``hf_to_dcp`` was told to change the type, the source is rounded in the same way before it is compared.

    Args:
        dcp_dir: a checkpoint directory, or one with a tracker file.
        hf_dir: the Hugging Face directory to compare with.
        expert_layout: how the experts lie in ``hf_dir``: ``auto``, ``hub`` or ``v5``.
        workers: threads; None for two for each core, 8 at most.

    Raises:
        UserError: if either side cannot be read or is incomplete.
    """
    checkpoint = find_checkpoint(Path(dcp_dir), "--dcp_dir")
    check_huggingface(Path(hf_dir), "--hf_dir")
    manifest = verify_directory(checkpoint)
    source = HFSource(hf_dir, expert_layout=expert_layout)
    reader = DcpReader(checkpoint, manifest)
    converted = manifest["metadata"].get("dtype", "keep") != "keep"

    expected = {PREFIX + name: shape for name, shape in mcore_shapes(source.rules).items()}
    found = {name: entry for name, entry in reader.tensors.items() if name.startswith(PREFIX)}
    differing = [f"{name}: missing in {checkpoint}" for name in sorted(expected.keys() - found.keys())]
    differing += [f"{name}: only in {checkpoint}" for name in sorted(found.keys() - expected.keys())]
    comparable: list[WeightRule] = []
    for rule in source.rules:
        name = PREFIX + rule.target
        if name not in found:
            continue
        shape, dtype = found[name]
        if shape != rule.target_shape:
            differing.append(f"{name}: {list(shape)} instead of {list(rule.target_shape)}")
        elif dtype != source.dtype_of(rule) and not converted:
            differing.append(f"{name}: {dtype} instead of {source.dtype_of(rule)}")
        else:
            comparable.append(rule)
    return differing + _compare_all(comparable, reader, source, workers or default_workers())


def _compare_all(rules: Sequence[WeightRule], reader: DcpReader, source: HFSource, workers: int) -> list[str]:
    sizes = [math.prod(rule.target_shape) * reader.tensors[PREFIX + rule.target][1].itemsize for rule in rules]
    progress = Progress("verify", sum(sizes))
    budget = ByteBudget()
    jobs = [functools.partial(_compare, rule, reader, source, budget, progress) for rule in rules]
    try:
        return [line for lines in run_parallel(jobs, workers=workers, progress=progress) for line in lines]
    finally:
        progress.close()


def _compare(
    rule: WeightRule, reader: DcpReader, source: HFSource, budget: ByteBudget, progress: Progress
) -> list[str]:
    """Names of the Hugging Face tensors of one rule whose values are others in the checkpoint."""
    name = PREFIX + rule.target
    shape, dtype = reader.tensors[name]
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    elements: dict[str, int] = {}
    for first, last in split_rows(shape[0], row_bytes) if rule.row_wise else [(0, shape[0])]:
        rows = (first, last) if rule.row_wise else None
        with budget.take(3 * (last - first) * row_bytes):
            stored = rule.to_hf(reader.read(name, (first, last)))
            for (hf_name, _), ours in zip(rule.sources, stored, strict=True):
                theirs = source.read(hf_name, rows)[0].to(dtype)
                # As integers: NaN equals itself, and -0 is another value than 0.
                ours, theirs = ours.view(bits), theirs.view(bits)
                if not torch.equal(ours, theirs):
                    elements[hf_name] = elements.get(hf_name, 0) + int((ours != theirs).sum())
        progress.advance((last - first) * row_bytes)
    return [
        f"{hf_name} ({name}): {counted(count, 'element')} differ{'s' * (count == 1)}"
        for hf_name, count in elements.items()
    ]
