"""Files that hold LoRA adapters: names, shapes and axis orders of each form, and writing them.

A directory of adapters holds ``adapter_config.json`` and ``adapter_model.safetensors`` in fp32, as PEFT writes them.
Linear layers have the same tensors in every form: A [r, in] and B [out, r]. The experts of a layer do not:

| form | names below ``mlp.experts`` | A | B |
| --- | --- | --- | --- |
| peft, vllm | ``base_layer`` (gate_up_proj), none (down_proj) | [E r, in] | [out, r E] |
| peft-transformers4 | the same, of the transposed delta | [E r, out] | [in, r E] |
| sglang | ``gate_up_proj``, ``down_proj`` | [E, r, in] | [E, out, r] |
| per-expert | ``E.gate_proj``, ``E.up_proj``, ``E.down_proj`` | [r, in] | [out, r] |

Flat tensors have the expert as the slower index of rows of A, and as the faster one of columns of B. Which of the first
two forms PEFT reads depends on its version and on that of transformers. Legend: r rank, E experts,
``in`` and ``out`` widths of what a weight multiplies and gives, as in :mod:`mindspeed_mm.models.lora`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.checkpoint.directory import ADAPTER_CONFIG, WrittenFile
from mindspeed_mm.checkpoint.files import format_checksum, new_file
from mindspeed_mm.checkpoint.safetensors_io import build_header, tensor_bytes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import Adapter
from mindspeed_mm.models.state_dict import Shape

FORMS = ("peft", "peft-transformers4", "vllm", "sglang", "per-expert")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
ORIENTATION_KEY = "orientation"
"""Entry of the safetensors file's own metadata, for forms with flat tensors of all experts."""
INNER = ".base_layer"
"""Where PEFT wraps a module once for each of its parameters, the name of all wrappers but the last one's."""
_VERSION = "1"
_ONE_RANK = ("sglang", "per-expert")
"""Forms whose readers know a single rank and alpha."""
VISION_MODULES = ".visual."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM allows for --max-lora-rank."""


def write_adapter(
    directory: Path,
    adapters: Sequence[Adapter],
    read: Callable[[str], Tensor],
    *,
    form: str = "peft",
    base: str | None,
    weights: Mapping[str, Shape] | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, WrittenFile]:
    """Write adapters in a form that other programs read, holding the factors of one adapter at a time.

    Args:
        directory: an existing one.
        adapters: to write, with those of both weights of a layer's experts.
        read: gives a factor by its name in :attr:`Adapter.names`; called once for each, in that order.
        form: of :data:`FORMS`.
        base: the base model's directory or name, for information.
        weights: all of the base model's Hugging Face tensors, by which the config names modules as briefly as it can;
            None to name them by their last two words.
        advance: called with the number of bytes of each write.

    Returns:
        The files, flushed to disk, by name.

    Raises:
        UserError: if the form cannot hold the adapters; see :func:`form_notes`.
    """
    form_notes(adapters, form)
    adapters = _held_by(form, adapters)
    written = one_rank(adapters) if form in _ONE_RANK else list(adapters)
    groups = _entries_of_all(written, form)
    header = {"format": "pt", "form": form, "version": _VERSION, **({} if base is None else {"base": base})}
    if form in ("peft", "vllm", "peft-transformers4"):
        header[ORIENTATION_KEY] = _orientation(form)
    with new_file(directory / ADAPTER_WEIGHTS, advance) as file:
        names = [(entry.key, torch.float32, entry.shape) for entries in groups for entry in entries]
        file.write(build_header(names, header))
        for adapter, target, entries in zip(adapters, written, groups, strict=True):
            lora_a, lora_b = (read(name).to(torch.float32) for name in adapter.names)
            factors = refit(adapter, target, lora_a, lora_b)
            for entry in entries:
                file.write(tensor_bytes(entry.make(*factors).contiguous()))
    text = json.dumps(_config(written, form, base, weights), indent=2, ensure_ascii=False) + "\n"
    with new_file(directory / ADAPTER_CONFIG) as config:
        config.write(text.encode())
    return {
        name: WrittenFile(output.tell(), format_checksum(output.crc))
        for name, output in ((ADAPTER_WEIGHTS, file), (ADAPTER_CONFIG, config))
    }


def adapter_bytes(adapters: Sequence[Adapter], form: str) -> int:
    """Bytes of the tensors that :func:`write_adapter` writes."""
    adapters = _held_by(form, adapters)
    written = one_rank(adapters) if form in _ONE_RANK else adapters
    return 4 * sum(math.prod(entry.shape) for entries in _entries_of_all(written, form) for entry in entries)


def form_notes(adapters: Sequence[Adapter], form: str) -> list[str]:
    """What a reader of the form ignores or has to be told.

    Raises:
        UserError: if the reader would refuse the adapters.
    """
    vision = [adapter for adapter in adapters if VISION_MODULES in adapter.module]
    ignored = ([f"PEFT ignores the experts' adapters of the form {form} without a message; load the form peft with it"]
               if form in _ONE_RANK and any(adapter.is_experts for adapter in adapters) else [])
    rank = max(adapter.rank for adapter in adapters)
    if form == "sglang":
        if len(vision) == len(adapters):
            raise UserError("--format sglang: all adapters are of the vision tower, which SGLang does not adapt; "
                            "merge them with merge_lora")
        left_out = [f"{len(vision)} adapters of vision blocks and mergers are left out: SGLang does not adapt them; "
                    "merge_lora keeps them"] if vision else []
        return [*left_out, *ignored]
    if form != "vllm":
        return ignored
    if rank > VLLM_RANKS[-1]:
        raise UserError(f"--format vllm: vLLM takes a rank of at most {VLLM_RANKS[-1]}, and the adapters' is {rank}; "
                        "merge them with merge_lora")
    notes = [f"vLLM needs --enable-lora --max-lora-rank {next(allowed for allowed in VLLM_RANKS if rank <= allowed)}"]
    if vision:
        notes.append(f"vLLM ignores the {len(vision)} adapters of vision blocks and mergers unless it is started with "
                     "--enable-tower-connector-lora; merge_lora keeps them")
    return notes


def one_rank(adapters: Sequence[Adapter], *, by_kind: bool = False) -> list[Adapter]:
    """The adapters with the largest of their ranks and the first one's scale; :func:`refit` makes their factors.

    Args:
        adapters: of any ranks and scales.
        by_kind: experts and linear layers each keep a rank of their own; the scale is still one alpha divided by it.
    """
    ranks = {
        kind: max((a.rank for a in adapters if not by_kind or a.is_experts == kind), default=0)
        for kind in (False, True)
    }
    alpha = adapters[0].scale * ranks[adapters[0].is_experts]
    return [
        dataclasses.replace(a, rank=ranks[a.is_experts], scale=alpha / ranks[a.is_experts]) for a in adapters
    ]


def refit(adapter: Adapter, target: Adapter, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same delta with the rank and the scale of ``target``, which differs in nothing else.

    Zeros fill up the rank. The ratio of the scales goes into B, which rounds unless it is a power of two.
    """
    extra, ratio = target.rank - adapter.rank, adapter.scale / target.scale
    if extra:
        lora_a = F.pad(lora_a, (0, extra) if adapter.is_experts else (0, 0, 0, extra))
        lora_b = F.pad(lora_b, (0, extra))
    return lora_a, lora_b if math.isclose(ratio, 1, rel_tol=1e-12) else lora_b * ratio


