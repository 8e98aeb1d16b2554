"""Reading LoRA adapters, from a directory in any form that PEFT, vLLM or SGLang take, or from a checkpoint.

Both give the adapters with the rank and the scale that the source records, and one factor at a time in the layout of
the mcore model: A [r, in], B [out, r], of experts A [E, in, r], B [E, out, r]; see
:mod:`mindspeed_mm.checkpoint.adapter_formats` for the layouts of files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.adapter_formats import (
    ADAPTER_WEIGHTS,
    INNER,
    KEY_PREFIX,
    ORIENTATION_KEY,
    expert_modules,
    split_name,
    unflatten_a,
    unflatten_b,
)
from mindspeed_mm.checkpoint.directory import ADAPTER, ADAPTER_CONFIG, MANIFEST
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.safetensors_io import Header, StoredTensor, listed, read_header, read_tensor
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, kind_of, read_json, shorten, shown
from mindspeed_mm.models.lora import ALL, LARGEST, LORA_KEY, Adapter, LoraOptions
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.state_dict import hf_shapes, mcore_shapes

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?")
"""Between module and ``weight`` there may be the adapter's name, as in a state dict of PEFT's."""
_EXPERT = re.compile(r"(?:(?P<expert>\d+)\.)?(?P<part>\w+)")
_REFUSED = {
    "use_dora": "DoRA scales the base weights, too",
    "lora_bias": "lora_bias adds to biases",
    "modules_to_save": "modules that train in full have no adapters",
    "layer_replication": "layer_replication changes the model's layers",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "trainable_token_indices": "trainable tokens are rows of the embeddings",
}
"""Settings of PEFT's that say that the adapters are not all that it adds to the weights."""
_REMEDY = "save the adapters again"
_ELSEWHERE = "merge these adapters with the program that trained them"
_OTHER_BASE = "name the base model of these adapters"
_NESTED = re.compile(r"\)[*+{]")
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterSource(Protocol):
    """Adapters and their factors."""

    path: Path
    adapters: tuple[Adapter, ...]

    def read(self, name: str) -> Tensor:
        """A factor in fp32, by its name in :attr:`Adapter.names`."""

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and modification time of each file that decides what is read."""


class AdapterCheckpoint:
    """The adapters of a distributed checkpoint of a LoRA run.

    Attributes:
        path: of the checkpoint.
        adapters: that it holds, in the order of the model's parameters.
        options: of the run, without its learning rates; ``targets`` is ``all``, of which the checkpoint has a part.
        others: parameters of the model that trained in full, by their names in the model.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], spec: ModelSpec, model_config: Any) -> None:
        """
        Args:
            path: of the checkpoint.
            manifest: its manifest.
            spec: of the base model.
            model_config: likewise.

        Raises:
            UserError: if it is not of a LoRA run, or does not fit the model.
        """
        self.path, self._manifest = path, manifest
        self.options = recorded_options(path, manifest)
        self._reader = CheckpointReader(path, manifest)
        held = {
            name.removeprefix(MODEL_PREFIX): shape
            for name, (shape, _) in self._reader.tensors.items() if name.startswith(MODEL_PREFIX)
        }
        planned = spec.adapters(model_config, self.options)
        self.adapters = tuple(adapter for adapter in planned if held.keys() & adapter.shapes.keys())
        shapes = {name: shape for adapter in self.adapters for name, shape in adapter.shapes.items()}
        wrong = [f"{name} is {list(held[name])} instead of {list(shape)}"
                 for name, shape in shapes.items() if held.get(name, shape) != shape]
        known = mcore_shapes(spec.weight_rules(model_config, expert_layout="hub"))
        problems = [
            *listed("missing", sorted(shapes.keys() - held.keys())),
            *listed("unexpected", sorted(held.keys() - shapes.keys() - known.keys())),
            *listed("of another shape", wrong),
        ]
        if problems or not self.adapters:
            raise UserError(f"{path} does not fit the model: {'; '.join(problems) or 'it holds no adapters'}; name the "
                            "base model that was trained")
        self.others = tuple(sorted(held.keys() & known.keys()))

    def read(self, name: str) -> Tensor:
        """See :class:`AdapterSource`."""
        return _finite(self._reader.read(MODEL_PREFIX + name).to(torch.float32), name, self.path)

    def fingerprint(self) -> list[list[Any]]:
        """See :class:`AdapterSource`."""
        return [[name, facts["size"], facts["checksum"]] for name, facts in sorted(self._manifest["files"].items())]


