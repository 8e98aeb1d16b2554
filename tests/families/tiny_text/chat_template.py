"""Chat template of the tiny text family: ``Q: ...`` and ``A: ...``, each answer ended by one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mindspeed_mm.interfaces.conversation import Clip, Encoded, Message

END = "<|endoftext|>"


class TinyTextTemplate:
    """See :class:`~mindspeed_mm.interfaces.conversation.ChatTemplate`."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._end = self._backend.token_to_id(END)

    def encode(self, messages: Sequence[Message], media: Sequence[int | Clip], *, max_length: int) -> Encoded | None:
        """See :class:`~mindspeed_mm.interfaces.conversation.ChatTemplate`."""
        ids: list[int] = []
        loss_mask: list[bool] = []
        used = best = 0
        for count, message in enumerate(messages, start=1):
            answer = message.role == "assistant"
            tokens = self._backend.encode(f"{'A' if answer else 'Q'}: {message.text}\n", add_special_tokens=False).ids
            ids += [*tokens, *([self._end] if answer else [])]
            loss_mask += [answer] * (len(ids) - len(loss_mask))
            if answer and len(ids) <= max_length:
                used, best = count, len(ids)
        if not used:
            return None
        return Encoded(np.array(ids[:best]), np.array(loss_mask[:best]), 0, len(messages) - used)
