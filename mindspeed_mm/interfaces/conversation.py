"""Conversations: messages with image and video tags, and the tokens that a chat template makes of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
MEDIA_TAG = re.compile(f"({IMAGE_TAG}|{VIDEO_TAG})")


class Message(NamedTuple):
    """One message.

    Attributes:
        role: of its author.
        text: in which a question's ``<image>`` and ``<video>`` tags mark its media.
        in_loss: whether the loss counts it, an answer; None: as the options of the chat template say.
    """

    role: Role
    text: str
    in_loss: bool | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video's placeholders: the second that each of its temporal slices represents, and the tokens of one slice."""

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
        loss_mask: bool [L], the tokens that the loss counts.
        num_media: images and videos whose placeholders are in ``input_ids``, counted from the conversation's first.
        dropped_messages: messages cut off at the end because the conversation was longer than allowed.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_media: int
    dropped_messages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplateOptions:
    """What the data file chooses about a chat template.

    Attributes:
        name: one of the model family's templates.
        enable_thinking: the last answer starts with its thought; only some templates can do it.
        train_on_prompt: the loss counts all text, not only the answers.
        mask_history: the loss counts the last answer only.
        split_special_tokens: special tokens written out in a message are ordinary text. Tokens that structure a
            conversation or represent media always are.
    """

    name: str
    enable_thinking: bool = False
    train_on_prompt: bool = False
    mask_history: bool = False
    split_special_tokens: bool = False


class ChatTemplate(Protocol):
    """Turns conversations into tokens; made by a model family for a tokenizer. Must be picklable."""

    def encode(self, messages: Sequence[Message], media: Sequence[int | Clip], *, max_length: int) -> Encoded | None:
        """Tokenize a conversation, shortened to whole turns if it is too long.

        Turns are dropped from the end until the rest fits. Placeholders of an image or a video are never cut.

        Args:
            messages: a system message or none, then questions (or tools' results) and answers in turns, ending with
                an answer.
            media: placeholders (merged patches) of each image, or the Clip of each video, in the order of their tags.
            max_length: most tokens of a sample.

        Returns:
            None if not even the first turn fits.
        """


def media_tags(messages: Sequence[Message]) -> list[str]:
    """``<image>`` and ``<video>`` tags of a conversation, in order.

    Only questions hold images and videos; a tag in another message is plain text.
    """
    questions = [message.text for message in messages if message.role == "user" and "<" in message.text]
    return [tag for text in questions for tag in MEDIA_TAG.findall(text)]
