"""Hugging Face model directories: checked weights, loading into a sharded model, and the files besides weights."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.checkpoint.directory import MANIFEST
from mindspeed_mm.checkpoint.files import combine, crc32, file_checksum, format_checksum
from mindspeed_mm.checkpoint.safetensors_io import (
    Header,
    StoredTensor,
    listed,
    read_header,
    read_tensor,
    split_rows,
    tensor_bytes,
)
from mindspeed_mm.checkpoint.shards import ShardSlice, local_shard
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.models.state_dict import ExpertLayout, TransposeExperts, WeightRule, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LAYOUT_KEY = "expert_layout"
"""Key in a safetensors file's own metadata under which mm-convert records the expert layout."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
_FOLDERS = ("additional_chat_templates",)  # the only folder that transformers reads
_DTYPE_KEYS = ("dtype", "torch_dtype")  # in transformers 5 and in earlier versions
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def config_dtype(directory: Path) -> torch.dtype | None:
    """The dtype in ``config.json``, None if there is none."""
    config = json.loads((directory / "config.json").read_text())
    for holder in (config, config.get("text_config") or {}):
        for key in _DTYPE_KEYS:
            if (name := holder.get(key)) in _DTYPES:
                return _DTYPES[name]
    return None


def copy_assets(source: Path, target: Path, *, dtype: torch.dtype | None) -> None:
    """Copy all files except weights.

    Args:
        source: Hugging Face directory.
        target: existing directory.
        dtype: of the weights in ``target``, None if they have several; written to ``config.json`` if that differs.
    """
    for path in sorted(source.iterdir()):
        name = path.name
        is_weight = path.suffix in _WEIGHT_SUFFIXES or name.endswith(".index.json")
        if path.is_file() and not is_weight and name != MANIFEST and not name.startswith("."):
            shutil.copyfile(path, target / name)
        elif path.is_dir() and name in _FOLDERS:
            shutil.copytree(path, target / name, dirs_exist_ok=True)
    if dtype not in (None, config_dtype(target)):
        config = json.loads((target / "config.json").read_text())
        _set_dtype(config, str(dtype).removeprefix("torch."))
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_replaceable(target: Path, *, overwrite: bool, keep: Sequence[Path]) -> None:
    """Refuse a target that exists and is not a model directory, or that contains a source.

    Args:
        target: directory of the result.
        overwrite: whether an existing model directory may be replaced.
        keep: directories that are read.

    Raises:
        UserError: with the reason.
    """
    resolved = target.resolve()
    for path in keep:
        if resolved == path.resolve() or resolved in path.resolve().parents:
            raise UserError(f"--save_dir {target} is or holds {path}, which is read from; name another directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save_dir {target} is a file; name another directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--save_dir {target} exists; pass --overwrite to replace it, or name another directory")
    if not (target / "config.json").is_file():
        raise UserError(f"--save_dir {target} is not a model directory, so it is not replaced; name another directory")


def _set_dtype(config: dict[str, Any], name: str) -> None:
    nested = [config.get(key) for key in ("text_config", "vision_config")]
    for holder in [config, *(inner for inner in nested if isinstance(inner, dict))]:
        for key in _DTYPE_KEYS:
            if key in holder:
                holder[key] = name
    if not any(key in config for key in _DTYPE_KEYS):
        config["torch_dtype"] = name


@dataclasses.dataclass(frozen=True)
class ReadRange:
    """Bytes that were read from a source file, and their checksum."""

    file: str
    start: int
    length: int
    crc: int


