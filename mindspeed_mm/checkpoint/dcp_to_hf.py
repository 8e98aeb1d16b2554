"""Distributed checkpoint -> Hugging Face directory in the published layout.

Chunks are read ahead while safetensors files are written one after another; torch's own writer of these files needs a
whole one in memory.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.check_hf import lacking_assets
from mindspeed_mm.checkpoint.contents import check_model_config
from mindspeed_mm.checkpoint.conversion import (
    DTYPES,
    HELD_BYTES,
    ProgressBar,
    default_workers,
    digest,
    locked,
    open_reader,
    read_ahead,
    remaining,
    resumable,
    writing,
)
from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    MEDIA_KEY,
    METADATA,
    AtomicDirectory,
    WrittenFile,
    check_huggingface,
    find_checkpoint,
    verify_directory,
)
from mindspeed_mm.checkpoint.files import format_checksum, new_file, run_all
from mindspeed_mm.checkpoint.huggingface import (
    INDEX,
    LAYOUT_KEY,
    SINGLE,
    check_replaceable,
    config_dtype,
    copy_assets,
    layout_by_shapes,
)
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.partial import refuse_lora
from mindspeed_mm.checkpoint.safetensors_io import build_header, listed, tensor_bytes
from mindspeed_mm.checkpoint.shards import Rows
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelSpec, spec_of
from mindspeed_mm.models.state_dict import WeightRule

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

    Only the model's parameters are read. Experts are always written in the published layout. If the checkpoint records
    the limits of the training's images and videos, the processor files get them, and a line says what has changed. An
    interrupted conversion leaves no ``save_dir``; the same command resumes it and keeps finished files.

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
    manifest = verify_directory(checkpoint, plain=not check)
    refuse_lora(manifest, checkpoint)
    spec = spec_of(assets)
    model_config = spec.read_config(assets)
    reader = open_reader(checkpoint, manifest, base_dir=base_dir, check=check)
    rules = spec.weight_rules(model_config, expert_layout="hub")
    check_parameters(
        reader, rules, checkpoint, assets, remedy="pass the --model_assets_dir of the model that was trained"
    )
    check_model_config(checkpoint, manifest, model_config, source=assets / "config.json")
    if dtype == "auto":
        target = None if manifest["metadata"].get("kind") == "converted" else config_dtype(assets)
    else:
        target = DTYPES[dtype]
    outputs = [Output(rule, reader, target) for rule in rules]
    facts = {
        "weight_map_version": spec.weight_map_version,
        LAYOUT_KEY: "hub",
        "source": {"checkpoint": str(checkpoint), METADATA: manifest["files"].get(METADATA)},
    }
    processors, changes = trained_processors(manifest, checkpoint, assets, spec)
    write_safetensors(
        outputs, save, checkpoint=checkpoint, assets=assets, facts=facts, max_shard_size=max_shard_size,
        workers=workers, overwrite=overwrite, replaced=processors,
    )
    print_notes(save, assets, spec, model_config, changes)
    return save


def print_notes(save: Path, assets: Path, spec: ModelSpec, model_config: Any, changes: Sequence[str]) -> None:
    """Print what a user of a written directory should know.

    Args:
        save: the directory.
        assets: that its other files are from.
        spec: of the model.
        model_config: likewise.
        changes: from :func:`trained_processors`.
    """
    if changes:
        print(f"processor settings are the training's: {', '.join(changes)}")
    if model_config.num_experts and layout_by_shapes({}, spec, model_config) is None:
        print(
            "note: with these widths transformers 5 cannot tell the expert layout from shapes and misreads the "
            "published layout, which was written; load it with transformers 4.57"
        )
    if warning := incomplete_assets(assets, save, spec, model_config):
        print(f"warning: {warning}")


def incomplete_assets(assets: Path, save: Path, spec: ModelSpec, model_config: Any) -> str:
    """That a directory which gives an export its small files lacks some, and for whom; empty if it is complete.

    Args:
        assets: that directory.
        save: of the export, for the message.
        spec: of the model.
        model_config: likewise.
    """
    lacking = lacking_assets(assets, spec, model_config)
    remedy = "copy the files from the original model directory, and see mm-convert check_hf"
    return f"{assets} is incomplete, and so is {save}: {lacking}; {remedy}" if lacking else ""


def write_safetensors(
    outputs: Sequence[Output],
    save: Path,
    *,
    checkpoint: Path,
    assets: Path,
    facts: Mapping[str, Any],
    max_shard_size: int,
    workers: int | None,
    overwrite: bool,
    replaced: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "dcp_to_hf",
) -> None:
    """Write a directory of safetensors files from the parameters of a checkpoint.

    Args:
        outputs: to write, in this order.
        save: directory of the result.
        checkpoint: that is read.
        assets: directory of the other files.
        facts: for the manifest.
        max_shard_size: bytes of tensors in one file, at most, unless those of one parameter are more.
        workers: threads; None for the default.
        overwrite: replace ``save``.
        replaced: name -> content of those JSON files that take the place of the ones in ``assets``.
        title: of the progress bar.
    """
    if save.name in ("", ".."):
        raise UserError(f"--save_dir {save} cannot be replaced by the result; name the directory itself")
    files = plan_files(outputs, max_shard_size)
    source = [(checkpoint / name).stat() for name in (METADATA, MANIFEST) if (checkpoint / name).exists()]
    plan = digest(
        [
            str(checkpoint.resolve()), [[s.st_mtime_ns, s.st_size] for s in source], facts,
            [[name, [[*output.describe()] for output in shard]] for name, shard in files.items()],
        ]
    )
    # An empty target directory is replaced.
    directory = AtomicDirectory(save, overwrite=overwrite or save.is_dir())
    committed = directory.is_committed(plan)
    if not committed:
        check_replaceable(save, overwrite=overwrite, keep=(checkpoint, assets))
    with writing(save), locked(save):
        if not committed:
            outputs[0].reader.verify_whole_files([output.name for output in outputs], print)
            with resumable(directory, plan) as finished:
                header = {"format": "pt", **{key: facts[key] for key in (LAYOUT_KEY,) if key in facts}}
                written = _write_files(directory, files, header, finished, workers or default_workers(), title)
                _write_index(directory.partial, files)
                types = {output.dtype for output in outputs}
                copy_assets(assets, directory.partial, dtype=types.pop() if len(types) == 1 else None)
                for name, values in (replaced or {}).items():
                    text = json.dumps(values, indent=2, ensure_ascii=False)
                    (directory.partial / name).write_text(text + "\n", encoding="utf-8")
                content = {
                    "kind": "exported",
                    "plan": plan,
                    **facts,
                    "tensors": {name: fact for file in files for name, fact in written[file].facts["tensors"].items()},
                }
                directory.commit(content, written)
    directory.clean_up()  # after the lock file is gone, so that the same command completes this after a kill


def check_parameters(
    reader: Any, rules: Sequence[WeightRule], checkpoint: Path, assets: Path, *, remedy: str
) -> None:
    """Refuse a checkpoint whose parameters differ from the config's in name or shape, or have no weight dtype.

    Raises:
        UserError: ending with ``remedy``.
    """
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
        raise UserError(f"{checkpoint} does not fit {assets / 'config.json'}: {'; '.join(problems)}; {remedy}")


def trained_processors(
    manifest: Mapping[str, Any], checkpoint: Path, assets: Path, spec: ModelSpec
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Files and changes of :meth:`ModelSpec.with_trained_limits`; none if the checkpoint records no limits."""
    trained = manifest["metadata"].get(MEDIA_KEY)
    if trained is None:
        return {}, []
    return spec.with_trained_limits(assets, trained, source=f"{checkpoint / MANIFEST}: {MEDIA_KEY}")


