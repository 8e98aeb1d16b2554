"""A Hugging Face model directory as the source of a conversion, checked before any of it is used."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.checksum import combine, crc32, file_checksum, format_checksum
from mindspeed_mm.checkpoint.pieces import listed, split_rows
from mindspeed_mm.checkpoint.safetensors_io import Header, StoredTensor, read_header, read_tensor, tensor_bytes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import ModelConfig, ModelSpec, spec_of
from mindspeed_mm.models.state_dict import ExpertLayout, TransposeExperts, WeightRule, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LAYOUT_KEY = "expert_layout"
"""Key in a safetensors file's own metadata under which mm-convert records the expert layout."""


@dataclasses.dataclass(frozen=True)
class ReadRange:
    """Bytes that were read from a source file, and their checksum."""

    file: str
    start: int
    length: int
    crc: int


class HFSource:
    """The tensors of a Hugging Face directory and the rules that convert them.

    Attributes:
        directory: as given.
        spec: its model family.
        model_config: from its ``config.json``.
        layout: how its experts lie: ``hub`` or ``v5``.
        rules: the weight map for this geometry and layout.
        tensors: where each tensor lies, by name.
        dropped: tensors of the file that the model does not need: an ``lm_head`` that repeats tied embeddings.
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
        self.dropped: list[str] = []
        self._check()

    def dtype_of(self, rule: WeightRule) -> torch.dtype:
        """The type of a rule's tensors on disk."""
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

    def check_dropped(self) -> list[ReadRange]:
        """Compare tensors that will be dropped with those that they repeat.

        Raises:
            UserError: if a tied ``lm_head`` differs from the embeddings.
        """
        ranges = []
        for name in self.dropped:
            repeated = self._repeated[name]
            stored = self.tensors[name]
            row_bytes = stored.nbytes // stored.shape[0]
            for rows in split_rows(stored.shape[0], row_bytes):
                head, read = self.read(name, rows)
                embedding, _ = self.read(repeated, rows)
                ranges.append(read)
                if not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
                    raise UserError(
                        f"{self.directory}: config.json ties the embeddings, but {name} differs from {repeated}; "
                        "set tie_word_embeddings to false in config.json, or remove the tensor"
                    )
        return ranges

    def fingerprint(self) -> list[list[Any]]:
        """What changes when a source file is replaced: name, size and time of change of each."""
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
        """The version of transformers that wrote ``config.json``, where it says so."""
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
                f"{self.directory}: the experts' matrices are square, so their shapes do not tell their layout; pass "
                "--expert-layout hub "
                "for the published layout (also transformers 4.57), or --expert-layout v5 for a model that "
                "transformers 5 has saved"
            )
        return decided

    def _check(self) -> None:
        expected = hf_shapes(self.rules)
        found = dict(self.tensors)
        for name in [name for name in self._repeated if name in found]:
            if found.pop(name).shape == expected[self._repeated[name]]:
                self.dropped.append(name)
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
    """The expert layout that tensors of these shapes have; None where a matrix is square, so that they cannot tell.

    One square matrix of the two is enough to refuse: transformers 5 leaves a square one as it is and turns the other,
    so a directory that it has saved may hold one of each. Shapes that fit neither layout count as ``hub``, for the
    comparison with the config to name them.
    """
    rules = spec.weight_rules(model_config, expert_layout="v5")
    expected = hf_shapes([rule for rule in rules if isinstance(rule.transform, TransposeExperts)])
    if any(shape[1] == shape[2] for shape in expected.values()):
        return None
    experts = expected.keys() & shapes.keys()
    return "v5" if experts and all(shapes[name] == expected[name] for name in experts) else "hub"


def read_headers(directory: Path) -> dict[str, Header]:
    """Headers of all weight files by file name, checked against the index where there is one."""
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
