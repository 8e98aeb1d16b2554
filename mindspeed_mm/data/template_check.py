"""The data file's template against the chat template that the checkpoint itself brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_mm.interfaces.conversation import Message
from mindspeed_mm.models.qwen3_vl.chat_template import TEMPLATES, ChatTemplate

_PAD, _PADS = "<|image_pad|>", 2
_QUESTIONS = ("<image>\nWhat is it?", "Are you sure?")
_ANSWERS = ("A dog.", "Yes.")
_THOUGHT = "<think>\nlet me see\n</think>\n\n"


def compare_with_checkpoint(tokenizer: Any, directory: str | Path, *, name: str, enable_thinking: bool) -> str:
    """Try both on a short conversation.

    Args:
        tokenizer: the checkpoint's.
        directory: the checkpoint's.
        name: ``template`` of the data file.
        enable_thinking: of the data file.

    Returns:
        A warning that names the template that fits, or "" if they agree or there is nothing to compare with.
    """
    published = read_published_template(Path(directory))
    if published is None or _agree(tokenizer, published, name, enable_thinking):
        return ""
    fitting = [
        f'"{other}"{" with enable_thinking" if thinks else ""}'
        for other in TEMPLATES
        for thinks in ((True, False) if other == "qwen3_vl" else (False,))
        if _agree(tokenizer, published, other, thinks)
    ]
    remedy = f"template {fitting[0]} does" if fitting else "no other template here does either"
    ours = f'template "{name}"{" with enable_thinking" if enable_thinking else ""}'
    return (
        f"warning: {ours} does not give the tokens of the chat template in {directory}, by which the model is used "
        f"later; {remedy}"
    )


def read_published_template(directory: Path) -> str | None:
    """The chat template among a checkpoint's files, or None if there is none."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    for file in ("chat_template.json", "tokenizer_config.json"):
        try:
            content = json.loads((directory / file).read_text()).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(content, str):
            return content
    return None


def _agree(tokenizer: Any, published: str, name: str, enable_thinking: bool) -> bool:
    """Whether both give the same tokens; a template that cannot render the conversation says nothing."""
    import jinja2

    thought = "" if name == "qwen3_vl" and not enable_thinking else _THOUGHT  # it takes thoughts out
    conversation: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        text = question.removeprefix("<image>")
        image = [{"type": "image"}] if text != question else []
        conversation.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": thought + answer}]})
    try:
        text = tokenizer.apply_chat_template(conversation, chat_template=published, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError):
        return True
    theirs = tokenizer(text.replace(_PAD, _PAD * _PADS), add_special_tokens=False)["input_ids"]
    messages = [Message("system", "Be brief.")]
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        messages += [Message("user", question), Message("assistant", thought + answer)]
    ours = ChatTemplate(tokenizer, name=name, enable_thinking=enable_thinking).encode(
        messages, [_PADS], max_length=len(theirs) + len(text)
    )
    return ours is not None and ours.input_ids.tolist() == list(theirs)