class Output:
    """The Hugging Face tensors of one rule, to be written one after another to one file."""

    def __init__(
        self, rule: WeightRule, reader: Any, dtype: torch.dtype | None, *, shape: tuple[int, ...] | None = None
    ) -> None:
        """
        Args:
            rule: of the tensors.
            reader: of the checkpoint.
            dtype: to write; None for the stored one.
            shape: of the one tensor, if it has the same bytes as the rule's in another shape.
        """
        self.rule, self.reader, self.name = rule, reader, MODEL_PREFIX + rule.target
        self.sources = rule.sources if shape is None else ((rule.sources[0][0], shape),)
        stored = reader.tensors[self.name][1]
        self.dtype = dtype if dtype is not None and stored.is_floating_point else stored
        self.nbytes = math.prod(rule.target_shape) * self.dtype.itemsize

    def describe(self) -> Iterator[Any]:
        """What determines its bytes."""
        yield from (self.rule.target, self.sources, str(self.dtype))

    def jobs(self) -> Iterator[tuple[int, Callable[[], list[tuple[bool, Tensor]]]]]:
        """(bytes held, function that gives the next rows of the one tensor, or all tensors of the rule).

        With each tensor goes whether it is a new one.
        """
        rows = self.rule.target_shape[0] if self.rule.target_shape else 1
        row_elements = math.prod(self.rule.target_shape[1:])
        itemsize = max(self.dtype.itemsize, self.reader.tensors[self.name][1].itemsize)
        for first, last in self.reader.ranges(self.name) if self.rule.row_wise else [(0, rows)]:
            # the stored rows, their assembled chunks, and the result in its own order and dtype
            yield 3 * (last - first) * row_elements * itemsize, functools.partial(self._convert, (first, last))

    def _convert(self, rows: Rows) -> list[tuple[bool, Tensor]]:
        values = self.reader.read(self.name, rows)
        tensors = self.rule.to_hf(values) if values.dim() else (values,)
        return [
            (not self.rule.row_wise or rows[0] == 0, self._rounded(name, tensor, rows).contiguous())
            for (name, _), tensor in zip(self.sources, tensors, strict=True)
        ]

    def _rounded(self, name: str, tensor: Tensor, rows: Rows) -> Tensor:
        """The values to write of a Hugging Face tensor, or of its rows if the rule is row-wise."""
        return tensor.to(self.dtype)

    def facts(self, name: str) -> dict[str, Any]:
        """What else the manifest records of a tensor, once it is written."""
        return {}


