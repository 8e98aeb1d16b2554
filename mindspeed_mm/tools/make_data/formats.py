"""Formats: from a scene and its stored images and videos to a record in the form that the format's trainer reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed_mm.tools.make_data.scenes import Turn


@dataclasses.dataclass(frozen=True)
class Content:
    """What a record has to hold; ``name`` is unique in the data set.

    Images are paths, URIs, or objects with bytes and path; videos paths, or lists of the paths of frames. Without
    videos in the whole data set ``videos`` is None.
    """

    name: str
    turns: Sequence[Turn]
    images: list[Any]
    videos: list[Any] | None

    def texts(self) -> list[tuple[str, str]]:
        """Questions and answers, with the tags of all images and videos in the first question."""
        tags = "<image>\n" * len(self.images) + "<video>\n" * len(self.videos or ())
        return [(tags * (not number) + turn.question, turn.answer) for number, turn in enumerate(self.turns)]

    def media(self) -> dict[str, Any]:
        """The columns ``images`` and ``videos``."""
        return {"images": self.images} | ({} if self.videos is None else {"videos": self.videos})


def _dialogue(content: Content, role: str, text: str, *names: str) -> list[dict[str, str]]:
    return [{role: name, text: one} for turn in content.texts() for name, one in zip(names, turn, strict=True)]


def _messages(content: Content) -> dict[str, Any]:
    return {"messages": _dialogue(content, "role", "content", "user", "assistant"), **content.media()}


def _sharegpt(content: Content) -> dict[str, Any]:
    return {"conversations": _dialogue(content, "from", "value", "human", "gpt"), **content.media(), "system": ""}


def _llava(content: Content) -> dict[str, Any]:
    image = {"image": content.images[0]} if content.images else {}
    return {"id": content.name, **image, "conversations": _dialogue(content, "from", "value", "human", "gpt")}


def _qwen(content: Content) -> dict[str, Any]:
    media = {name: found for name, found in (("image", content.images), ("video", content.videos)) if found}
    return _llava(content) | media


def _openai(content: Content) -> dict[str, Any]:
    messages = []
    for number, turn in enumerate(content.turns):
        images = [] if number else [{"type": "image_url", "image_url": {"url": url}} for url in content.images]
        messages += [{"role": "user", "content": [*images, {"type": "text", "text": turn.question}]},
                     {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}]
    return {"messages": messages}


def _swift(content: Content) -> dict[str, Any]:
    record, boxes = _messages(content), [(turn.image, box) for turn in content.turns for box in turn.boxes]
    if boxes:
        refs = [name for turn in content.turns for name in turn.refs]
        record["objects"] = {"ref": refs, "bbox": [list(box) for _, box in boxes]}
        if len(content.images) > 1:  # without it ms-swift takes the first image for all boxes
            record["objects"]["image_id"] = [image for image, _ in boxes]
    return record


def _alpaca(content: Content) -> dict[str, Any]:
    *history, (question, answer) = content.texts()
    record = {"instruction": question, "input": "", "output": answer, "system": "", "history": list(map(list, history))}
    return record | content.media()


def _qa(content: Content) -> dict[str, Any]:
    turn = content.turns[0]  # no tag: the column says that there is an image
    return {"question": turn.question, "answer": turn.answer, "image": next(iter(content.images), None)}


@dataclasses.dataclass(frozen=True)
class Format:
    """What a format's trainer reads: how records hold images (the first is the default) and videos, and how many.

    ``attr`` has the fields of ``attr`` in the --mm-data file.
    """

    record: Callable[[Content], dict[str, Any]]
    image_forms: tuple[str, ...]
    video_forms: tuple[str, ...] = ()
    attr: dict[str, str] = dataclasses.field(default_factory=dict)
    max_images: int = 64
    max_turns: int = 1000


_BOTH, _ALL = ("frames", "mp4"), ("path", "bytes", "base64", "file-url")
FORMATS = {
    "messages": Format(_messages, _ALL, _BOTH),
    "sharegpt": Format(_sharegpt, _ALL[:2], _BOTH, {
        "messages": "conversations", "role_tag": "from", "content_tag": "value", "user_tag": "human",
        "assistant_tag": "gpt", "system": "system"}),
    "llava": Format(_llava, _ALL[:2], attr={"formatting": "llava"}, max_images=1),
    "qwen": Format(_qwen, _ALL[:2], ("mp4",), {"formatting": "llava"}),
    "openai": Format(_openai, ("base64", "file-url", "path"), attr={"formatting": "openai"}),
    "swift": Format(_swift, _ALL[:3], ("mp4",)),
    "alpaca": Format(_alpaca, _ALL[:2], _BOTH, {"formatting": "alpaca"}),
    "qa": Format(_qa, _ALL, attr={"formatting": "qa"}, max_images=1, max_turns=1),
}
