"""Hugging Face model directories: checked weights as a storage reader of torch's, and the files besides weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from mindspeed_mm.checkpoint.directory import ADAPTER_CONFIG, MANIFEST
from mindspeed_mm.checkpoint.files import combine, crc32, file_checksum, format_checksum, run_all
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.safetensors_io import (
    WEIGHT_DTYPES,
    Header,
    StoredTensor,
    listed,
    read_header,
    read_tensor,
    split_rows,
    tensor_bytes,
)
from mindspeed_mm.checkpoint.shards import Rows
from mindspeed_mm.checkpoint.storage import THREADS
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import (
    INDEX_BYTES,
    inside,
    is_directory,
    is_file,
    is_present,
    kind_of,
    open_regular,
    read_json,
    shorten,
)
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
    path = directory / "config.json"
    config = read_json(path) if is_present(path) else {}
    for holder in (config, config.get("text_config")):
        for key in _DTYPE_KEYS if isinstance(holder, dict) else ():
            if isinstance(name := holder.get(key), str) and name in _DTYPES:
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
            shutil.copytree(path, target / name, dirs_exist_ok=True, ignore=_special_files)
    if dtype not in (None, config_dtype(target)) and (target / "config.json").exists():
        config = read_json(target / "config.json")
        _set_dtype(config, str(dtype).removeprefix("torch."))
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _special_files(folder: str, names: Sequence[str]) -> list[str]:
    """What is neither file nor folder, such as a FIFO, which cannot be copied."""
    return [name for name in names if not is_file(Path(folder) / name) and not is_directory(Path(folder) / name)]


def check_replaceable(target: Path, *, overwrite: bool, keep: Sequence[Path]) -> None:
    """Refuse a target that exists and is not a model directory, or that contains a source.

    Args:
        target: directory of the result.
        overwrite: whether an existing model directory may be replaced.
        keep: directories that are read.

    Raises:
        UserError: with the reason.
    """
    resolved = Path(os.path.realpath(target))  # Path.resolve raises for a loop of links
    for path in keep:
        if resolved in (real := Path(os.path.realpath(path)), *real.parents):
            raise UserError(f"--save_dir {target} is or holds {path}, which is read from; name another directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save_dir {target} is a file; name another directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--save_dir {target} exists; pass --overwrite to replace it, or name another directory")
    if not any((target / name).is_file() for name in ("config.json", INDEX, SINGLE, ADAPTER_CONFIG)):
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


class SafetensorsReader(FileSystemReader):
    """The parameters that rules make of the tensors of a directory, by their names in a checkpoint.

    torch's ``load`` fills a state dict from it as from a distributed checkpoint; each rank reads only its rows.

    Attributes:
        path: the directory.
        rules: that make a parameter of one or more stored tensors.
        tensors: shape and dtype of each parameter.
        stored: location of each stored tensor.
    """

    def __init__(self, path: Path, headers: Mapping[str, Header], rules: Sequence[WeightRule]) -> None:
        """
        Args:
            path: the directory.
            headers: of its safetensors files, by name.
            rules: whose sources are all there.
        """
        super().__init__(path)
        self.path, self.rules = path, rules
        self._headers = headers
        self.stored: dict[str, StoredTensor] = {}
        for header in headers.values():
            self.stored.update(header.tensors)
        self._rules = {MODEL_PREFIX + rule.target: rule for rule in rules}
        self.tensors = {
            name: (rule.target_shape, self.stored[rule.sources[0][0]].dtype) for name, rule in self._rules.items()
        }

    def read(self, name: str, rows: Rows | None = None, reads: list[ReadRange] | None = None) -> Tensor:
        """A parameter, or rows [a, b) of it on axis 0.

        Args:
            name: of the parameter in a checkpoint.
            rows: None for all.
            reads: to which the ranges that are read are appended, with their checksums.
        """
        rule = self._rules[name]
        if not rule.target_shape:
            return self.read_stored(rule.sources[0][0], (0, 1), reads)
        first, last = rows or (0, rule.target_shape[0])
        if rule.row_wise:
            return rule.to_mcore([self.read_stored(rule.sources[0][0], (first, last), reads)])
        parts = [
            self.read_stored(rule.sources[index][0], (begin, end), reads)
            for index, begin, end in _runs(rule, first, last)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def ranges(self, name: str) -> list[Rows]:
        """Ranges of rows of about ``READ_BYTES`` that make up a parameter."""
        shape, dtype = self.tensors[name]
        return split_rows(shape[0], math.prod(shape[1:]) * dtype.itemsize) if shape else [(0, 1)]

    def origins(self, name: str, rows: Rows) -> list[tuple[str, int]]:
        """The stored tensors that rows [a, b) of a parameter come from, one after another: (name, number of rows)."""
        rule = self._rules[name]
        if rule.row_wise:
            return [(rule.sources[0][0], rows[1] - rows[0])]
        return [(rule.sources[index][0], end - begin) for index, begin, end in _runs(rule, *rows)]

    def is_copy(self, name: str) -> bool:
        """Whether a parameter has the bytes of one stored tensor."""
        return self._rules[name].is_copy

    def read_stored(self, name: str, rows: Rows, reads: list[ReadRange] | None = None) -> Tensor:
        """Rows [a, b) of a stored tensor."""
        stored = self.stored[name]
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        shape = (rows[1] - rows[0], *stored.shape[1:]) if stored.shape else ()
        start = stored.start + rows[0] * row_bytes
        tensor = read_tensor(stored.file, start, stored.dtype, shape)
        if reads is not None:
            reads.append(ReadRange(stored.file.name, start, tensor.nbytes, crc32(tensor_bytes(tensor))))
        return tensor

    def verify_whole_files(self, names: Iterable[str], announce: Callable[[str], None]) -> None:
        """Nothing, since nothing records checksums of the files; see ``CheckpointReader``."""

    def read_unused(self) -> list[ReadRange]:
        """Read the stored tensors that no parameter is made of; returns what was read."""
        reads: list[ReadRange] = []
        used = {name for rule in self.rules for name, _ in rule.sources}
        for name in self.stored.keys() - used:
            stored = self.stored[name]
            rows = stored.shape[0] if stored.shape else 1
            for part in split_rows(rows, stored.nbytes // max(1, rows)):
                self.read_stored(name, part, reads)
        return reads

    def _read_box(self, item: ReadItem) -> Tensor:
        """The part of a parameter that an item asks for."""
        name, sizes = item.storage_index.fqn, tuple(item.lengths)
        begin = [a + b for a, b in zip(item.storage_index.offset, item.storage_offsets, strict=True)]
        rule, (shape, dtype) = self._rules[name], self.tensors[name]
        first, last = begin[0], begin[0] + sizes[0]
        if rule.is_copy and len(shape) > 2 and sizes[1] < shape[1] and sizes[2:] == shape[2:]:
            # sharded within experts: a contiguous range of each expert
            stored = self.stored[rule.sources[0][0]]
            inner = math.prod(shape[2:]) * dtype.itemsize
            starts = [stored.start + (row * shape[1] + begin[1]) * inner for row in range(first, last)]
            return torch.stack([read_tensor(stored.file, start, dtype, sizes[1:]) for start in starts])
        values = self.read(name, (first, last))
        return values[(slice(None), *(slice(b, b + s) for b, s in zip(begin[1:], sizes[1:], strict=True)))]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan."""

        def fill(item: ReadItem) -> None:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._read_box(item))
            planner.commit_tensor(item, target)

        run_all([functools.partial(fill, item) for item in plan.items], threads=THREADS)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The parameters as chunks of rows."""
        entries = {}
        for name, (shape, dtype) in self.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size([a, *[0] * (len(shape) - 1)]), torch.Size([b - a, *shape[1:]]))
                for a, b in self.ranges(name)
            ]
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
        return Metadata(entries, storage_data={})

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and modification time of each source file."""
        paths = [self.path / "config.json", *(self.path / name for name in self._headers)]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.exists()]

    def file_facts(self, ranges: Iterable[ReadRange]) -> dict[str, dict[str, Any]]:
        """Size and checksum of each source file, joined from the ranges that a conversion has read.

        Args:
            ranges: all ranges read, some perhaps twice; together they cover the data of every file.
        """
        facts = {}
        by_file: dict[str, dict[int, ReadRange]] = {name: {} for name in self._headers}
        for read in ranges:
            if read.length:  # an empty tensor begins where another does
                by_file[read.file][read.start] = read
        for name, header in self._headers.items():
            path = self.path / name
            with os.fdopen(open_regular(path, limit=1 << 62), "rb") as file:
                crc, end = crc32(file.read(header.length)), header.length
            for start, read in sorted(by_file[name].items()):
                if start != end:
                    raise AssertionError(f"{name}: bytes {end} to {start} were never read")
                crc, end = combine(crc, read.crc, read.length), end + read.length
            facts[name] = {"size": end, "checksum": format_checksum(crc)}
        config = self.path / "config.json"
        if config.exists():
            facts["config.json"] = {"size": config.stat().st_size, "checksum": file_checksum(config)}
        return facts