def flatten(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, in, r], B [E, out, r] -> [E r, in] with the expert slowest, [out, r E] with the expert fastest."""
    return lora_a.transpose(1, 2).flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1)


def unflatten_a(flat: Tensor, experts: int) -> Tensor:
    """[E r, in] with the expert slowest -> [E, in, r]."""
    return flat.unflatten(0, (experts, -1)).transpose(1, 2)


def unflatten_b(flat: Tensor, experts: int) -> Tensor:
    """[out, r E] with the expert fastest -> [E, out, r]."""
    return flat.unflatten(1, (-1, experts)).permute(2, 0, 1)


def expert_modules(adapters: Sequence[Adapter]) -> dict[str, list[Adapter]]:
    """Name of each module of experts -> the adapters of its parameters, in the order of the parameters."""
    modules: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.is_experts:
            modules.setdefault(adapter.module.rpartition(".")[0], []).append(adapter)
    return modules


def split_name(parameter: str) -> tuple[str, ...]:
    """``gate_up_proj`` -> ``gate_proj``, ``up_proj``: the matrices of one expert in the rows of its B; others alone."""
    *parts, kind = parameter.split("_")
    return tuple(f"{part}_{kind}" for part in parts)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the file, made of the factors of one adapter."""

    key: str
    shape: Shape
    make: Callable[[Tensor, Tensor], Tensor]


def _orientation(form: str) -> str:
    return "swapped" if form == "peft-transformers4" else "canonical"


def _held_by(form: str, adapters: Sequence[Adapter]) -> list[Adapter]:
    return [adapter for adapter in adapters if form != "sglang" or VISION_MODULES not in adapter.module]


def _key(module: str, factor: str) -> str:
    return f"{KEY_PREFIX}{module}.{factor}.weight"


def _entries_of_all(adapters: Sequence[Adapter], form: str) -> list[list[_Entry]]:
    """For each adapter its tensors in a form."""
    # PEFT wraps a module once for each of its parameters, the first one innermost
    depth = {
        adapter.module: len(found) - 1 - index
        for found in expert_modules(adapters).values() for index, adapter in enumerate(found)
    }
    return [list(_entries(adapter, form, INNER * depth.get(adapter.module, 0))) for adapter in adapters]


