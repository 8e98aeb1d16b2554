"""Verify (compare a checkpoint with Hugging Face weights bit for bit) and inspect (list what a directory holds)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.adapter_formats import ORIENTATION_KEY
from mindspeed_mm.checkpoint.adapters import AdapterConfig, read_weights_header, recorded_options
from mindspeed_mm.checkpoint.conversion import (
    HELD_BYTES,
    ProgressBar,
    counted,
    default_workers,
    format_bytes,
    open_reader,
    read_ahead,
)
from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    MODEL_CONFIG_KEY,
    check_huggingface,
    find_checkpoint,
    is_adapter_directory,
    is_huggingface,
    read_manifest,
    read_tracker,
    verify_directory,
)
from mindspeed_mm.checkpoint.huggingface import LAYOUT_KEY, HFReader, layout_by_shapes, read_headers
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.partial import Base, refuse_lora
from mindspeed_mm.checkpoint.shards import Rows
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.inputs import is_present, reading, shorten, shown
from mindspeed_mm.models.lora import LORA_KEY
from mindspeed_mm.models.spec import spec_of

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of :func:`verify`.

    Attributes:
        differing: one line for each tensor that differs.
        how: that one side was rounded before, and to which types; empty if not.
    """

    differing: list[str]
    how: str


def verify(
    dcp_dir: str | Path, hf_dir: str | Path, *, expert_layout: str = "auto", workers: int | None = None,
    base_dir: str | Path | None = None,
) -> Comparison:
    """Compare all tensors.

    Where ``hf_to_dcp`` or ``dcp_to_hf`` has rounded to another type, by the record of the directory that it wrote, the
    side that it read is rounded in the same way before it is compared.

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
    refuse_lora(manifest, checkpoint)
    source = HFReader(hf_dir, expert_layout=expert_layout)
    reader = open_reader(checkpoint, manifest, base_dir=base_dir)
    imported = manifest["metadata"].get("dtype", "keep") != "keep"
    exported = is_present(source.path / MANIFEST) and (
        read_manifest(source.path)["metadata"].get("kind") == "exported"
    )
    rounded: set[torch.dtype] = set()

    found = {name: entry for name, entry in reader.tensors.items() if name.startswith(MODEL_PREFIX)}
    differing = [f"{name}: missing in {checkpoint}" for name in sorted(source.tensors.keys() - found.keys())]
    differing += [f"{name}: only in {checkpoint}" for name in sorted(found.keys() - source.tensors.keys())]
    comparable: list[str] = []
    for name in source.tensors.keys() & found.keys():
        (shape, dtype), (expected_shape, expected_dtype) = found[name], source.tensors[name]
        if shape != expected_shape:
            differing.append(f"{name}: {list(shape)} instead of {list(expected_shape)}")
        elif dtype == expected_dtype:
            comparable.append(name)
        elif imported or (exported and expected_dtype.itemsize < dtype.itemsize):
            comparable.append(name)
            rounded.add(dtype if imported else expected_dtype)
        else:
            differing.append(f"{name}: {dtype} instead of {expected_dtype}")
    elements = _compare(sorted(comparable), reader, source, workers or default_workers(), as_source=not imported)
    differing += [f"{name}: {counted(n, 'element')} differ{'s' * (n == 1)}" for name, n in elements.items()]
    types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in rounded))
    how = f"after rounding to {types}, as {checkpoint if imported else hf_dir} was written" if rounded else ""
    return Comparison(differing, how)


def _compare(
    names: list[str], reader: Any, source: HFReader, workers: int, *, as_source: bool
) -> collections.Counter[str]:
    """Number of differing elements of each Hugging Face tensor that differs, with the name of its parameter.

    ``as_source``: in the types of ``source``, not in those of ``reader``.
    """
    sizes = {name: math.prod(reader.tensors[name][0]) * reader.tensors[name][1].itemsize for name in names}
    progress = ProgressBar("verify")
    progress.begin(sum(sizes.values()))
    reader.verify_whole_files(names, print)

    def compare(name: str, rows: Rows) -> collections.Counter[str]:
        actual, expected = reader.read(name, rows), source.read(name, rows)
        progress.advance(actual.nbytes)
        actual, expected = (actual.to(expected.dtype), expected) if as_source else (actual, expected.to(actual.dtype))
        # As integers: NaN equals itself, and -0 differs from 0.
        bits = _BITS[actual.dtype.itemsize]
        counts: collections.Counter[str] = collections.Counter()
        if not torch.equal(actual.view(bits), expected.view(bits)):
            differ, row = actual.view(bits) != expected.view(bits), 0
            for origin, count in source.origins(name, rows):
                counts[f"{origin} ({name})"] += int(differ[row : row + count].sum())
                row += count
        return +counts

    jobs = (
        (3 * (rows[1] - rows[0]) * sizes[name] // reader.tensors[name][0][0], functools.partial(compare, name, rows))
        for name in names
        for rows in reader.ranges(name)
    )
    elements: collections.Counter[str] = collections.Counter()
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            for counts in read_ahead(jobs, pool, HELD_BYTES):
                elements += counts
        progress.print_totals()
    finally:
        progress.close()
    return elements


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
    if is_adapter_directory(path):
        facts, entries = _describe_adapters(path)
    elif is_huggingface(path):
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


def _describe_adapters(path: Path) -> tuple[dict[str, str], Entries]:
    config, header = AdapterConfig(path), read_weights_header(path)
    orientation = header.metadata.get(ORIENTATION_KEY)
    facts = {
        "directory": str(path),
        "format": "LoRA adapters" + (f", experts' factors {orientation}" if orientation else ""),
        "base": config.base or "not recorded",
        "LoRA": f"rank {config.r}, alpha {config.alpha:g}",
    }
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "target_parameters"):
        if value := config.content.get(name):
            facts[name] = shown(value)
    return facts, {name: (tensor.shape, tensor.dtype) for name, tensor in header.tensors.items()}


def _describe_dcp(path: Path) -> tuple[dict[str, str], Entries]:
    manifest = verify_directory(path)
    with reading(f"the metadata in {path / MANIFEST}", "create the checkpoint again"):
        facts = _facts(path, manifest)
    return facts, CheckpointReader(path, manifest).tensors


def _facts(path: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    metadata: dict[str, Any] = manifest["metadata"]
    tracker = read_tracker(path.parent)
    facts = {
        "directory": str(path),
        "format": f"distributed checkpoint, {counted(len(manifest['files']), 'file')}, sizes as recorded",
        "kind": shorten(metadata.get("kind", "training")),
        "tracker": "none" if tracker is None else str(tracker),
        "expert layout": str(metadata.get("expert_layout", "hub")),
    }
    if metadata.get("kind") == "converted":
        source = metadata["source"]
        layout = f" in {source['expert_layout']} layout" if "expert_layout" in source else ""
        facts["made from"] = counted(len(source["files"]), "file") + layout
    base = Base.recorded(manifest)
    if base is not None:
        facts["holds"] = f"a part of the model, over the base {base.path}"
    if LORA_KEY in metadata:
        options = recorded_options(path, manifest)
        scale = "alpha / sqrt(rank)" if options.use_rslora else "alpha / rank"
        targets = metadata[LORA_KEY].get("targets", ())
        facts["LoRA"] = f"rank {options.r}, of experts {options.expert_r}, alpha {options.alpha:g}, scale {scale}"
        facts["LoRA targets"] = shorten(" ".join(map(str, targets)))
    model_config = metadata.get(MODEL_CONFIG_KEY, metadata.get("geometry"))  # the second in older checkpoints
    if isinstance(model_config, Mapping):
        text = model_config.get("text", model_config)
        sizes = {"num_layers": "layers", "hidden_size": "hidden size", "num_experts": "experts"}
        known = [f"{words} {text[key]}" for key, words in sizes.items() if key in text]
        facts["model"] = ", ".join([str(model_config.get("model_type")), *known])
    return facts


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
