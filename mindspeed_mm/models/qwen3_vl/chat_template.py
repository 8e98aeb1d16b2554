"""Conversation to token ids and loss mask, in the chat format of Qwen3-VL.

The ids equal those of the model's own chat template for the same conversation. The loss counts the tokens that the
model has to produce: an answer and its ``<|im_end|>``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten, unique_keys
from mindspeed_mm.interfaces.conversation import (
    IMAGE_TAG,
    MEDIA_TAG,
    VIDEO_TAG,
    ChatTemplateOptions,
    Clip,
    Encoded,
    Message,
    media_tags,
)

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_IMAGE_PAD, _VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_TOOL_CALL = "<tool_call>\n"
_CALL_KEYS_WITHOUT_EFFECT = ("id", "type", "index")  # the model's own template leaves them out, too
# Written out in a message, these are text: they would end turns or claim vision features that do not exist.
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


@dataclasses.dataclass
class _Segment:
    """A stretch of tokens: one special token, the placeholders of an image or slice, or text tokenized as one."""

    text: str = ""
    token: int = -1
    count: int = 1
    loss_mask: bool = False
    is_excluded: bool = False  # from the loss, even with train_on_prompt


def _is_question(message: Message) -> bool:
    """The model's template takes a question that is wrapped like a tool's result for such a result."""
    wrapped = message.text.startswith("<tool_response>") and message.text.endswith("</tool_response>")
    return message.role == "user" and not wrapped


def find_control_token(text: str) -> str:
    """The first control token of the chat format that is written out in ``text``, or an empty string."""
    found = _CONTROL.search(text) if "<|" in text else None  # most texts lack these two, which are found faster
    return found.group() if found else ""


def tool_call_text(content: str) -> str:
    """The answer that calls tools, from JSON: ``{"name": ..., "arguments": ...}`` or a list of these.

    Raises:
        ValueError: if ``content`` is something else.
    """
    try:
        parsed = json.loads(content, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError('a tool call must be {"name": ..., "arguments": ...} or a list of these')
    if not all(isinstance(call["name"], str) for call in calls):
        raise ValueError("the name in a tool call must be a string")
    for call in calls:
        if others := sorted(call.keys() - {"name", "arguments", *_CALL_KEYS_WITHOUT_EFFECT}):
            raise ValueError(f"a tool call is its name and arguments; remove {shorten(', '.join(others))}")
    lines = []
    for call in calls:
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(f'{_TOOL_CALL}{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(lines)


def tools_text(tools: Sequence[Any], system: str | None) -> str:
    """The system message that describes the tools, after its own text ``system``, if there is one."""
    own = "" if system is None else f"{system}\n\n"
    described = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    return (
        f"{own}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>{described}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


class Qwen3VLChatTemplate:
    """Turns conversations into tokens.

    ``qwen3_vl_nothink`` is the format of the Instruct models. ``qwen3_vl`` is that of the Thinking models: thoughts
    (``<think>...</think>`` at the start of an answer) are shown only after the last question. With
    ``enable_thinking`` the last answer starts with its thought, empty if it has none, and only answers after the last
    question count in the loss, since earlier ones lack the thought that led to them. Without ``enable_thinking``
    thoughts are removed and the last answer follows a given, empty thought.
    """

    def __init__(self, tokenizer: Any, options: ChatTemplateOptions) -> None:
        """Prepare for ``tokenizer``, a fast tokenizer of transformers.

        Args:
            tokenizer: must have Qwen's special tokens.
            options: names one of the family's templates.

        Raises:
            UserError: for a tokenizer that is not fast or lacks Qwen's tokens.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("the tokenizer is not a fast one; set use_fast_tokenizer to true or add its tokenizer.json")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self._thinks = options.name == "qwen3_vl"
        self._options = options
        self._ids = {}
        for token in (_TURN_START, _TURN_END, _VISION_START, _VISION_END, _IMAGE_PAD, _VIDEO_PAD):
            token_id = backend.token_to_id(token)
            if token_id is None:
                raise UserError(f"the tokenizer has no token {token}; model_name_or_path must be a Qwen3-VL checkpoint")
            if backend.encode(token, add_special_tokens=False).ids != [token_id]:
                raise UserError(f"the tokenizer splits {token} into letters; its files do not belong together: "
                                "download the small files of the checkpoint again")
            self._ids[token] = token_id
        # Of one token, at most: a token's name has a character per byte; the normalizer may compose up to 4 into one.
        self._most_characters = 4 * max(map(len, backend.get_vocab()))
        others = [
            re.escape(token.content)
            for token in backend.get_added_tokens_decoder().values()
            if token.special and not _CONTROL.fullmatch(token.content)
        ]
        self._other_special = re.compile(f"({'|'.join(others) or '(?!)'})")
        self._prefixes: dict[str, list[int]] = {}

    def encode(self, messages: Sequence[Message], media: Sequence[int | Clip], *, max_length: int) -> Encoded | None:
        """See :class:`~mindspeed_mm.interfaces.conversation.ChatTemplate`."""
        ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
        rendered = self._render(messages, media)
        whole = [*chain.from_iterable(rendered)]
        if ends and ends[-1] == len(messages) and self._least_tokens(whole) <= max_length:
            ids, loss_mask = self._tokenize(whole)
            if len(ids) <= max_length:
                return Encoded(ids, loss_mask, len(media_tags(messages)), 0)
        for end in reversed(self._possible_ends(rendered, ends, max_length)):
            kept = messages[:end]
            ids, loss_mask = self._tokenize([*chain.from_iterable(self._render(kept, media))])
            if len(ids) <= max_length:
                return Encoded(ids, loss_mask, len(media_tags(kept)), len(messages) - end)
        return None

    def _possible_ends(
        self, rendered: Sequence[Sequence[_Segment]], ends: Sequence[int], max_length: int
    ) -> list[int]:
        """The ``ends`` up to which the conversation may fit.

        Every message starts with a special token, so that the tokens of turns add up. In a shorter conversation some
        answers may show a thought that they lack in the whole; none gets shorter.
        """
        possible: list[int] = []
        total = start = 0
        for end in ends:
            turn = [*chain.from_iterable(rendered[start:end])]
            if total + self._least_tokens(turn) > max_length:
                break
            total += len(self._tokenize(turn)[0])
            if total > max_length:
                break
            possible.append(end)
            start = end
        return [end for end in possible if end < len(rendered)]

    def _least_tokens(self, segments: Iterable[_Segment]) -> int:
        """A lower bound, so that text of many megabytes, which cannot fit, is not tokenized at all."""
        return sum(
            segment.count if segment.token >= 0 else len(segment.text) // self._most_characters for segment in segments
        )

    def _render(self, messages: Sequence[Message], media: Sequence[int | Clip]) -> list[list[_Segment]]:
        """Segments of each message."""
        questions = [place for place, message in enumerate(messages) if _is_question(message)]
        last_question = questions[-1] if questions else len(messages) - 1  # with none the template shows no thought
        rendered: list[list[_Segment]] = []
        remaining = iter(media)
        for place, message in enumerate(messages):
            if message.role == "assistant":
                head, answer = self._answer(message.text, after_question=place > last_question,
                                            is_last=place == len(messages) - 1)
                loss_mask = not (self._options.mask_history and place < len(messages) - 1) and not (
                    self._options.enable_thinking and place < last_question
                ) if message.in_loss is None else message.in_loss
                excluded = message.in_loss is False
                segments = self._turn(head, [_Segment(text=answer, loss_mask=loss_mask, is_excluded=excluded)])
                segments[-2].loss_mask = loss_mask  # <|im_end|>; after it comes the line break
                segments[-2].is_excluded = excluded
            elif message.role == "user":
                segments = self._turn("user\n", self._question(message.text, remaining))
            elif message.role == "tool":
                segments = self._tool_result(message.text, messages, place)
            else:
                segments = self._turn("system\n", [_Segment(text=message.text)])
            rendered.append(segments)
        return rendered

    def _turn(self, head: str, content: list[_Segment]) -> list[_Segment]:
        start, end = self._ids[_TURN_START], self._ids[_TURN_END]
        return [_Segment(token=start), _Segment(text=head), *content, _Segment(token=end), _Segment(text="\n")]

    def _question(self, text: str, media: Iterator[int | Clip]) -> list[_Segment]:
        segments = []
        for piece in MEDIA_TAG.split(text):
            if piece == IMAGE_TAG:
                segments += self._vision(_IMAGE_PAD, cast(int, next(media)))
            elif piece == VIDEO_TAG:
                clip = cast(Clip, next(media))
                for second in clip.seconds:
                    segments += [_Segment(text=f"<{second:.1f} seconds>"), *self._vision(_VIDEO_PAD, clip.tokens)]
            else:
                segments.append(_Segment(text=piece))
        return segments

    def _vision(self, pad: str, count: int) -> list[_Segment]:
        return [
            _Segment(token=self._ids[_VISION_START], is_excluded=True),
            _Segment(token=self._ids[pad], count=count, is_excluded=True),
            _Segment(token=self._ids[_VISION_END], is_excluded=True),
        ]

    def _tool_result(self, text: str, messages: Sequence[Message], place: int) -> list[_Segment]:
        """Results of tools that were called together share one turn of the user."""
        segments = [_Segment(text=f"\n<tool_response>\n{text}\n</tool_response>")]
        if messages[place - 1].role != "tool":
            segments = [_Segment(token=self._ids[_TURN_START]), _Segment(text="user"), *segments]
        if messages[place + 1].role != "tool":
            segments += [_Segment(token=self._ids[_TURN_END]), _Segment(text="\n")]
        return segments

    def _answer(self, text: str, *, after_question: bool, is_last: bool) -> tuple[str, str]:
        """What the template gives, and what the model has to produce."""
        if not self._thinks:
            return "assistant\n", text
        thought, content = "", text
        if "</think>" in text and not text.startswith(_TOOL_CALL):  # what a tool is given is not a thought
            content = text.rpartition("</think>")[2].lstrip("\n")
            thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
        if not after_question or not (is_last or thought):
            return "assistant\n", content
        content = content.lstrip("\n")
        if self._options.enable_thinking:
            return "assistant\n<think>\n", f"{thought}\n</think>\n\n{content}"
        return "assistant\n<think>\n\n</think>\n\n", content

    def _tokenize(self, segments: Sequence[_Segment]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        flags: list[bool] = []
        given, produced = "", ""  # neighbouring text is one piece for the tokenizer, as in a rendered template
        counts_given = self._options.train_on_prompt

        def flush() -> None:
            nonlocal given, produced, counts_given
            if given or produced:
                tokens, boundary = self._text_tokens(given, produced)
                ids.extend(tokens)
                flags.extend([counts_given] * boundary + [True] * (len(tokens) - boundary))
            given = produced = ""
            counts_given = self._options.train_on_prompt

        for segment in segments:
            if segment.token < 0:
                counts_given = counts_given and not segment.is_excluded
                if segment.loss_mask:
                    produced += segment.text
                else:
                    given += segment.text
                continue
            flush()
            ids.extend([segment.token] * segment.count)
            counts = segment.loss_mask or (self._options.train_on_prompt and not segment.is_excluded)
            flags.extend([counts] * segment.count)
        flush()
        return np.array(ids, dtype=np.int64), np.array(flags, dtype=bool)

    def _text_tokens(self, given: str, produced: str) -> tuple[list[int], int]:
        """Tokens of ``given + produced``, and how many of them are given.

        A token that straddles the border counts as given: the model will never be asked for it, since the text up to
        the border is tokenized by itself when an answer is generated.
        """
        tokens = self._encode(given + produced)
        if not produced:
            return tokens, len(tokens)
        if given not in self._prefixes:
            self._prefixes[given] = self._encode(given)
        prefix = self._prefixes[given]
        for place, (token, expected) in enumerate(zip(tokens, prefix, strict=False)):
            if token != expected:
                return tokens, place + 1
        return tokens, len(prefix)

    def _encode(self, text: str) -> list[int]:
        splits_all = self._options.split_special_tokens
        if splits_all or not find_control_token(text):
            return self._encode_piece(text, split=splits_all)
        # only the control tokens are text: a box or a reference keeps its token
        pieces = self._other_special.split(text)
        return [
            token for place, piece in enumerate(pieces) if piece
            for token in self._encode_piece(piece, split=place % 2 == 0)
        ]

    def _encode_piece(self, text: str, *, split: bool) -> list[int]:
        self._backend.encode_special_tokens = split
        return self._backend.encode(text, add_special_tokens=False).ids