def _entries(adapter: Adapter, form: str, wrappers: str) -> Iterator[_Entry]:
    """The tensors of an adapter in a form; ``wrappers``: what PEFT adds to the name of a module of experts."""
    (name_a, shape_a), (name_b, shape_b) = adapter.shapes.items()
    if not adapter.is_experts:
        yield _Entry(_key(adapter.module, "lora_A"), shape_a, lambda a, b: a)
        yield _Entry(_key(adapter.module, "lora_B"), shape_b, lambda a, b: b)
        return
    experts, inputs, rank = shape_a
    outputs = shape_b[1]
    module, _, parameter = adapter.module.rpartition(".")
    parts = split_name(parameter)
    if form == "sglang":
        yield _Entry(_key(adapter.module, "lora_A"), (experts, rank, inputs), lambda a, b: a.transpose(1, 2))
        yield _Entry(_key(adapter.module, "lora_B"), shape_b, lambda a, b: b)
    elif form == "per-expert":
        rows = outputs // len(parts)
        for expert in range(experts):
            for index, part in enumerate(parts):
                name, first = f"{module}.{expert}.{part}", index * rows
                yield _Entry(_key(name, "lora_A"), (rank, inputs), lambda a, b, e=expert: a[e].t())
                yield _Entry(_key(name, "lora_B"), (rows, rank),
                             lambda a, b, e=expert, f=first, n=rows: b[e, f : f + n])
    else:
        module += wrappers
        if _orientation(form) == "swapped":
            yield _Entry(_key(module, "lora_A"), (experts * rank, outputs), lambda a, b: flatten(b, a)[0])
            yield _Entry(_key(module, "lora_B"), (inputs, rank * experts), lambda a, b: flatten(b, a)[1])
        else:
            yield _Entry(_key(module, "lora_A"), (experts * rank, inputs), lambda a, b: flatten(a, b)[0])
            yield _Entry(_key(module, "lora_B"), (outputs, rank * experts), lambda a, b: flatten(a, b)[1])


def _config(
    adapters: Sequence[Adapter], form: str, base: str | None, weights: Mapping[str, Shape] | None
) -> dict[str, Any]:
    """``adapter_config.json``: the fields without which some version of PEFT, vLLM or SGLang does not read it."""
    linear = [adapter for adapter in adapters if not adapter.is_experts]
    experts = [adapter for adapter in adapters if adapter.is_experts]
    counts = collections.Counter((adapter.rank, _alpha(adapter)) for adapter in linear or experts)
    rank, alpha = counts.most_common(1)[0][0]
    modules = dict.fromkeys(_short_names(linear, weights))
    if form == "sglang":
        modules = dict.fromkeys([name.rpartition(".")[2] for name in modules] + [a.key for a in experts])
    elif form == "per-expert":
        modules |= dict.fromkeys(part for adapter in experts for part in split_name(adapter.key))
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "target_modules": list(modules),
    }
    if form in _ONE_RANK:
        return config
    if experts:
        config["target_parameters"] = list(dict.fromkeys(_short_names(experts, weights)))
    ranks, alphas = {}, {}
    for adapter, name in zip(adapters, _pattern_names(adapters), strict=True):
        if adapter.rank != rank:
            ranks[name] = adapter.rank
        if _alpha(adapter) != alpha:
            alphas[name] = _alpha(adapter)
    return config | ({"rank_pattern": ranks} if ranks else {}) | ({"alpha_pattern": alphas} if alphas else {})


def _alpha(adapter: Adapter) -> int | float:
    """alpha of ``alpha / r``, into which the root of rsLoRA has gone, too."""
    alpha = adapter.scale * adapter.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _pattern_names(adapters: Sequence[Adapter]) -> list[str]:
    """What names each adapter in a pattern of ranks: one name for all layers of experts that are alike."""
    alike = collections.defaultdict(set)
    for adapter in adapters:
        alike[_last(adapter.module, 3)].add((adapter.is_experts, adapter.rank, adapter.scale))
    return [
        _last(a.module, 3) if a.is_experts and len(alike[_last(a.module, 3)]) == 1 else a.module for a in adapters
    ]


def _short_names(adapters: Sequence[Adapter], weights: Mapping[str, Shape] | None) -> Iterator[str]:
    """For each adapter as few of the last words of its module's name as name no weight without an adapter."""
    adapted = {adapter.source[0] for adapter in adapters}
    dims = (3,) if adapters and adapters[0].is_experts else (2, 4, 5)  # the experts' weights are no modules
    others = [
        name.removesuffix(".weight") for name, shape in (weights or {}).items()
        if name not in adapted and len(shape) in dims
    ]
    found: dict[str, str] = {}
    for adapter in adapters:
        fewest = 3 if adapter.is_experts else 1 if weights else 2
        for count in range(fewest, adapter.module.count(".") + 2):
            name = _last(adapter.module, count)
            if name not in found:
                ambiguous = name[0].isdigit() or any(f".{other}".endswith(f".{name}") for other in others)
                found[name] = "" if ambiguous else name
            if found[name]:
                break
        yield name


def _last(name: str, words: int) -> str:
    return ".".join(name.split(".")[-words:])