class HFSource:
    """The tensors of a Hugging Face directory and the rules that convert them, checked before use.

    Attributes:
        directory: as given.
        spec: its model family.
        model_config: from its ``config.json``.
        layout: of its experts: ``hub`` or ``v5``.
        rules: the weight map for this config and layout.
        tensors: location of each tensor, by name.
        duplicates: tensors that are not converted, as they repeat others: an ``lm_head`` with tied embeddings.
    """

    def __init__(self, directory: str | Path, *, expert_layout: str = "auto") -> None:
        """
        Args:
            directory: with ``config.json`` and safetensors files, with or without an index.
            expert_layout: ``hub``, ``v5``, or ``auto``: recorded in the files, else decided by shapes, else refused.

        Raises:
            UserError: naming what is missing, unexpected, damaged or of another shape or type.
        """
        self.directory = Path(directory)
        self.spec = spec_of(self.directory)
        self.model_config: ModelConfig = self.spec.read_config(self.directory)
        self._headers = read_headers(self.directory)
        self.tensors: dict[str, StoredTensor] = {}
        for header in self._headers.values():
            self.tensors.update(header.tensors)
        self.layout: ExpertLayout = self._decide_layout(expert_layout)
        self.rules = self.spec.weight_rules(self.model_config, expert_layout=self.layout)
        self._repeated = self.spec.repeated_tensors(self.model_config)
        self.duplicates: list[str] = []
        self._check()

    def dtype_of(self, rule: WeightRule) -> torch.dtype:
        """The dtype of a rule's tensors on disk."""
        return self.tensors[rule.sources[0][0]].dtype

    def read(self, name: str, rows: tuple[int, int] | None = None) -> tuple[Tensor, ReadRange]:
        """Read a tensor, or rows [a, b) of it on axis 0."""
        stored = self.tensors[name]
        first, last = rows or (0, stored.shape[0])
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        start = stored.start + first * row_bytes
        tensor = read_tensor(stored.file, start, stored.dtype, (last - first, *stored.shape[1:]))
        crc = crc32(tensor_bytes(tensor))
        return tensor, ReadRange(stored.file.name, start, (last - first) * row_bytes, crc)

    def check_duplicates(self) -> list[ReadRange]:
        """Compare duplicates with the tensors that they repeat.

        Raises:
            UserError: if a tied ``lm_head`` differs from the embeddings.
        """
        ranges = []
        for name in self.duplicates:
            repeated = self._repeated[name]
            stored = self.tensors[name]
            row_bytes = stored.nbytes // stored.shape[0]
            for rows in split_rows(stored.shape[0], row_bytes):
                duplicate, read = self.read(name, rows)
                original, _ = self.read(repeated, rows)
                ranges.append(read)
                if not torch.equal(duplicate.view(torch.uint8), original.view(torch.uint8)):
                    raise UserError(
                        f"{self.directory}: config.json ties the embeddings, but {name} differs from {repeated}; "
                        "set tie_word_embeddings to false in config.json, or remove the tensor"
                    )
        return ranges

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and modification time of each source file."""
        paths = [self.directory / "config.json", *(self.directory / name for name in self._headers)]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    def file_facts(self, ranges: Iterable[ReadRange]) -> dict[str, dict[str, Any]]:
        """Size and checksum of each source file, joined from the ranges that the conversion has read.

        Args:
            ranges: all ranges read; together they cover the data of every file.
        """
        facts = {}
        by_file: dict[str, list[ReadRange]] = {name: [] for name in self._headers}
        for read in ranges:
            by_file[read.file].append(read)
        for name, header in self._headers.items():
            path = self.directory / name
            with path.open("rb") as file:
                crc, end = crc32(file.read(header.length)), header.length
            for read in sorted(by_file[name], key=lambda r: r.start):
                if read.start != end:
                    raise AssertionError(f"{name}: bytes {end} to {read.start} were never read")
                crc, end = combine(crc, read.crc, read.length), end + read.length
            facts[name] = {"size": end, "checksum": format_checksum(crc)}
        config = self.directory / "config.json"
        facts["config.json"] = {"size": config.stat().st_size, "checksum": file_checksum(config)}
        return facts

    def transformers_version(self) -> str | None:
        """The version of transformers that wrote ``config.json``, None if not recorded."""
        return json.loads((self.directory / "config.json").read_text()).get("transformers_version")

    def _decide_layout(self, requested: str) -> ExpertLayout:
        if requested in ("hub", "v5"):
            return requested  # type: ignore[return-value]
        if self.model_config.num_experts == 0:
            return "hub"
        recorded = {header.metadata.get(LAYOUT_KEY) for header in self._headers.values()}
        if recorded in ({"hub"}, {"v5"}):
            return recorded.pop()  # type: ignore[return-value]
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        decided = layout_by_shapes(shapes, self.spec, self.model_config)
        if decided is None:
            raise UserError(
                f"{self.directory}: the experts' matrices are square, so their shapes do not tell the layout; pass "
                "--expert-layout hub for the published layout (also transformers 4.57), or --expert-layout v5 for a "
                "model that transformers 5 has saved"
            )
        return decided

    def _check(self) -> None:
        expected = hf_shapes(self.rules)
        found = dict(self.tensors)
        for name in [name for name in self._repeated if name in found]:
            if found.pop(name).shape == expected[self._repeated[name]]:
                self.duplicates.append(name)
        problems = [
            *listed("missing", sorted(expected.keys() - found.keys())),
            *listed("unexpected", sorted(found.keys() - expected.keys())),
        ]
        wrong = [
            f"{name} is {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        problems += listed("of another shape", wrong)
        for rule in self.rules:
            types = {self.tensors[name].dtype for name, _ in rule.sources if name in self.tensors}
            if len(types) > 1:
                problems.append(f"{', '.join(name for name, _ in rule.sources)} differ in type")
        if problems:
            raise UserError(
                f"{self.directory} does not fit its config.json ({self.layout} expert layout): {'; '.join(problems)}; "
                "download it again, or correct config.json or --expert-layout"
            )


def layout_by_shapes(
    shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, model_config: ModelConfig
) -> ExpertLayout | None:
    """The expert layout of tensors of these shapes; None if a matrix is square, so that both layouts fit.

    One square matrix of the two is enough to refuse: transformers 5 leaves a square one as it is and transposes the
    other, so a directory that it has saved may hold one of each. Shapes that fit neither layout count as ``hub``; the
    comparison with the config then names them.
    """
    rules = spec.weight_rules(model_config, expert_layout="v5")
    expected = hf_shapes([rule for rule in rules if isinstance(rule.transform, TransposeExperts)])
    if any(shape[1] == shape[2] for shape in expected.values()):
        return None
    experts = expected.keys() & shapes.keys()
    return "v5" if experts and all(shapes[name] == expected[name] for name in experts) else "hub"


def read_headers(directory: Path) -> dict[str, Header]:
    """Headers of all weight files by file name, compared with the index if there is one."""
    index = directory / INDEX
    if not index.is_file():
        single = directory / SINGLE
        if not single.is_file():
            raise UserError(f"{directory} has neither {INDEX} nor {SINGLE}; download the weights (step 2 of the guide)")
        return {SINGLE: read_header(single)}
    try:
        weight_of = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error}); download it again") from error
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise UserError(
            f"{directory} lacks {len(absent)} of {len(files)} weight files named by {INDEX}: {', '.join(absent[:3])}"
            f"{', ...' if len(absent) > 3 else ''}; download them (step 2 of the guide)"
        )
    headers = {name: read_header(directory / name) for name in files}
    wrong = [name for name, file in weight_of.items() if name not in headers[file].tensors]
    extra = [
        name for file, header in headers.items() for name in header.tensors if weight_of.get(name) != file
    ]
    problems = [*listed("not in the file that the index names", wrong), *listed("not in the index", extra)]
    if problems:
        raise UserError(f"{index} does not describe its files: {'; '.join(problems)}; download it again")
    return headers


@torch.no_grad()
def load_hf_weights(
    model: nn.Module, directory: str | Path, *, expert_layout: str = "auto", names: Collection[str] | None = None
) -> None:
    """Fill the model's parameters, in place, from a Hugging Face directory.

    Each rank reads only the rows of its local shards, except that experts of the ``v5`` layout that are sharded within
    an expert are read whole. Host memory grows by a chunk of ``ROW_CHUNK_BYTES``.

    Args:
        model: sharded or not, with storage.
        directory: with ``config.json`` and safetensors files.
        expert_layout: of ``directory``: ``auto``, ``hub`` or ``v5``, as of ``HFSource``.
        names: of the parameters to fill; None for all.

    Raises:
        UserError: naming tensors that are missing, unexpected, damaged or of another shape.
    """
    source = HFSource(directory, expert_layout=expert_layout)
    parameters = dict(model.named_parameters())
    for rule in source.rules:
        parameter = parameters.pop(rule.target)
        local, shard_slice = local_shard(parameter)
        if local.numel() and (names is None or rule.target in names):
            _fill(local, shard_slice, rule, source)
    if parameters:
        raise AssertionError(f"the weight map does not know {sorted(parameters)[:3]}")


def _fill(local: Tensor, shard_slice: ShardSlice, rule: WeightRule, source: HFSource) -> None:
    """Copy ``shard_slice`` of the rule's parameter into ``local``, chunk by chunk."""
    (first, last), *inner = shard_slice
    inner_index = tuple(slice(start, end) for start, end in inner)
    if rule.is_copy and inner and inner[0] != (0, rule.target_shape[1]):
        # sharded within experts: a contiguous range of each expert
        stored = source.tensors[rule.sources[0][0]]
        for row in range(first, last):
            local[row - first].copy_(_read_rows(stored, *inner[0], expert=row))
        return
    for at, index, start, end in _runs(rule, first, last):
        stored = source.tensors[rule.sources[index][0]]
        for begin, stop in split_rows(end - start, stored.nbytes // stored.shape[0]):
            values = _read_rows(stored, start + begin, start + stop)
            values = rule.to_mcore([values]) if rule.row_wise else values
            local[at + begin : at + stop].copy_(values[(slice(None), *inner_index)])


def _runs(rule: WeightRule, first: int, last: int) -> list[tuple[int, int, int, int]]:
    """The sources of rows [first, last) of a rule's parameter.

    Returns:
        (row, counted from ``first``; index of the source; its first row; its end row, exclusive) of each run of rows
        that is contiguous on both sides.
    """
    if rule.row_wise:
        return [(0, 0, first, last)]
    lengths = [shape[0] for _, shape in rule.sources]
    # Row numbers, converted by the rule, give the mapping; a gap between sources ends a run there.
    starts = [sum(lengths[:index]) + index for index in range(len(lengths))]
    numbers = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    order = rule.transform.to_mcore(numbers)[first:last]
    begins = [0, *((order.diff() != 1).nonzero().flatten() + 1).tolist()]
    runs = []
    for begin, end in zip(begins, [*begins[1:], last - first], strict=True):
        row = int(order[begin])
        index = max(i for i, start in enumerate(starts) if start <= row)
        runs.append((begin, index, row - starts[index], row - starts[index] + end - begin))
    return runs


def _read_rows(stored: StoredTensor, start: int, end: int, *, expert: int | None = None) -> Tensor:
    """Rows [start, end) of a stored tensor, or of one expert in it."""
    skipped, tail = (0, stored.shape[1:]) if expert is None else (expert * stored.shape[1], stored.shape[2:])
    row_bytes = math.prod(tail) * stored.dtype.itemsize
    return read_tensor(stored.file, stored.start + (skipped + start) * row_bytes, stored.dtype, (end - start, *tail))
