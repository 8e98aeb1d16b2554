"""Verify (compare a checkpoint with Hugging Face weights bit for bit) and inspect (list what a directory holds)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.conversion import (
    ByteBudget,
    ProgressBar,
    counted,
    default_workers,
    format_bytes,
    run_parallel,
)
from mindspeed_mm.checkpoint.dcp_format import MODEL_PREFIX
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import (
    check_huggingface,
    find_checkpoint,
    is_huggingface,
    read_tracker,
    verify_directory,
)
from mindspeed_mm.checkpoint.hf import LAYOUT_KEY, HFSource, layout_by_shapes, read_headers
from mindspeed_mm.checkpoint.partial import Base
from mindspeed_mm.checkpoint.partial_reader import open_reader
from mindspeed_mm.checkpoint.safetensors_io import split_rows
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.models.state_dict import WeightRule, mcore_shapes


def verify(
    dcp_dir: str | Path, hf_dir: str | Path, *, expert_layout: str = "auto", workers: int | None = None,
    base_dir: str | Path | None = None,
) -> list[str]:
    """Compare all tensors; returns one line for each that differs.

    If ``hf_to_dcp`` has changed the dtype, the source is rounded in the same way before it is compared.

    Args:
        dcp_dir: a checkpoint directory, or one with a tracker file.
        hf_dir: the Hugging Face directory to compare with.
        expert_layout: of ``hf_dir``: ``auto``, ``hub`` or ``v5``.
        workers: threads; None for two for each core, 8 at most.
        base_dir: directory of a partial checkpoint's base, if it is not where it was.

    Raises:
        UserError: if either side cannot be read or is incomplete.
    """
    checkpoint = find_checkpoint(Path(dcp_dir), "--dcp_dir")
    check_huggingface(Path(hf_dir), "--hf_dir")
    manifest = verify_directory(checkpoint)
    source = HFSource(hf_dir, expert_layout=expert_layout)
    reader = open_reader(checkpoint, manifest, base_dir=base_dir)
    converted = manifest["metadata"].get("dtype", "keep") != "keep"

    expected = {MODEL_PREFIX + name: shape for name, shape in mcore_shapes(source.rules).items()}
    found = {name: entry for name, entry in reader.tensors.items() if name.startswith(MODEL_PREFIX)}
    differing = [f"{name}: missing in {checkpoint}" for name in sorted(expected.keys() - found.keys())]
    differing += [f"{name}: only in {checkpoint}" for name in sorted(found.keys() - expected.keys())]
    comparable: list[WeightRule] = []
    for rule in source.rules:
        name = MODEL_PREFIX + rule.target
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
    sizes = [math.prod(rule.target_shape) * reader.tensors[MODEL_PREFIX + rule.target][1].itemsize for rule in rules]
    progress = ProgressBar("verify", sum(sizes))
    budget = ByteBudget()
    jobs = [functools.partial(_compare, rule, reader, source, budget, progress) for rule in rules]
    try:
        return [line for lines in run_parallel(jobs, workers=workers, progress=progress) for line in lines]
    finally:
        progress.close()


def _compare(
    rule: WeightRule, reader: DcpReader, source: HFSource, budget: ByteBudget, progress: ProgressBar
) -> list[str]:
    """A line for each Hugging Face tensor of one rule whose values differ in the checkpoint."""
    name = MODEL_PREFIX + rule.target
    shape, dtype = reader.tensors[name]
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    elements: dict[str, int] = {}
    for first, last in split_rows(shape[0], row_bytes) if rule.row_wise else [(0, shape[0])]:
        rows = (first, last) if rule.row_wise else None
        with budget.take(3 * (last - first) * row_bytes):
            converted = rule.to_hf(reader.read(name, (first, last)))
            for (hf_name, _), actual in zip(rule.sources, converted, strict=True):
                expected = source.read(hf_name, rows)[0].to(dtype)
                # As integers: NaN equals itself, and -0 differs from 0.
                actual, expected = actual.view(bits), expected.view(bits)
                if not torch.equal(actual, expected):
                    elements[hf_name] = elements.get(hf_name, 0) + int((actual != expected).sum())
        progress.advance((last - first) * row_bytes)
    return [
        f"{hf_name} ({name}): {counted(count, 'element')} differ{'s' * (count == 1)}"
        for hf_name, count in elements.items()
    ]


Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]


def inspect(directory: str | Path, *, every_tensor: bool = False) -> str:
    """Describe a directory of either format as text.

    Args:
        directory: Hugging Face directory, checkpoint directory, or one with a tracker file.
        every_tensor: one line for each tensor instead of one for all layers.

    Raises:
        UserError: if the directory has neither format or is incomplete.
    """
    path = Path(directory)
    if is_huggingface(path):
        facts, entries = _describe_hf(path)
    else:
        facts, entries = _describe_dcp(find_checkpoint(path, "--dir"))
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries.values())
    elements = sum(math.prod(shape) for shape, _ in entries.values())
    facts["tensors"] = f"{len(entries)}, {elements:,} elements, {format_bytes(total)}"
    width = max(len(key) for key in facts)
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    return "\n".join([*lines, "", *_table(entries, every_tensor=every_tensor)])


def _describe_hf(path: Path) -> tuple[dict[str, str], Entries]:
    headers = read_headers(path)
    spec = spec_of(path)
    model_config = spec.read_config(path)
    entries = {n: (t.shape, t.dtype) for header in headers.values() for n, t in header.tensors.items()}
    recorded = {header.metadata.get(LAYOUT_KEY) for header in headers.values()}
    if model_config.num_experts == 0:
        layout = "no experts"
    elif recorded in ({"hub"}, {"v5"}):
        layout = f"{recorded.pop()} (recorded)"
    else:
        decided = layout_by_shapes({name: shape for name, (shape, _) in entries.items()}, spec, model_config)
        layout = f"{decided} (by shapes)" if decided else "undecided: the shapes fit both, pass --expert-layout"
    kind = f"Hugging Face, weights in {counted(len(headers), 'file')}"
    facts = {"directory": str(path), "format": kind, "expert layout": layout}
    return facts | spec.describe(model_config), entries


def _describe_dcp(path: Path) -> tuple[dict[str, str], Entries]:
    manifest = verify_directory(path)
    metadata: dict[str, Any] = manifest["metadata"]
    tracker = read_tracker(path.parent)
    facts = {
        "directory": str(path),
        "format": f"distributed checkpoint, {counted(len(manifest['files']), 'file')}, sizes as recorded",
        "kind": metadata.get("kind", "training"),
        "tracker": "none" if tracker is None else str(tracker),
        "expert layout": str(metadata.get("expert_layout", "hub")),
    }
    if metadata.get("kind") == "converted":
        source = metadata["source"]
        facts["made from"] = f"{counted(len(source['files']), 'file')} in {source['expert_layout']} layout"
    base = Base.recorded(manifest)
    if base is not None:
        facts["holds"] = f"a part of the model, over the base {base.path}"
    model_config = metadata.get("model_config", metadata.get("geometry"))  # the second in older checkpoints
    if isinstance(model_config, Mapping):
        text = model_config.get("text", model_config)
        sizes = {"num_layers": "layers", "hidden_size": "hidden size", "num_experts": "experts"}
        known = [f"{words} {text[key]}" for key, words in sizes.items() if key in text]
        facts["model"] = ", ".join([str(model_config.get("model_type")), *known])
    return facts, DcpReader(path, manifest).tensors


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _table(entries: Entries, *, every_tensor: bool) -> list[str]:
    """Rows of name, shape, type and size; tensors that differ only in a layer number share one."""
    groups: dict[tuple[str, tuple[int, ...], torch.dtype], list[str]] = {}
    for name, (shape, dtype) in entries.items():
        pattern = name if every_tensor else re.sub(r"\.\d+(?=\.|$)", ".*", name)
        groups.setdefault((pattern, shape, dtype), []).append(name)
    rows = [("tensor", "count", "shape", "type", "size")]
    for (pattern, shape, dtype), names in sorted(groups.items(), key=lambda group: _natural(group[0][0])):
        size = format_bytes(len(names) * math.prod(shape) * dtype.itemsize)
        rows.append((pattern, str(len(names)), str(list(shape)), str(dtype).removeprefix("torch."), size))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
