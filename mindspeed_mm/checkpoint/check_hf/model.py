"""Checks of a model directory: config, weights by their headers, leftovers, and the directory's name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.check_hf.assets import FROM_ORIGINAL, check_assets
from mindspeed_mm.checkpoint.check_hf.consumers import (
    LMMS_EVAL,
    LOADERS,
    SERVERS,
    SGLANG,
    TRANSFORMERS,
    TRANSFORMERS4,
    TRANSFORMERS5,
    VLMEVALKIT,
    Finding,
    Findings,
)
from mindspeed_mm.checkpoint.conversion import counted, format_bytes
from mindspeed_mm.checkpoint.directory import ADAPTER_CONFIG, MANIFEST, partial_name, read_manifest
from mindspeed_mm.checkpoint.files import file_checksum
from mindspeed_mm.checkpoint.huggingface import (
    INDEX,
    check_tensors,
    config_dtype,
    decide_layout,
    layout_by_shapes,
    read_headers,
)
from mindspeed_mm.checkpoint.safetensors_io import Header
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import INDEX_BYTES, is_file, is_present, read_json, shorten
from mindspeed_mm.models.spec import ModelSpec, ServingFacts, spec_of

_AGAIN = "export it again by the same command"
_TEMPORARY = (".partial", ".incomplete", ".tmp", ".part", ".download")
_OMNI = "omni"
"""Part of a path that makes VLMEvalKit load another model class."""
_OTHER_TEMPLATES = (
    r"\bpoints\b|moss.*vl|internvl|janus|vicuna|deepseek.*vl2|minicpm-[vo]|phi-4-multimodal|deepseek-ocr|unlimited|"
    r"paddleocr|whisper|llava-v1|llava-next-video|llava-onevision-qwen2"
)
"""Parts of a path by which SGLang chooses a built-in chat template instead of the directory's."""


def check_model(path: Path, *, checksums: bool) -> tuple[str, list[Finding]]:
    """What a model directory lacks.

    Args:
        path: with ``config.json``.
        checksums: compare all files with the checksums that the exporter has recorded.

    Returns:
        A line that says what the directory holds, and the findings.
    """
    found = Findings()
    _check_files(path, found)
    try:
        config = read_json(path / "config.json", remedy=FROM_ORIGINAL)
        spec = spec_of(path)
        model_config = spec.read_config(path)
    except UserError as error:
        unfinished = is_present(partial_name(path))
        found.add("config.json", str(error), _AGAIN if unfinished else FROM_ORIGINAL, blocks=LOADERS)
        return "no config.json that can be used", found
    facts = spec.serving_facts(model_config)
    _check_config(facts, config, found)
    headers = _check_weights(path, spec, model_config, found)
    found += check_assets(path, spec, model_config, config)
    _check_manifest(path, found, checksums=checksums)
    _check_name(path, facts, found)
    return _describe(model_config.model_type, headers), found


def _describe(model_type: str, headers: Mapping[str, Header]) -> str:
    tensors = [tensor for header in headers.values() for tensor in header.tensors.values()]
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    size = format_bytes(sum(tensor.nbytes for tensor in tensors))
    weights = f"{counted(len(tensors), 'tensor')} in {counted(len(headers), 'file')}, {size}, {', '.join(types)}"
    return f"{model_type}, {weights if tensors else 'no weights that can be read'}"


def _check_files(path: Path, found: Findings) -> None:
    """Permissions, what an interrupted copy or conversion leaves, and adapters beside a model."""
    files = [entry for entry in sorted(path.iterdir()) if not entry.is_dir()]
    if unreadable := [entry.name for entry in files if entry.exists() and not os.access(entry, os.R_OK)]:
        found.add("permissions", f"this user cannot read {shorten(', '.join(unreadable), 100)}",
                  "chmod a+r, or run the server as the owner", blocks=LOADERS)
    if broken := [entry.name for entry in files if not entry.exists()]:
        found.add("links", f"{shorten(', '.join(broken), 100)} lead nowhere", "download or copy what they name",
                  blocks=LOADERS)
    if leftovers := [entry.name for entry in files if entry.name.endswith(_TEMPORARY)]:
        found.add("leftovers", f"{shorten(', '.join(leftovers), 100)} of an interrupted download or copy",
                  "complete it, or remove them", notes=LOADERS)
    if is_present(partial_name(path)):
        found.add("leftovers", f"{partial_name(path).name} beside it is an unfinished conversion to this directory",
                  "run the same command again, or remove it", notes=LOADERS)
    if is_present(path / ADAPTER_CONFIG):
        found.add("adapter", f"{ADAPTER_CONFIG} lies beside the model: transformers adds that adapter to the weights, "
                  "or fails to find its base", "merge it, or move it to a directory of its own", blocks=TRANSFORMERS)


def _check_config(facts: ServingFacts, config: Mapping[str, Any], found: Findings) -> None:
    named = config.get("architectures")
    if facts.architecture is not None and (not isinstance(named, list) or facts.architecture not in named):
        found.add("config.json", f"architectures is {shorten(named, 60)} instead of [{facts.architecture}], by which "
                  "vLLM and SGLang choose the model", "correct it", blocks=SERVERS)
    missing = []
    for field in facts.transformers4_fields:
        section: Any = config
        for part in field.split("."):
            section = section.get(part) if isinstance(section, Mapping) else None
        missing += [field] * (section is None)
    if missing:
        found.add("config.json", f"it lacks {', '.join(missing)}, as a file that transformers 5 has written: "
                  "transformers 4.57 fails, or takes another value", "export with the original model's directory as "
                  "--model_assets_dir (its config.json has both spellings)", blocks={TRANSFORMERS4})


