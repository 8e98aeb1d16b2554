"""Checks of the small files of a model directory: tokenizer, chat template, processors, generation settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.check_hf.consumers import (
    LMMS_EVAL,
    LOADERS,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    VLMEVALKIT,
    Finding,
    Findings,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import INDEX_BYTES, is_file, is_present, read_json, read_text, shorten
from mindspeed_mm.models.spec import ModelSpec, ServingFacts

FROM_ORIGINAL = "copy it from the original model directory"
GENERATION = "generation_config.json"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_IMAGES, _VIDEOS, _JOINT = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
_TEMPLATE_JSON, _TEMPLATE_JINJA = "chat_template.json", "chat_template.jinja"


def check_assets(path: Path, spec: ModelSpec, model_config: Any, config: Mapping[str, Any]) -> list[Finding]:
    """What the small files of a directory lack.

    Args:
        path: Hugging Face directory.
        spec: of its model family.
        model_config: of the model.
        config: content of its ``config.json``.
    """
    facts, found = spec.serving_facts(model_config), Findings()
    tokenizer_config = _content(path / _TOKENIZER_CONFIG, found, "tokenizer settings")
    ids = _token_ids(path, tokenizer_config, found)
    _check_tokenizer(path, spec, model_config, ids, found)
    _check_template(path, facts, tokenizer_config, found)
    if spec.media_kinds:
        _check_processors(path, spec, model_config, found)
    _check_stop_tokens(path, facts, config, tokenizer_config, ids, found)
    return found


def _content(path: Path, found: Findings, topic: str) -> dict[str, Any]:
    """What a JSON file holds; empty if there is none, or, with a finding, if it is damaged."""
    if not is_present(path):
        return {}
    try:
        return read_json(path, remedy=FROM_ORIGINAL, limit=INDEX_BYTES)
    except UserError as error:
        found.add(topic, str(error), FROM_ORIGINAL, blocks=LOADERS)
        return {}


def _check_tokenizer(
    path: Path, spec: ModelSpec, model_config: Any, ids: Mapping[str, int], found: Findings
) -> None:
    together = "take tokenizer and model of one checkpoint"
    if not is_file(path / _TOKENIZER) and not is_file(path / "vocab.json"):
        found.add("tokenizer", f"there is neither {_TOKENIZER} nor vocab.json; transformers 5 then makes a tokenizer "
                  "that knows no word", FROM_ORIGINAL, blocks=LOADERS)
    elif not ids and not is_present(path / _TOKENIZER):
        found.add("tokenizer", f"there is no {_TOKENIZER}, and no added_tokens_decoder in {_TOKENIZER_CONFIG}: the ids "
                  "of special tokens would be guessed", FROM_ORIGINAL, blocks=LOADERS)
    for field, (token, number) in spec.special_token_ids(model_config).items() if ids else ():
        if ids.get(token) != number:
            found.add("tokenizer", f"{field} in config.json is {number}, and {token} is {ids.get(token, 'no token')} "
                      "in the tokenizer", together, blocks=LOADERS)
    if ids and max(ids.values()) >= model_config.vocab_size:
        found.add("tokenizer", f"it has the token id {max(ids.values())}, and config.json a vocabulary of "
                  f"{model_config.vocab_size}", together, blocks=LOADERS)
    if not is_present(path / _TOKENIZER_CONFIG):
        found.add("tokenizer settings", f"{_TOKENIZER_CONFIG} is missing, which names the end of an answer",
                  FROM_ORIGINAL, blocks=LOADERS)


def _token_ids(path: Path, tokenizer_config: Mapping[str, Any], found: Findings) -> dict[str, int]:
    """Special token -> id, of the file that transformers takes them from; empty if that is missing or damaged."""
    if is_present(path / _TOKENIZER):
        content = _content(path / _TOKENIZER, found, "tokenizer")
        model, listed = content.get("model"), content.get("added_tokens")
        if content and not (isinstance(model, dict) and model.get("vocab")):
            found.add("tokenizer", f"{_TOKENIZER} has no vocabulary", FROM_ORIGINAL, blocks=LOADERS)
    else:
        decoder = tokenizer_config.get("added_tokens_decoder")
        entries = decoder.items() if isinstance(decoder, dict) else ()
        listed = [{**token, "id": int(key)} for key, token in entries if key.isdecimal() and isinstance(token, dict)]
    return {
        token["content"]: token["id"] for token in (listed if isinstance(listed, list) else ())
        if isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
    }


def _check_template(path: Path, facts: ServingFacts, tokenizer_config: Mapping[str, Any], found: Findings) -> None:
    """The processor reads its template from a file of its own, the tokenizer from its settings or chat_template.jinja.

    transformers renders messages with images by the processor's template. vLLM and SGLang take that first, and the
    tokenizer's if there is none.
    """
    jinja = None
    if is_present(path / _TEMPLATE_JINJA):
        try:
            jinja = read_text(path / _TEMPLATE_JINJA)
        except UserError as error:
            found.add("chat template", str(error), FROM_ORIGINAL, blocks=LOADERS)
            return
    content = _content(path / _TEMPLATE_JSON, found, "chat template")
    processor = content.get("chat_template") or jinja
    tokenizer = jinja or tokenizer_config.get("chat_template")
    if not processor and not tokenizer:
        found.add("chat template", f"neither {_TEMPLATE_JSON}, {_TEMPLATE_JINJA} nor {_TOKENIZER_CONFIG} has one: "
                  "messages cannot be rendered", f"copy {_TEMPLATE_JSON} from the original model directory",
                  blocks=LOADERS)
        return
    if not processor:
        found.add("chat template", f"only {_TOKENIZER_CONFIG} has one, and the processor does not read that: "
                  "apply_chat_template of AutoProcessor fails",
                  f"copy {_TEMPLATE_JSON} from the original model directory", blocks=TRANSFORMERS)
    if not tokenizer:
        found.add("chat template", f"{_TOKENIZER_CONFIG} has none: apply_chat_template of AutoTokenizer and tool calls "
                  "of vLLM fail", "copy tokenizer_config.json from the original model directory",
                  notes=(*TRANSFORMERS, VLLM))
    if jinja and content.get("chat_template") not in (None, jinja):
        found.add("chat template", f"{_TEMPLATE_JSON} (read by the processor) and {_TEMPLATE_JINJA} (read by the "
                  "tokenizer) differ", "remove the one that the model was not trained with", notes=LOADERS)
    for kind, token in facts.media_tokens.items():
        if token not in _text(processor or tokenizer):
            found.add("chat template", f"it never writes {token}, so messages with a{'n' * (kind == 'image')} {kind} "
                      "cannot be rendered", "copy the template from the original model directory",
                      **{"blocks" if kind == "image" else "notes": LOADERS})


def _text(template: Any) -> str:
    """A template, or all of several named ones, as older files have them."""
    if isinstance(template, list):
        return "\n".join(str(entry.get("template", "")) for entry in template if isinstance(entry, dict))
    return str(template)


def _check_processors(path: Path, spec: ModelSpec, model_config: Any, found: Findings) -> None:
    try:
        spec.check_processors(path, model_config)
    except UserError as error:
        found.add("image processor", str(error), FROM_ORIGINAL, blocks=LOADERS)
        return
    joint, own = (_content(path / name, found, "image processor") for name in (_JOINT, _IMAGES))
    parts = (own, joint.get("image_processor"))
    if not any(isinstance(part, dict) and part.get("image_processor_type") for part in parts):
        found.add("image processor", f"{_IMAGES} has no image_processor_type, by which the class is chosen",
                  FROM_ORIGINAL, blocks=LOADERS)
    if "video" in spec.media_kinds and not is_present(path / _VIDEOS) and not joint.get("video_processor"):
        found.add("video processor", f"{_VIDEOS} is missing: videos are resized by the limits of images in {_IMAGES}",
                  f"{FROM_ORIGINAL}, if there will be videos", notes=LOADERS)


def _check_stop_tokens(
    path: Path,
    facts: ServingFacts,
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    ids: Mapping[str, int],
    found: Findings,
) -> None:
    """Whether generation stops at the end of an answer.

    transformers stops at the ids of generation_config.json, or of config.json if that is missing. vLLM adds the
    tokenizer's eos_token, SGLang too; lmms-eval takes that alone.
    """
    present = is_present(path / GENERATION)
    generation = _content(path / GENERATION, found, "generation settings")
    if not present:
        found.add(
            "generation settings", f"{GENERATION} is missing: the model's temperature, top_p and top_k are lost "
            "(transformers answers greedily, vLLM and SGLang sample at temperature 1)", FROM_ORIGINAL, notes=LOADERS,
        )
    if facts.end_of_answer is None or facts.end_of_answer not in ids:
        return
    inner = config.get("text_config")
    outer_ids = _as_ids(config.get("eos_token_id"))
    inner_ids = _as_ids(inner.get("eos_token_id")) if isinstance(inner, dict) else set()
    from_file = _as_ids(generation.get("eos_token_id"))
    eos_token = tokenizer_config.get("eos_token")
    eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    of_tokenizer = {ids[eos_token]} if isinstance(eos_token, str) and eos_token in ids else set()
    general = from_file if present else outer_ids | inner_ids
    end = ids[facts.end_of_answer]
    stops = {
        **dict.fromkeys((*sorted(TRANSFORMERS), VLMEVALKIT), general), VLLM: general | of_tokenizer,
        SGLANG: from_file | outer_ids | of_tokenizer, LMMS_EVAL: of_tokenizer,
    }
    endless = {name for name, numbers in stops.items() if end not in numbers}
    if endless:
        # judged for each consumer by itself
        found.append(Finding(
            "stop tokens", f"generation does not stop at {facts.end_of_answer} (id {end}): eos_token_id of "
            f"{GENERATION} is {shorten(generation.get('eos_token_id', 'missing'), 40)}, eos_token of "
            f"{_TOKENIZER_CONFIG} {shorten(eos_token or 'missing', 40)}; answers run on to the token limit",
            f"copy {GENERATION} and {_TOKENIZER_CONFIG} from the original model directory", frozenset(endless),
            frozenset(),
        ))
    text_end = ids.get(facts.end_of_text or "")
    if present and not endless and text_end is not None and text_end not in from_file:
        found.add("stop tokens", f"eos_token_id of {GENERATION} lacks {facts.end_of_text} (id {text_end}): a model "
                  "that ends by it is not stopped", f"add it to the list in {GENERATION}", notes=LOADERS)


def _as_ids(value: Any) -> set[int]:
    return {number for number in (value if isinstance(value, list) else [value]) if type(number) is int}
