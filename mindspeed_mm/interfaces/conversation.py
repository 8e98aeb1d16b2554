"""Conversations: messages with image and video tags, and what a chat template makes of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
MEDIA_TAG = re.compile(f"({IMAGE_TAG}|{VIDEO_TAG})")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message: who says it, and the text, in which a question's ``<image>`` and ``<video>`` stand for them."""

    role: Role
    text: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video's placeholders: the second that each of its temporal slices stands for, and the tokens of one slice."""

    seconds: tuple[float, ...]
    tokens: int

    @property
    def total(self) -> int:
        """Placeholders of all slices."""
        return len(self.seconds) * self.tokens


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: int64 [L].
        supervised: bool [L].
        num_pictures: images and videos whose placeholders are in ``input_ids``: the conversation's first so many.
        dropped_messages: messages cut off at the end because the conversation was longer than allowed.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_pictures: int
    dropped_messages: int


def media_tags(messages: Sequence[Message]) -> list[str]:
    """``<image>`` and ``<video>`` tags of a conversation, in order.

    Only questions hold pictures and videos; a tag in another message is plain text.
    """
    return [tag for message in messages if message.role == "user" for tag in MEDIA_TAG.findall(message.text)]