@functools.lru_cache(maxsize=32)
def _row_map(rule: WeightRule) -> list[tuple[int, int, int, int]]:
    """Where the rows of a rule's parameter come from.

    Returns:
        (first row, index of the source, its first row, number of rows) of each run that is contiguous on both sides.
    """
    lengths = [shape[0] for _, shape in rule.sources]
    # Row numbers, converted by the rule, give the mapping; a gap between sources ends a run there.
    starts = [sum(lengths[:index]) + index for index in range(len(lengths))]
    numbers = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    order = rule.transform.to_mcore(numbers)
    begins = [0, *((order.diff() != 1).nonzero().flatten() + 1).tolist(), len(order)]
    runs = []
    for begin, end in zip(begins, begins[1:], strict=False):
        row = int(order[begin])
        index = max(i for i, start in enumerate(starts) if start <= row)
        runs.append((begin, index, row - starts[index], end - begin))
    return runs


def _runs(rule: WeightRule, first: int, last: int) -> list[tuple[int, int, int]]:
    """(index of the source, its first row, its end row) of each run in rows [first, last) of a rule's parameter."""
    found = []
    for row, index, source, count in _row_map(rule):
        begin, end = max(first, row), min(last, row + count)
        if begin < end:
            found.append((index, source + begin - row, source + end - row))
    return found