def _finite(factor: Tensor, name: str, source: Path) -> Tensor:
    """The factor.

    Raises:
        UserError: if a number of it is none.
    """
    if not torch.isfinite(factor).all():
        raise UserError(f"{source}: {name} has values that are NaN or infinite; take an earlier checkpoint, or train "
                        "the adapters again")
    return factor


def recorded_options(path: Path, manifest: Mapping[str, Any]) -> LoraOptions:
    """The options of the LoRA run that saved a checkpoint, with ``all`` as targets.

    Raises:
        UserError: if it is not of a LoRA run, or the record is damaged.
    """
    recorded = manifest["metadata"].get(LORA_KEY)
    if recorded is None:
        raise UserError(f"{path} holds no LoRA adapters; dcp_to_hf converts a checkpoint of full fine-tuning")
    fields = {"r": int, "expert_r": int, "alpha": (int, float), "use_rslora": bool}
    if not isinstance(recorded, Mapping) or any(
        not isinstance(value := recorded.get(name), kind) or (name != "use_rslora" and not 0 < value <= LARGEST)
        for name, kind in fields.items()
    ):
        raise UserError(f"{path / MANIFEST}: {LORA_KEY} must have {', '.join(fields)} of a LoRA run and is "
                        f"{shown(recorded)}; restore the checkpoint")
    return LoraOptions(targets=(ALL,), **{name: recorded[name] for name in fields})


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the file holds of one adapter: all of it, or the rows of B of one of gate and up.

    Attributes:
        rank: of these factors.
        scale: likewise.
        lora_a: gives A in the layout of the mcore model.
        lora_b: gives B likewise, perhaps some of its rows.
    """

    rank: int
    scale: float
    lora_a: Callable[[], Tensor]
    lora_b: Callable[[], Tensor]


class AdapterDirectory:
    """The adapters of a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        path: the directory.
        adapters: in the order of the model's parameters, each with its rank and scale.
        base: name of the base model in the config; empty if it has none.
        experts: layout of the experts' factors, in words; empty if there are none.
    """

    def __init__(self, path: Path, spec: ModelSpec, model_config: Any) -> None:
        """
        Args:
            path: the directory.
            spec: of the base model.
            model_config: likewise.

        Raises:
            UserError: if a file is missing or damaged, if it holds anything but adapters, or if these do not fit the
                model.
        """
        self.path = path
        self._config = AdapterConfig(path)
        self.base, self._file = self._config.base, path / ADAPTER_WEIGHTS
        self._header = read_weights_header(path)
        options = LoraOptions(targets=(ALL,), r=1, alpha=1, expert_r=1)
        planned = {adapter.module: adapter for adapter in spec.adapters(model_config, options)}
        self._modules = expert_modules(list(planned.values()))
        weights = hf_shapes(spec.weight_rules(model_config, expert_layout="hub"))
        found = self._find(planned, {name.removesuffix(".weight") for name in weights})
        self.experts = self._layout(found)
        self._factors: dict[str, Callable[[], Tensor]] = {}
        self.adapters = tuple(self._add(adapter, found[name]) for name, adapter in planned.items() if name in found)
        self._check_complete(found)

    def read(self, name: str) -> Tensor:
        """See :class:`AdapterSource`."""
        return _finite(self._factors[name]().contiguous(), name, self._file)

    def fingerprint(self) -> list[list[Any]]:
        """See :class:`AdapterSource`."""
        files = [self.path / ADAPTER_CONFIG, self._file]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def _find(self, planned: Mapping[str, Adapter], weights: set[str]) -> dict[str, dict[str, dict[str, StoredTensor]]]:
        """Adapted module -> name of a part in the file -> factor -> tensor.

        The name of a part is the module's in the file: ``experts.base_layer``, ``experts.3.up_proj``, or the same.
        """
        found: dict[str, dict[str, dict[str, StoredTensor]]] = {}
        for key, stored in self._header.tensors.items():
            match = _KEY.fullmatch(key.removeprefix(KEY_PREFIX))
            if match is None:
                what = "a DoRA magnitude" if "lora_magnitude" in key else "not a factor lora_A or lora_B"
                raise UserError(f"{self._file}: {shorten(key)} is {what}, so the adapters are not all that was trained"
                                f"; {_ELSEWHERE}")
            name = match["module"]
            module = name if name in planned else self._module_of_experts(name)
            if module is None:
                known = "is not adapted here" if name in weights else "is no module of this model"
                raise UserError(f"{self._file}: {shorten(key)}: {shorten(name)} {known}; name the base model of these "
                                "adapters, or train them again without that module")
            factors = found.setdefault(module, {}).setdefault(name, {})
            if factors.setdefault(match["factor"], stored) is not stored:
                raise UserError(f"{self._file}: {shorten(key)} is there twice, under two names; keep one adapter in it")
        return found

    def _module_of_experts(self, name: str) -> str | None:
        """The adapted module that a name in the file belongs to; None for no experts'."""
        for module, adapters in self._modules.items():
            if not name.startswith(module):
                continue
            wrappers = [module + INNER * (len(adapters) - 1 - index) for index in range(len(adapters))]
            if name in wrappers:
                return adapters[wrappers.index(name)].module
            match = _EXPERT.fullmatch(name.removeprefix(f"{module}."))
            for adapter in adapters if match else ():
                if match["part"] in (adapter.key, *split_name(adapter.key)):
                    return adapter.module
        return None

    def _layout(self, found: Mapping[str, Mapping[str, Mapping[str, StoredTensor]]]) -> str:
        """Layout of the experts' factors: ``canonical`` or ``swapped`` flat tensors, else ``3-D`` or ``per expert``.

        Shapes tell the first two apart: the two weights of experts, [H, 2I] and [I, H], cannot both be square.
        """
        layouts = set()
        fits = {"canonical": True, "swapped": True}
        for adapters in self._modules.values():
            for adapter in adapters:
                for name, factors in found.get(adapter.module, {}).items():
                    if not name.endswith((".experts", INNER)):
                        layouts.add("per expert" if name.split(".")[-2].isdigit() else "3-D")
                        continue
                    layouts.add("flat")
                    _, inputs, outputs = adapter.source[1]
                    shapes = {factor: tensor.shape for factor, tensor in factors.items()}
                    fits["canonical"] &= _flat_fits(shapes, inputs, outputs)
                    fits["swapped"] &= _flat_fits(shapes, outputs, inputs)
        if len(layouts) > 1:
            raise UserError(f"{self._file}: the experts' adapters are {' and '.join(sorted(layouts))} tensors; write "
                            "all of them in one layout")
        if layouts != {"flat"}:
            return next(iter(layouts), "")
        recorded = self._header.metadata.get(ORIENTATION_KEY)
        chosen = [orientation for orientation, fit in fits.items() if fit and recorded in (None, orientation)]
        if len(chosen) != 1:
            raise UserError(f"{self._file}: the experts' adapters have shapes of another model, or of factors that are "
                            f"{'neither' if recorded is None else 'not'} in PEFT's order; name the base model of these "
                            "adapters")
        return chosen[0]

    def _add(self, adapter: Adapter, found: Mapping[str, Mapping[str, StoredTensor]]) -> Adapter:
        """The adapter with its rank and scale; makes its factors known to :meth:`read`."""
        parts = self._parts(adapter, found)
        scales = {part.scale for part in parts}
        if len(scales) > 1:
            values = " and ".join(f"{scale:g}" for scale in sorted(scales))
            raise UserError(f"{self.path / ADAPTER_CONFIG} gives {adapter.module} several scales, {values}; set one "
                            "lora_alpha for its parts")
        first, *rest = parts
        shared = all(part.rank == first.rank and torch.equal(part.lora_a(), first.lora_a()) for part in rest)
        name_a, name_b = adapter.names
        if not rest:
            self._factors |= {name_a: first.lora_a, name_b: first.lora_b}
        elif shared:
            self._factors[name_a] = first.lora_a
            self._factors[name_b] = lambda: torch.cat([part.lora_b() for part in parts], dim=1)
        else:
            self._factors[name_a] = lambda: torch.cat([part.lora_a() for part in parts], dim=2)
            self._factors[name_b] = lambda: _block_diagonal([part.lora_b() for part in parts])
        rank = first.rank if shared else sum(part.rank for part in parts)
        return dataclasses.replace(adapter, rank=rank, scale=first.scale)

    def _parts(self, adapter: Adapter, found: Mapping[str, Mapping[str, StoredTensor]]) -> list[_Part]:
        """The parts of an adapter in the order of the rows of B, one of them unless gate and up are apart."""
        for name, factors in found.items():
            if len(factors) < 2:
                missing = "lora_B" if "A" in factors else "lora_A"
                raise UserError(f"{self._file} has no {missing} of {name}; {_REMEDY}")
        if not adapter.is_experts:
            (factors,) = found.values()
            outputs, inputs = adapter.source[1]
            rank = factors["A"].shape[0] if factors["A"].shape else 0
            self._expect(factors, (rank, inputs), (outputs, rank), adapter)
            return [_Part(rank, self._config.scale(adapter.module, rank, self._file), _get(factors["A"]),
                          _get(factors["B"]))]
        if self.experts in ("canonical", "swapped"):
            (factors,) = found.values()
            return [self._flat_part(adapter, factors)]
        module = adapter.module.removesuffix(f".{adapter.key}")
        experts, inputs, outputs = adapter.source[1]
        split = self.experts == "per expert"
        names = {_EXPERT.fullmatch(name.removeprefix(f"{module}."))["part"] for name in found}
        parts = (adapter.key,) if names == {adapter.key} else split_name(adapter.key)
        expected = {
            f"{module}.{expert}.{part}" if split else f"{module}.{part}": (part, expert)
            for expert in range(experts if split else 1) for part in parts
        }
        if problems := [*listed("missing", sorted(expected.keys() - found.keys())),
                        *listed("unexpected", sorted(found.keys() - expected.keys()))]:
            raise UserError(f"{self._file}: adapters of {module} are {'; '.join(problems)}; name the base model of "
                            "these adapters, or save them again")
        return [
            self._stacked_part(adapter, [found[name] for name, (p, _) in expected.items() if p == part],
                               [name for name, (p, _) in expected.items() if p == part], outputs // len(parts))
            for part in parts
        ]

    def _flat_part(self, adapter: Adapter, factors: Mapping[str, StoredTensor]) -> _Part:
        """Of flat tensors: A [E r, in] and B [out, r E], or with ``in`` and ``out`` exchanged."""
        experts, inputs, outputs = adapter.source[1]
        rank, is_canonical = factors["A"].shape[0] // experts, self.experts == "canonical"
        sides = (inputs, outputs) if is_canonical else (outputs, inputs)
        self._expect(factors, (experts * rank, sides[0]), (sides[1], rank * experts), adapter)
        first, second = _get(factors["A"]), _get(factors["B"])

        def by_input() -> Tensor:
            return unflatten_a(first(), experts)

        def by_output() -> Tensor:
            return unflatten_b(second(), experts)

        scale = self._config.scale(adapter.module, rank, self._file)
        return _Part(rank, scale, *((by_input, by_output) if is_canonical else (by_output, by_input)))

    def _stacked_part(
        self, adapter: Adapter, tensors: Sequence[Mapping[str, StoredTensor]], names: Sequence[str], rows: int
    ) -> _Part:
        """Of A [E, r, in] and B [E, rows, r], in one tensor or in one for each expert."""
        experts, inputs, _ = adapter.source[1]
        shape, lead = tensors[0]["A"].shape, () if self.experts == "per expert" else (experts,)
        rank = shape[-2] if len(shape) > 1 else 0
        for factors in tensors:
            self._expect(factors, (*lead, rank, inputs), (*lead, rows, rank), adapter)
        scales = {self._config.scale(name, rank, self._file) for name in names}
        if len(scales) > 1:
            raise UserError(f"{self.path / ADAPTER_CONFIG}: alpha_pattern differs among the experts of "
                            f"{adapter.module}; set one lora_alpha for all of them")

        def read(factor: str) -> Tensor:
            values = [_get(factors[factor])() for factors in tensors]
            return values[0] if lead else torch.stack(values)

        return _Part(rank, scales.pop(), lambda: read("A").transpose(1, 2), lambda: read("B"))

    def _expect(
        self, factors: Mapping[str, StoredTensor], shape_a: tuple[int, ...], shape_b: tuple[int, ...], adapter: Adapter
    ) -> None:
        for factor, shape in (("A", shape_a), ("B", shape_b)):
            if factors[factor].shape != shape or 0 in shape:
                raise UserError(f"{self._file}: {factors[factor].name} is {list(factors[factor].shape)}, and adapters "
                                f"of {adapter.source[0]} {list(adapter.source[1])} would be {list(shape)}; name the "
                                "base model of these adapters")

    def _check_complete(self, found: Mapping[str, Any]) -> None:
        if not self.adapters:
            raise UserError(f"{self._file} holds no adapters; {_REMEDY}")
        for adapters in self._modules.values():
            missing = [adapter.module for adapter in adapters if adapter.module not in found]
            if 0 < len(missing) < len(adapters):
                raise UserError(f"{self._file} has adapters of some weights of experts and none of {missing[0]}; "
                                "PEFT's file format cannot tell which weight one alone is of: adapt both")


class AdapterConfig:
    """``adapter_config.json``, as far as it decides what the factors add to the weights.

    Attributes:
        content: the fields.
        base: name of the base model; empty if it has none.
    """

    def __init__(self, path: Path) -> None:
        """``path``: the directory.

        Raises:
            UserError: if it is damaged, not of LoRA, or of a kind that adds more than products of factors.
        """
        self._file = path / ADAPTER_CONFIG
        if not is_present(self._file):
            inside = path / ADAPTER
            there = f"; name {inside}" if is_present(inside / ADAPTER_CONFIG) else ", so it is no directory of adapters"
            raise UserError(f"{path} has no {ADAPTER_CONFIG}{there}")
        self.content = read_json(self._file, remedy=_REMEDY)
        kind = self.content.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{self._file}: peft_type is {shown(kind)} and must be \"LORA\"; only LoRA can be read")
        for name, why in _REFUSED.items():
            if self.content.get(name):
                raise UserError(f"{self._file}: {name} is {shown(self.content[name])}, and {why}; {_ELSEWHERE}")
        if self.content.get("bias", "none") != "none":
            raise UserError(f"{self._file}: bias is {shown(self.content['bias'])}, so biases were trained, too; "
                            f"{_ELSEWHERE}")
        initial = self.content.get("init_lora_weights")
        if isinstance(initial, str) and initial.lower().startswith(_ALTERS_BASE):
            raise UserError(f"{self._file}: init_lora_weights is {shown(initial)}, which changes the base weights; "
                            "save the adapters again with PEFT's path_initial_model_for_weight_conversion")
        if not isinstance(self.content.get("use_rslora") or False, bool):
            raise UserError(f"{self._file}: use_rslora is {shown(self.content['use_rslora'])} and must be true or "
                            f"false; {_REMEDY}")
        self.r, self.alpha = self._positive("r", self.content.get("r")), self.content.get("lora_alpha")
        self._ranks, self._alphas = (self._patterns(f"{name}_pattern") for name in ("rank", "alpha"))
        self._positive("lora_alpha", self.alpha)
        base = self.content.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) and base.isprintable() else ""

    def scale(self, module: str, rank: int, weights: Path) -> float:
        """Factor on the product of the factors of a module.

        Args:
            module: its name in the model, or of the experts' parameter.
            rank: of its factors in the file.
            weights: that file, for the message.

        Raises:
            UserError: if the config says another rank.
        """
        expected = _match(self._ranks, module, self.r)
        if rank != expected:
            raise UserError(f"{weights}: the factors of {module} have rank {rank}, and {self._file} says {expected:g}; "
                            "restore the file that was changed")
        alpha = _match(self._alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def _positive(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
            raise UserError(f"{self._file}: {name} is {shown(value)} and must be a number above 0, at most "
                            f"{LARGEST:g}; {_REMEDY}")
        return value

    def _patterns(self, name: str) -> list[tuple[re.Pattern[str], Any]]:
        content = self.content.get(name) or {}
        if not isinstance(content, Mapping):
            raise UserError(f"{self._file}: {name} is {kind_of(content)} and must be an object; {_REMEDY}")
        compiled = []
        for key, value in content.items():
            try:
                compiled.append((re.compile(rf"(.*\.)?({key})"), self._positive(f"{name} {shorten(key)}", value)))
                if _NESTED.search(key):
                    raise ValueError("a repeated group can take for ever")
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                raise UserError(f"{self._file}: {name} has {shorten(key)}, which is no regular expression: {error}; "
                                "correct it") from error
        return compiled


def read_weights_header(path: Path) -> Header:
    """The header of a directory's adapters.

    Raises:
        UserError: if they are missing, damaged, or in a pickle.
    """
    file, pickle = path / ADAPTER_WEIGHTS, path / "adapter_model.bin"
    if not is_present(file) and is_present(pickle):
        raise UserError(f"{pickle} is a pickle, which can run code when it is read; convert it to {ADAPTER_WEIGHTS} "
                        "where it was made (PEFT: save_pretrained with safe_serialization)")
    if not is_present(file):
        raise UserError(f"{path} has no {ADAPTER_WEIGHTS}; copy the whole directory of the adapters")
    return read_header(file)


def _match(patterns: Sequence[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


def _flat_fits(shapes: Mapping[str, tuple[int, ...]], first: int, second: int) -> bool:
    """Whether there are A [*, first] and B [second, *]."""
    return all(len(shape) == 2 for shape in shapes.values()) and (
        shapes.get("A", (0, first))[1] == first and shapes.get("B", (second,))[0] == second
    )


def _get(stored: StoredTensor) -> Callable[[], Tensor]:
    return functools.partial(_read, stored)


def _read(stored: StoredTensor) -> Tensor:
    return read_tensor(stored.file, stored.start, stored.dtype, stored.shape).to(torch.float32)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """[E, rows, r] each -> [E, sum of rows, sum of r], with zeros outside the blocks."""
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*blocks, strict=True)])
