"""The data file's template against the chat template that the checkpoint itself brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.data.chat_rendering import TemplateError, render_conversations
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, read_text
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, ChatTemplateOptions, Message
from mindspeed_mm.models.spec import ModelSpec

_QUESTIONS = ("What is it?", "Are you sure?")
_ANSWERS = ("A dog.", "Yes.")
_THOUGHT = "<think>\nlet me see\n</think>\n\n"


def compare_with_checkpoint(
    tokenizer: Any, directory: str | Path, spec: ModelSpec, options: ChatTemplateOptions
) -> str:
    """Try both on a short conversation.

    Args:
        tokenizer: the checkpoint's.
        directory: the checkpoint's.
        spec: the model family.
        options: by the data file.

    Returns:
        A warning that names the template that fits, or "" if they agree or there is nothing to compare with.
    """
    try:
        published = read_published_template(Path(directory))
        return _compare(tokenizer, directory, published, spec, options)
    except UserError as error:
        return f"warning: the chat template is not compared with that of {directory}: {error}"


def _compare(
    tokenizer: Any, directory: str | Path, published: str | None, spec: ModelSpec, options: ChatTemplateOptions
) -> str:
    chosen = _Choice(options.name, options.enable_thinking)
    if published is None or _agree(tokenizer, published, spec, chosen):
        return ""
    choices = [
        _Choice(name, thinks)
        for name in spec.chat_templates
        for thinks in ((True, False) if name in spec.thinking_templates else (False,))
    ]
    fitting = [str(choice) for choice in choices if _agree(tokenizer, published, spec, choice)]
    remedy = f"template {fitting[0]} does" if fitting else "no other template here does either"
    return (
        f"warning: template {chosen} does not give the tokens of the chat template in {directory}, by which the model "
        f"is used later; {remedy}"
    )


class _Choice(NamedTuple):
    """A template with or without ``enable_thinking``."""

    name: str
    thinks: bool

    def __str__(self) -> str:
        return f'"{self.name}"{" with enable_thinking" if self.thinks else ""}'


def read_published_template(directory: Path) -> str | None:
    """The chat template among a checkpoint's files, or None if there is none.

    Raises:
        UserError: if a file that may hold it cannot be read.
    """
    if is_present(directory / "chat_template.jinja"):
        return read_text(directory / "chat_template.jinja")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if is_present(directory / file):
            content = read_json(directory / file).get("chat_template")
            if isinstance(content, str):
                return content
    return None


def _agree(tokenizer: Any, published: str, spec: ModelSpec, choice: _Choice) -> bool:
    """Whether both give the same tokens; a template that cannot render the conversation says nothing."""
    # without enable_thinking such a template takes thoughts out
    thought = "" if choice.name in spec.thinking_templates and not choice.thinks else _THOUGHT
    with_image = "image" in spec.media_kinds
    messages = [Message("system", "Be brief.")]
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        tag = f"{IMAGE_TAG}\n" if with_image and len(messages) == 1 else ""
        messages += [Message("user", tag + question), Message("assistant", thought + answer)]
    conversation = [{"role": one.role, "content": _content(one.text, parts=with_image)} for one in messages]
    try:
        (text,) = render_conversations(tokenizer, [conversation], chat_template=published)
    except TemplateError:
        return True
    theirs = tokenizer(text, add_special_tokens=False)["input_ids"]  # with one placeholder for the image
    options = ChatTemplateOptions(name=choice.name, enable_thinking=choice.thinks)
    ours = spec.build_chat_template(tokenizer, options).encode(
        messages, [1] * with_image, max_length=len(theirs) + len(text)
    )
    return ours is not None and ours.input_ids.tolist() == list(theirs)


def _content(text: str, *, parts: bool) -> Any:
    """A message's content as chat templates take it: parts where there may be an image among them, else a string."""
    if not parts:
        return text
    image = [{"type": "image"}] if text.startswith(IMAGE_TAG) else []
    return [*image, {"type": "text", "text": text.removeprefix(IMAGE_TAG)}]