class HFReader(SafetensorsReader):
    """The parameters of a Hugging Face model, checked before use against its ``config.json``.

    Attributes:
        spec: its model family.
        model_config: from its ``config.json``.
        layout: of its experts: ``hub`` or ``v5``.
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
        path = Path(directory)
        self.spec = spec_of(path)
        self.model_config: ModelConfig = self.spec.read_config(path)
        if is_present(path / ADAPTER_CONFIG):
            raise UserError(f"{path} has {ADAPTER_CONFIG}, and transformers would add that adapter to the weights; "
                            "merge it, or move it elsewhere")
        headers = read_headers(path)
        found = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
        self.layout = decide_layout(path, headers, self.spec, self.model_config, expert_layout)
        rules = self.spec.weight_rules(self.model_config, expert_layout=self.layout)
        self._repeated = self.spec.repeated_tensors(self.model_config)
        self.duplicates = check_tensors(path, found, rules, self._repeated, self.layout)
        super().__init__(path, headers, rules)

    def read_unused(self) -> list[ReadRange]:
        """Compare duplicates with the tensors that they repeat; returns what was read of the former.

        Raises:
            UserError: if a tied ``lm_head`` differs from the embeddings.
        """
        reads: list[ReadRange] = []
        for name in self.duplicates:
            stored = self.stored[name]
            for rows in split_rows(stored.shape[0], stored.nbytes // stored.shape[0]):
                duplicate = self.read_stored(name, rows, reads)
                original = self.read_stored(self._repeated[name], rows)
                if not torch.equal(duplicate.view(torch.uint8), original.view(torch.uint8)):
                    raise UserError(
                        f"{self.path}: config.json ties the embeddings, but {name} differs from "
                        f"{self._repeated[name]}; set tie_word_embeddings to false in config.json, or remove the tensor"
                    )
        return reads

    def transformers_version(self) -> str | None:
        """The version of transformers that wrote ``config.json``, None if not recorded."""
        return read_json(self.path / "config.json").get("transformers_version")


def decide_layout(
    path: Path, headers: Mapping[str, Header], spec: ModelSpec, model_config: ModelConfig, requested: str
) -> ExpertLayout:
    if requested in ("hub", "v5"):
        return requested  # type: ignore[return-value]
    if model_config.num_experts == 0:
        return "hub"
    recorded = {header.metadata.get(LAYOUT_KEY) for header in headers.values()}
    if recorded in ({"hub"}, {"v5"}):
        return recorded.pop()  # type: ignore[return-value]
    shapes = {name: tensor.shape for header in headers.values() for name, tensor in header.tensors.items()}
    decided = layout_by_shapes(shapes, spec, model_config)
    if decided is None:
        raise UserError(
            f"{path}: the experts' matrices are square, so their shapes do not tell the layout; pass "
            "--expert-layout hub for the published layout (also transformers 4.57), or --expert-layout v5 for a "
            "model that transformers 5 has saved"
        )
    return decided


def check_tensors(
    path: Path,
    stored: Mapping[str, StoredTensor],
    rules: Sequence[WeightRule],
    repeated: Mapping[str, str],
    layout: ExpertLayout,
) -> list[str]:
    """Compare the stored tensors with the rules; returns those that repeat others."""
    expected = hf_shapes(rules)
    duplicates = [name for name in repeated if name in stored and stored[name].shape == expected[repeated[name]]]
    found = {name: tensor for name, tensor in stored.items() if name not in repeated}
    wrong = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        *listed("missing", sorted(expected.keys() - found.keys())),
        *listed("unexpected", sorted(found.keys() - expected.keys())),
        *listed("of another shape", wrong),
    ]
    for rule in rules:
        types = {found[name].dtype for name, _ in rule.sources if name in found}
        if len(types) > 1:
            problems.append(f"{', '.join(name for name, _ in rule.sources)} differ in type")
    if problems:
        raise UserError(
            f"{path} does not fit its config.json ({layout} expert layout): {'; '.join(problems)}; "
            "download it again, or correct config.json or --expert-layout"
        )
    return duplicates


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


def read_weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, by the weight index of ``directory``; the files are inside it.

    Raises:
        UserError: if the index is damaged, or names a file elsewhere.
    """
    index, remedy = directory / INDEX, "download it again"
    weight_map = read_json(index, remedy=remedy, limit=INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} cannot be read: its weight_map is {kind_of(weight_map)}; {remedy}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(f"{index} cannot be read: the file of {shorten(tensor)} is {kind_of(name)}; {remedy}")
        inside(index, name)  # for the message: the name is one of the index's
    if not weight_map:
        raise UserError(f"{index} cannot be read: its weight_map names no tensors; {remedy}")
    return weight_map


