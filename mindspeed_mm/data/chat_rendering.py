"""Rendering by chat templates that come with a checkpoint, with limits of time, memory and output."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten

_SECONDS, _MEMORY_BYTES, _CHARACTERS = 10, 1 << 30, 1_000_000


class TemplateError(UserError):
    """What the template itself raised."""


def render_conversations(tokenizer: Any, conversations: Sequence[list[Any]], **options: Any) -> list[str]:
    """Conversations as text, rendered in a process of bounded time and memory.

    transformers renders in Jinja's sandbox, which keeps a template from the interpreter, but not from looping.

    Args:
        tokenizer: whose chat template is used, unless ``options`` have another.
        conversations: messages of each, as ``apply_chat_template`` takes them.
        options: of ``apply_chat_template``.

    Raises:
        TemplateError: if the template raises an error.
        UserError: if it takes too long, or too much memory, or gives too much text.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_render, args=(sender, tokenizer, conversations, options), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            raise UserError(f"it does not end within {_SECONDS} seconds")
        texts = receiver.recv()
    except EOFError:
        raise UserError("it needs too much memory") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(texts, str):
        raise TemplateError(texts)
    if texts is None:
        raise UserError(f"it gives {_CHARACTERS:,} characters more than a conversation has")
    return texts


def _render(sender: Connection, tokenizer: Any, conversations: Sequence[list[Any]], options: dict[str, Any]) -> None:
    """Send the texts; one string for an error; None for too much text."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES,) * 2)
    texts = []
    for conversation in conversations:
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except MemoryError:
            return
        except Exception as error:
            sender.send(f"{type(error).__name__}: {shorten(error)}")
            return
        if len(text) >= len(str(conversation)) + _CHARACTERS:
            sender.send(None)
            return
        texts.append(text)
    sender.send(texts)