def _check_weights(path: Path, spec: ModelSpec, model_config: Any, found: Findings) -> Mapping[str, Header]:
    try:
        headers = read_headers(path)
        stored = {name: tensor for header in headers.values() for name, tensor in header.tensors.items()}
        layout = decide_layout(path, headers, spec, model_config, "auto")
        rules = spec.weight_rules(model_config, expert_layout=layout)
        check_tensors(path, stored, rules, spec.repeated_tensors(model_config), layout)
    except UserError as error:
        found.add("weights", str(error), _AGAIN, blocks=LOADERS)
        return {}
    if layout == "v5":
        found.add("weights", "the experts are in the layout of transformers 5, which transformers 4.57, vLLM and "
                  "SGLang read as the published one", "export by mm-convert, which writes the published layout",
                  blocks={TRANSFORMERS4, *SERVERS})
    elif model_config.num_experts and layout_by_shapes({}, spec, model_config) is None:
        found.add("weights", "one of the experts' matrices is square, so transformers 5 cannot tell the layout by the "
                  "shapes and misreads the published one", "load it with transformers 4.57, vLLM or SGLang",
                  blocks={TRANSFORMERS5})
    _check_other_weights(path, headers, found)
    types = {tensor.dtype for tensor in stored.values()}
    named, single = config_dtype(path), len(types) == 1
    text = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
    if named is not None and types != {named}:
        found.add("dtype", f"config.json says {str(named).removeprefix('torch.')}, the files hold {text}: the weights "
                  "are converted when they are loaded", "set dtype in config.json to that of the files" if single else
                  "export with --dtype", notes=LOADERS)
    if text == "float32":
        found.add("dtype", "SGLang runs float32 weights in float16, which may overflow; vLLM in bfloat16",
                  "export with --dtype bf16, or pass --dtype bfloat16 to the server", notes=SERVERS)
    return headers


def _check_other_weights(path: Path, headers: Mapping[str, Header], found: Findings) -> None:
    """Weight files that are not the model's, and the size in the index."""
    others = sorted(entry.name for entry in path.glob("*.safetensors") if entry.name not in headers)
    indexed = is_present(path / INDEX)
    if others:
        found.add("weights", f"{shorten(', '.join(others), 100)} is no part of the model"
                  + ("" if indexed else f": without {INDEX} vLLM and SGLang load it as well"),
                  "move it elsewhere", **{"notes" if indexed else "blocks": SERVERS})
    total = sum(tensor.nbytes for header in headers.values() for tensor in header.tensors.values())
    if indexed:
        metadata = read_json(path / INDEX, limit=INDEX_BYTES).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        if size != total:
            found.add("weights", f"total_size in {INDEX} is {shorten(size, 30)}, and the tensors have {total} bytes",
                      "correct it", notes=TRANSFORMERS)


def _check_manifest(path: Path, found: Findings, *, checksums: bool) -> None:
    """Files that have changed since mm-convert or a training run wrote them."""
    if not is_present(path / MANIFEST):
        if checksums:
            found.add("checksums", f"there is no {MANIFEST} with checksums to compare", "leave --checksums out, or "
                      "export by mm-convert", notes=LOADERS)
        return
    try:
        recorded = read_manifest(path)["files"]
    except UserError as error:
        found.add("checksums", str(error), "remove the file; no other program reads it", notes=LOADERS)
        return
    changed, damaged = [], []
    for name, entry in sorted(recorded.items()):
        file = path / name
        if not is_file(file):
            changed.append(f"{name} is missing")
        elif file.stat().st_size != entry["size"]:
            changed.append(f"{name} has {file.stat().st_size} bytes instead of {entry['size']}")
        elif checksums and os.access(file, os.R_OK) and file_checksum(file) != entry["checksum"]:
            weights = name.endswith(".safetensors")  # of the same size, so nobody has replaced them
            (damaged if weights else changed).append(f"{name} has another checksum than recorded")
    if damaged:
        found.add("weights", shorten("; ".join(damaged), 200), _AGAIN, blocks=LOADERS)
    if changed:
        found.add("changed files", f"since the export: {shorten('; '.join(changed), 200)}", f"{_AGAIN}, unless meant",
                  notes=LOADERS)


def _check_name(path: Path, facts: ServingFacts, found: Findings) -> None:
    """Programs that conclude something from the path; a link under another name is enough."""
    text = os.path.abspath(path)
    link = "make a link of another name to it (ln -s) and pass that"
    if facts.name_pattern is not None and bool(re.search(facts.name_pattern, text)) != facts.named:
        kind, has = ("a sparse", "has no") if facts.named else ("a dense", "has a")
        found.append(Finding(
            "directory name", f"lmms-eval's own loader of this family takes a path for that of {kind} model by "
            f"{facts.name_pattern}, and this one {has} such part: it would load the wrong class",
            f"{link}, such as {'my-30B-A3B' if facts.named else 'my-8B'}, or evaluate through a server",
            frozenset(), frozenset({LMMS_EVAL}),
        ))
    if facts.name_pattern is not None and _OMNI in text.lower():
        found.append(Finding("directory name", f"the path contains {_OMNI}, by which VLMEvalKit loads another class",
                             link, frozenset(), frozenset({VLMEVALKIT})))
    if match := re.search(_OTHER_TEMPLATES, text, re.IGNORECASE):
        found.append(Finding(
            "directory name", f"the path contains {shorten(match.group(), 40)}, by which SGLang takes a built-in chat "
            "template of another model", f"{link}, or pass --chat-template", frozenset(), frozenset({SGLANG}),
        ))