def read_headers(directory: Path, *, dtypes: Mapping[str, torch.dtype] = WEIGHT_DTYPES) -> dict[str, Header]:
    """Headers of all weight files by file name, compared with the index if there is one.

    Args:
        directory: Hugging Face directory.
        dtypes: that the tensors may have.

    Raises:
        UserError: if there are no weight files, some are missing, or the index contradicts them or stands beside
            another model's single file; and as ``read_header``.
    """
    index, single = directory / INDEX, directory / SINGLE
    both = is_present(index) and is_present(single)  # a FIFO or a broken link is refused when it is read
    if both and set(read_weight_map(directory).values()) != {SINGLE}:
        raise UserError(
            f"{directory} has both {INDEX} and {SINGLE}, and transformers would read the second; remove the one that "
            "is not meant"
        )
    if not is_present(index):
        if not is_present(single):
            raise UserError(f"{directory} has neither {INDEX} nor {SINGLE}; download the weights (step 2 of the guide)")
        return {SINGLE: read_header(single, dtypes=dtypes)}
    weight_of = read_weight_map(directory)
    files = sorted(set(weight_of.values()))
    absent = [name for name in files if not is_file(inside(directory, name))]
    if absent:
        raise UserError(
            f"{directory} lacks {len(absent)} of {len(files)} weight files named by {INDEX}: {', '.join(absent[:3])}"
            f"{', ...' if len(absent) > 3 else ''}; download them (step 2 of the guide)"
        )
    headers = {name: read_header(directory / name, dtypes=dtypes) for name in files}
    wrong = [name for name, file in weight_of.items() if name not in headers[file].tensors]
    extra = [
        name for file, header in headers.items() for name in header.tensors if weight_of.get(name) != file
    ]
    problems = [*listed("not in the file that the index names", wrong), *listed("not in the index", extra)]
    if problems:
        raise UserError(f"{index} does not describe its files: {'; '.join(problems)}; download it again")
    return headers
