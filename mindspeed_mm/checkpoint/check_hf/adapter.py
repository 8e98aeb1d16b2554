"""Checks of a directory of LoRA adapters: which program reads its form, and what it must be started with."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from mindspeed_mm.checkpoint.adapter_formats import ORIENTATION_KEY, VISION_MODULES, VLLM_RANKS
from mindspeed_mm.checkpoint.adapters import AdapterConfig, read_weights_header
from mindspeed_mm.checkpoint.check_hf.consumers import (
    LMMS_EVAL,
    LOADERS,
    SGLANG,
    TRANSFORMERS,
    TRANSFORMERS4,
    TRANSFORMERS5,
    VLLM,
    VLMEVALKIT,
    Finding,
    Findings,
)
from mindspeed_mm.checkpoint.conversion import counted, format_bytes
from mindspeed_mm.checkpoint.directory import ADAPTER_CONFIG
from mindspeed_mm.checkpoint.safetensors_io import Header
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, shorten

_READERS: dict[str, tuple[str, frozenset[str]]] = {
    "none": ("without experts", LOADERS),
    "canonical": ("of PEFT 0.19.1 or newer with transformers 5", frozenset({TRANSFORMERS5, VLLM})),
    "swapped": ("of PEFT with transformers 4", frozenset({TRANSFORMERS4})),
    "stacked": ("of SGLang", frozenset({SGLANG})),
    "per-expert": ("with a tensor for each expert", frozenset({SGLANG})),
}
"""Form of the experts' adapters -> words for it, and those that read it."""
_REMEDIES = {
    TRANSFORMERS4: "--format peft-transformers4", TRANSFORMERS5: "--format peft", VLLM: "--format vllm",
    SGLANG: "--format sglang",
}
_FLAT, _STACKED, _NUMBERED = (
    re.compile(rf"\.experts{middle}\.lora_A\b")
    for middle in (r"(?:\.base_layer)*", r"\.\w*[a-z]\w*_proj", r"\.\d+\.\w+")
)


def check_adapter(path: Path) -> tuple[str, list[Finding]]:
    """What a directory of adapters lacks.

    Args:
        path: with ``adapter_config.json``.

    Returns:
        A line that says what the directory holds, and the findings.
    """
    found = Findings()
    for consumer in (LMMS_EVAL, VLMEVALKIT):
        found.append(Finding("adapter", "its loaders take whole models only", "merge it: mm-convert ... merge_lora, or "
                             "evaluate through a server", frozenset({consumer}), frozenset()))
    try:
        config, header = AdapterConfig(path), read_weights_header(path)
    except UserError as error:
        found.add("adapter", str(error), "copy the whole directory of the adapters", blocks=LOADERS)
        return "adapters that cannot be read", found
    if config.base and not _exists(config.base):
        found.add("base", f"base_model_name_or_path of {ADAPTER_CONFIG}, {shorten(config.base)}, does not exist here",
                  "set it to where the base model is; servers name the base themselves", blocks=TRANSFORMERS)
    elif not config.base:
        found.add("base", f"{ADAPTER_CONFIG} names no base_model_name_or_path", "set it, or load the base first and "
                  "the adapter over it", notes=TRANSFORMERS)
    form = _form(header)
    _check_form(form, found)
    rank = max([config.r, *_pattern_ranks(config)])
    _check_server_limits(config, header, form, rank, found)
    size = format_bytes(sum(tensor.nbytes for tensor in header.tensors.values()))
    words = f"form {_READERS[form][0]}" if form in _READERS else "form of the experts unknown"
    return f"LoRA adapters, {counted(len(header.tensors), 'tensor')}, {size}, rank {rank}, {words}", found


def _exists(base: str) -> bool:
    """Whether a base can be there: a local directory, or a name of a hub, which is not looked up."""
    is_name = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    return is_directory(base) or is_name


def _form(header: Header) -> str:
    names = [name for name in header.tensors if ".experts" in name]
    if not names:
        return "none"
    if any(_NUMBERED.search(name) for name in names):
        return "per-expert"
    if any(_STACKED.search(name) for name in names):
        return "stacked"
    return header.metadata.get(ORIENTATION_KEY, "unknown") if any(_FLAT.search(name) for name in names) else "unknown"


def _check_form(form: str, found: Findings) -> None:
    if form not in _READERS:
        found.add("adapter", "the order of the experts' axes is not recorded in the file, and PEFT with transformers 4 "
                  "writes another one than with transformers 5", "write it again for a program: mm-convert ... "
                  "lora_hf_to_dcp, then lora_to_hf --format", notes=LOADERS)
        return
    words, readers = _READERS[form]
    for consumer in sorted(LOADERS - readers):
        found.add("adapter", f"the experts are in the form {words}", f"mm-convert ... lora_to_hf {_REMEDIES[consumer]}",
                  blocks={consumer})


def _pattern_ranks(config: AdapterConfig) -> Collection[int]:
    ranks = config.content.get("rank_pattern") or {}
    return [rank for rank in ranks.values() if type(rank) is int] if isinstance(ranks, dict) else []


def _check_server_limits(config: AdapterConfig, header: Header, form: str, rank: int, found: Findings) -> None:
    fields = [name for name in ("r", "lora_alpha", "target_modules") if not config.content.get(name)]
    if fields:
        found.add("adapter", f"{ADAPTER_CONFIG} lacks {', '.join(fields)}", "take it from where it was made",
                  blocks={VLLM, SGLANG})
    if rank > VLLM_RANKS[-1]:
        found.add("rank", f"vLLM takes a rank of at most {VLLM_RANKS[-1]}, and this is {rank}",
                  "merge it: mm-convert ... merge_lora", blocks={VLLM})
    else:
        allowed = next(value for value in VLLM_RANKS if rank <= value)
        found.add("rank", f"rank {rank}", f"start vLLM with --enable-lora --max-lora-rank {allowed}", notes={VLLM})
    vision = sum(VISION_MODULES in name for name in header.tensors)
    if vision:
        found.add("vision", f"{vision} tensors are of the vision tower, which vLLM adapts only if it is told to",
                  "start vLLM with --enable-tower-connector-lora", notes={VLLM})
        found.add("vision", f"{vision} tensors are of the vision tower, which SGLang does not adapt",
                  "merge it: mm-convert ... merge_lora", blocks={SGLANG})
    ignored = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.content.get(name)]
    if ignored and form not in ("stacked", "per-expert"):
        found.add("adapter", f"SGLang ignores {', '.join(ignored)}", "mm-convert ... lora_to_hf --format sglang",
                  blocks={SGLANG})
