"""A table of what a Hugging Face directory or a distributed checkpoint holds, read from headers only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import read_tracker, verify_directory
from mindspeed_mm.checkpoint.executor import counted, format_bytes
from mindspeed_mm.checkpoint.hf_source import LAYOUT_KEY, layout_by_shapes, read_headers
from mindspeed_mm.checkpoint.locate import find_checkpoint, is_huggingface
from mindspeed_mm.models.spec import spec_of

Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]


def inspect(directory: str | Path, *, every_tensor: bool = False) -> str:
    """Describe a directory of either format as text.

    Args:
        directory: Hugging Face directory, checkpoint directory, or one with a tracker file.
        every_tensor: one line for each tensor instead of one for each kind in all layers.

    Raises:
        UserError: if the directory is of neither format, or incomplete.
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
    model_config = metadata.get("geometry")
    if isinstance(model_config, Mapping):
        text = model_config.get("text", {})
        facts["model"] = (
            f"{model_config.get('model_type')}, {text.get('num_layers')} layers of width {text.get('hidden_size')}, "
            f"{text.get('num_experts')} experts"
        )
    return facts, DcpReader(path, manifest).tensors


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers within names by value: layer 2 before layer 10."""
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