def plan_files(outputs: Sequence[Output], max_shard_size: int) -> dict[str, list[Output]]:
    """Divide outputs into files in their order; the tensors of one rule stay together.

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


def _write_files(
    directory: AtomicDirectory,
    files: Mapping[str, list[Output]],
    header: Mapping[str, str],
    finished: Mapping[str, WrittenFile],
    workers: int,
    title: str,
) -> dict[str, WrittenFile]:
    """Write the files that are not finished; returns all."""
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    progress = ProgressBar(title)
    progress.begin(remaining(directory, total, finished))
    lanes = max(1, workers // _WORKERS_PER_FILE)
    written = dict(finished)

    def write(name: str) -> None:
        limit = HELD_BYTES // lanes
        file = _write_file(directory.partial / name, files[name], header, pool, limit, progress.advance)
        written[name] = directory.record(name, file)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            jobs = [functools.partial(write, name) for name in files if name not in finished]
            run_all(jobs, threads=lanes, stop=progress.stop)
        progress.print_totals()
    finally:
        progress.close()
    return written


def _write_file(
    path: Path,
    outputs: Sequence[Output],
    header: Mapping[str, str],
    pool: ThreadPoolExecutor,
    limit: int,
    advance: Callable[[int], None],
) -> WrittenFile:
    """Write one safetensors file, flush it to disk and return its checksum and those of its tensors."""
    sources = [(output, name, shape) for output in outputs for name, shape in output.sources]
    starts: list[int] = []
    with new_file(path, advance) as file:
        file.write(build_header([(name, output.dtype, shape) for output, name, shape in sources], header))
        for tensors in read_ahead((job for output in outputs for job in output.jobs()), pool, limit):
            for is_new, tensor in tensors:
                if is_new:
                    starts.append(file.tell())
                file.write(tensor_bytes(tensor))
        size = file.tell()
    ends = [*starts[1:], size]
    facts = {
        name: {
            "shape": list(shape),
            "dtype": str(output.dtype).removeprefix("torch."),
            "checksum": format_checksum(file.sections[start][1] if end > start else 0),
            **output.facts(name),
        }
        for (output, name, shape), start, end in zip(sources, starts, ends, strict=True)
    }
    return WrittenFile(size, format_checksum(file.crc), facts={"tensors": facts})


def _write_index(directory: Path, files: Mapping[str, list[Output]]) -> None:
    """Write the index from tensor to file; a single file has none."""
    if list(files) == [SINGLE]:
        return
    weight_of = {
        name: file for file, outputs in files.items() for output in outputs for name, _ in output.sources
    }
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_of.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n")
