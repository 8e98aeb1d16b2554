"""Parses one row of a data file into a :class:`Record`: messages, images and videos.

Whatever the format, a message may hold text with ``<image>`` and ``<video>`` tags, or a list of parts as in OpenAI's
API; calls of tools; a thought; and a switch that takes an answer out of the loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

from mindspeed_mm.data.formats import CHANNEL, RecordFormat, RoleField
from mindspeed_mm.inputs import kind_of, reason, shorten, unique_keys
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, MEDIA_TAG, VIDEO_TAG, Message, Role, media_tags
from mindspeed_mm.models.spec import ModelSpec

_Sources = Mapping[str, list[Any]]
"""Image or video -> source of each tag, in order; None where the source is in the record's column."""
_MEDIA_COLUMNS = ("image", "images", "video", "videos")
_TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
# Keys of a message that are read besides its role and its text.
MESSAGE_KEYS = frozenset({"loss", "weight", "train", "tool_calls", "function_call", "reasoning_content"})
_SWITCHES = ("loss", "weight", "train")
_IN_LOSS: Mapping[Any, bool] = {True: True, False: False}  # also 1 and 0, with or without a point
# Keys by which other formats change what is trained on and that are not read; of records and of messages.
_CHANGES_TARGET = (
    "objects", *_SWITCHES, "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "loss_scale",
    "training", "train_detail", "masked",
)
# Keys of an image or video part that change what the model sees, and that are not read.
_CHANGES_MEDIA = (
    "max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width", "fps", "nframes", "min_frames",
    "max_frames", "video_start", "video_end",
)
_NOT_EMPTY = ("tools", "system")  # columns that need their name in attr
_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag")
_DESIRABLE = "label"  # column of preference data of single answers, true or false
_PART_KEYS: Mapping[str, tuple[str, tuple[str, ...]]] = {  # type of a part -> its kind, and keys of its content
    "text": ("text", ("text",)), "image": ("image", ("image", "url", "path", "base64")),
    "image_url": ("image", ("image_url",)), "video": ("video", ("video", "url", "path")),
    "video_url": ("video", ("video_url",)),
}
_LONGEST_CHANNEL = 100
# Keys of a part that are read.
PART_KEYS = frozenset({"type", *(key for _, keys in _PART_KEYS.values() for key in keys)})


class Video(TypedDict):
    """A video: a file, or the image files that are its frames; the other value is None. A struct in Arrow tables."""

    path: str | None
    frames: list[str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation of a data file. Each field but ``messages`` is a column of the table of records.

    Attributes:
        messages: the conversation.
        images: its images, in the order of their tags: paths or data URIs, and before they are looked for anything that
            an :class:`~mindspeed_mm.data.image_store.ImageStore` takes.
        videos: its videos, in the order of their tags.
        file: number of its data file.
        record: its index in that file.
        channel: by which evaluations are reported; empty for none.
    """

    messages: list[Message]
    images: list[Any]
    videos: list[Video]
    file: int = -1
    record: int = -1
    channel: str = ""

    def columns(self) -> dict[str, Any]:
        """The record as a row of a table: strings, lists, numbers and truth values only."""
        return {
            "roles": [message.role for message in self.messages],
            "texts": [message.text for message in self.messages],
            "in_loss": [message.in_loss for message in self.messages],
            "images": self.images,
            "videos": self.videos,
            "file": self.file,
            "record": self.record,
            "channel": self.channel,
        }


def parse_record(row: Any, form: RecordFormat, spec: ModelSpec, *, thoughts: bool = True) -> Record:
    """One row as messages, images and videos, with paths as written.

    Args:
        row: of the data file.
        form: names of its columns and keys.
        spec: the model family; formats tool calls.
        thoughts: whether ``reasoning_content`` is a part of an answer. Templates without thoughts leave it out.

    Raises:
        ValueError: saying what is wrong with the row; the caller knows the file and the index.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is {kind_of(row)}, not an object with columns")
    others = form.others if form.messages is None or form.messages in row else ()
    if other := next((column for column in others if row.get(column) not in (None, "", [])), None):
        raise ValueError(f"it has a column {other!r} besides those of the format {form}, so that it is unclear "
                         "which is meant; remove one, or name its columns in attr")
    sources: _Sources = {kind: [] for kind in _TAGS}
    if form.messages is None:
        messages = _pair_messages(row, form)
    else:
        turns = row.get(form.messages)
        if not isinstance(turns, list):
            what = f"is {kind_of(turns)}, not a list" if form.messages in row else "is missing"
            names = ", ".join(map(str, row))
            raise ValueError(f"its column {form.messages!r} (attr.messages) {what}; it has: {names}; set attr to its "
                             "columns and keys (docs/formats.md)")
        _refuse_unread(row, form, turns)
        messages = [_message(turn, place, form, spec, sources, thoughts) for place, turn in enumerate(turns)]
    messages = _with_system(messages, row, form, spec)
    complaint = check_order(messages)
    if complaint:
        raise ValueError(complaint)
    listed = {"image": _images(row, form), "video": _videos(row, form)}
    if form.messages is None:
        messages = _with_tags(messages, listed)
    tags = media_tags(messages)
    if not tags and not any(listed.values()) and not any(row.get(column) for column in _MEDIA_COLUMNS):
        return Record(messages, [], [], channel=_channel(row))
    found = {
        kind: _join(kind, sources[kind] or [None] * tags.count(tag), listed[kind], row, form, spec)
        for kind, tag in _TAGS.items()
    }
    return Record(messages, found["image"], found["video"], channel=_channel(row))


def _channel(row: Mapping[str, Any]) -> str:
    """The channel that a record names; it becomes a part of metrics' names."""
    value = row.get(CHANNEL)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"its column {CHANNEL!r}, by which evaluations are reported, is {kind_of(value)}, not a "
                         "string; write a name, or rename the column")
    if len(value) > _LONGEST_CHANNEL or not value.isprintable():
        raise ValueError(f"its column {CHANNEL!r}, by which evaluations are reported, is {shorten(value, 40)!r}; write "
                         f"a name of at most {_LONGEST_CHANNEL} printable characters, or rename the column")
    return value.strip()


def _with_system(messages: list[Message], row: Mapping[str, Any], form: RecordFormat, spec: ModelSpec) -> list[Message]:
    """The messages, with the record's system message and the tools that it may call in front."""
    system, column = _column(row, form, "system")
    if system:
        if not isinstance(system, str):
            raise ValueError(f"its column {column!r} (attr.system) is {kind_of(system)}, not a string")
        if messages and messages[0].role == "system":
            raise ValueError(f"it has a system message and a column {column!r} (attr.system); remove one of them")
        messages = [Message("system", system), *messages]
    if tools := _tools(row, form):
        first = messages.pop(0).text if messages and messages[0].role == "system" else None
        messages.insert(0, Message("system", spec.tools_text(tools, first)))
    return messages


def _column(row: Mapping[str, Any], form: RecordFormat, field: str) -> tuple[Any, str]:
    """Value of a field of ``attr`` in a record, and the column that it comes from."""
    columns = form.columns.get(field, ())
    found = [column for column in columns if row.get(column) not in (None, "", [])]
    if len(found) > 1:
        raise ValueError(f"it has the columns {found[0]!r} and {found[1]!r}, of which one is read; remove one, or name "
                         f"the other in attr.{field}")
    column = (found or [column for column in columns if column in row] or [*columns, ""])[0]
    return row.get(column), column


def _join(
    kind: str, sources: list[Any], listed: list[Any], row: Mapping[str, Any], form: RecordFormat, spec: ModelSpec
) -> list[Any]:
    """Images or videos in the order of their tags: from the parts of messages, and from the record's column.

    Raises:
        ValueError: if there are more tags, or fewer, or the model takes none.
    """
    if kind not in spec.media_kinds and (listed or any(source is not None for source in sources)):
        raise ValueError(f"it has {kind}s, which this model does not take; use other records or another model")
    if not spec.media_kinds:  # the tags are plain text
        return []
    wanted = sum(1 for source in sources if source is None)
    columns = form.columns.get(f"{kind}s", ())
    other = next((name for name in (kind, f"{kind}s") if name not in columns and row.get(name)), None)
    if columns and not listed and other:
        raise ValueError(f"its column {other!r} has content and is not read; name it in attr.{kind}s, or remove it")
    if wanted == len(listed):
        remaining = iter(listed)
        return [next(remaining) if source is None else source for source in sources]
    field = f"attr.{kind}s"
    found = f"it has {wanted} {_TAGS[kind]} tags in its questions, but "
    if not columns:
        raise ValueError(f"{found}{field} is null; set it to the column of their paths, or remove the tags")
    named = " or ".join(map(repr, columns))
    if not any(column in row for column in columns):
        raise ValueError(f"{found}no column {named} ({field}); it has: {', '.join(map(str, row))}; set {field} to the "
                         "column of their paths, or remove the tags")
    raise ValueError(f"{found}{len(listed)} {kind}s in its column {named}; write one tag for each")


def _refuse_unread(row: Mapping[str, Any], form: RecordFormat, turns: Sequence[Any]) -> None:
    """Refuse columns and keys that would change what is trained on, and that are not read.

    Raises:
        ValueError: naming the key and its value.
    """
    for name in _NOT_EMPTY:
        if name not in form.read_columns and row.get(name):
            raise ValueError(f"its column {name!r} has content and is not read; name it in attr.{name}, leave attr out "
                             "(docs/formats.md), or remove the column")
    for name in _PREFERENCES:
        if name not in form.read_columns and row.get(name) not in (None, "", [], {}):
            raise ValueError(f"it has a column {name!r}, of preference data; answers alone are trained on: write each "
                             "into messages of its own, and remove the column")
    if row.get(_DESIRABLE) is False and _DESIRABLE not in form.read_columns:
        raise ValueError(f"its column {_DESIRABLE!r} is false, as that of a rejected answer in preference data, which "
                         "would be trained on; remove the records with false, or rename the column")
    places: list[tuple[str, str, Mapping[str, Any], Iterable[str]]] = [("column", "", row, form.read_columns)]
    places += [("key", f" of message {place}", turn, MESSAGE_KEYS) for place, turn in enumerate(turns)
               if isinstance(turn, dict) and len(turn) > 2]
    for what, where, holder, known in places:
        for name in _CHANGES_TARGET:
            value = holder.get(name)
            if name not in known and value not in (None, "", [], {}) and not (name in _SWITCHES and value == 1):
                raise ValueError(
                    f"its {what} {name!r}{where} is {shorten(value, 60)}, which would change what is trained on and is "
                    "not read; write it into the messages, or remove it"
                )


def check_order(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of a conversation's messages, or None.

    A system message may come first; then questions (or tools' results) and answers take turns; the last message is an
    answer, since otherwise there is nothing to learn from it.
    """
    first = 1 if messages and messages[0].role == "system" else 0
    turns = list(messages[first:])
    if not turns:
        return "the conversation is empty"
    if turns[0].role != "user":
        return f"the conversation starts with the role {turns[0].role}, not with a question; add it, or remove that"
    for place, (before, after) in enumerate(pairwise(turns), start=first):
        if after.role == "system":
            return f"message {place + 1} is a system message, which only the first may be; move or remove it"
        if (before.role == "assistant") == (after.role == "assistant") and {before.role, after.role} != {"tool"}:
            both = f"messages {place} ({before.role}) and {place + 1} ({after.role})"
            return f"{both} do not alternate; join them into one, or remove one"
    if turns[-1].role != "assistant":
        return f"the last message ({turns[-1].role}) is not an answer, so nothing is learned from it; remove it"
    return None


def _message(
    turn: Any, place: int, form: RecordFormat, spec: ModelSpec, sources: _Sources, thoughts: bool
) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {place} is {kind_of(turn)}, not an object")
    speaker, content = turn.get(form.role_tag), turn.get(form.content_tag)
    if not isinstance(speaker, str):
        raise ValueError(_wrong_value(turn, place, form.role_tag, "role_tag", "a string"))
    if speaker not in form.roles:
        raise ValueError(
            f"message {place} has the role {shorten(speaker, 40)!r}; attr names the roles "
            f"{', '.join(form.roles)}: {_missing_role(speaker)}"
            f"{'' if form.recognised else ', or leave attr out (docs/formats.md)'}"
        )
    field, role = form.roles[speaker]
    calls = turn.get("tool_calls") or turn.get("function_call") if len(turn) > 2 else None
    if calls and turn.get("tool_calls") and turn.get("function_call"):
        raise ValueError(f"message {place} has tool_calls and function_call; remove one")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = _joined_parts(content, place, role, sources)
    elif not isinstance(content, str):
        raise ValueError(_wrong_value(turn, place, form.content_tag, "content_tag", "a string or a list of parts"))
    elif role == "user" and "<" in content:
        for tag in MEDIA_TAG.findall(content):
            sources[tag[1:-1]].append(None)
    text = content
    if field == "function_tag":
        text = _call_text(text, place, spec)
    if len(turn) == 2:
        return Message(role, _checked(text, place))
    if calls:
        text = _with_calls(text, calls, place, role, spec, columnar=form.columnar)
    if thoughts and (thought := turn.get("reasoning_content")):
        text = _with_thought(text, thought, place, role)
    return Message(role, _checked(text, place), _in_loss(turn, place, role))


def _wrong_value(turn: Mapping[str, Any], place: int, key: str, field: str, wanted: str) -> str:
    """What is wrong with a value of a message, and the remedy."""
    if key in turn:
        return f"{key!r} of message {place} is {kind_of(turn[key])}, not {wanted}"
    return (f"{key!r} of message {place} is missing; it has: {shorten(', '.join(map(str, turn)))}; set attr.{field} to "
            "its key (docs/data.md)")


def _missing_role(role: str) -> str:
    fields: dict[str, RoleField] = {
        "system": "system_tag", "developer": "system_tag", "tool": "observation_tag", "function": "observation_tag",
        "observation": "observation_tag", "tool_response": "observation_tag", "function_call": "function_tag",
        "tool_call": "function_tag",
    }
    return f"set attr.{fields[role]} to {role!r}" if role in fields else "correct the role, or attr's names"


def _checked(text: str, place: int) -> str:
    """``text``, which can be stored: JSON can hold halves of UTF-16 pairs, UTF-8 cannot."""
    if not is_text(text):
        raise ValueError(f"message {place} holds half of a character (a cut emoji); write it again")
    return text


def is_text(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined_parts(parts: Sequence[Any], place: int, role: Role, sources: _Sources) -> str:
    """A list of parts as one text with tags; what the parts hold is added to ``sources``."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind, keys = _PART_KEYS.get(str(part.get("type")) if isinstance(part, dict) else "", ("", ()))
        if not kind:
            shown = shorten(part.get("type"), 40) if isinstance(part, dict) else kind_of(part)
            raise ValueError(f"a part of message {place} has the type {shown}; it must be {', '.join(_PART_KEYS)}")
        values = [part[key] for key in keys if part.get(key) is not None]
        if kind == "text":
            if len(values) != 1 or not isinstance(values[0], str):
                raise ValueError(f"a text part of message {place} has no text; write it, or remove the part")
            if role == "user" and (tag := MEDIA_TAG.search(values[0])):
                raise ValueError(f"message {place} is a list of parts and has {tag.group()} in a text; write a part of "
                                 "that type instead")
            texts.append(values[0])
            continue
        if role != "user":
            raise ValueError(f"message {place} ({role}) has {'an' if kind == 'image' else 'a'} {kind}; only questions "
                             "may have one")
        if unread := next((key for key in _CHANGES_MEDIA if part.get(key) is not None), None):
            raise ValueError(f"{'an' if kind == 'image' else 'a'} {kind} part of message {place} has {unread}, which "
                             "is not read; remove it, and set preprocess_parameters for all (docs/media.md)")
        if len(values) > 1:
            raise ValueError(f"{'an' if kind == 'image' else 'a'} {kind} part of message {place} has more than one of "
                             f"{', '.join(keys)}; keep one")
        texts.append(_TAGS[kind])
        sources[kind].append(_source(values[0], kind, place) if values else None)
    return "".join(texts)


def _source(value: Any, kind: str, place: int) -> Any:
    """The image or video of a part, as the record's column would have it."""
    if kind == "video":
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            value = value["url"]
        return _video(value, f"a part of message {place}")
    return _image(value, f"a part of message {place}")


def _call_text(content: str, place: int, spec: ModelSpec) -> str:
    try:
        return spec.tool_call_text(content)
    except ValueError as error:
        raise ValueError(f"message {place} is not a tool call: {error}") from error


def _with_calls(text: str, calls: Any, place: int, role: Role, spec: ModelSpec, *, columnar: bool) -> str:
    """A text and the calls after it, as the chat template joins them."""
    if role != "assistant":
        raise ValueError(f"message {place} ({role}) calls tools; only answers may")
    listed = calls if isinstance(calls, list) else [calls]
    functions = []
    for call in listed:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict):
            raise ValueError(f"message {place} is not a tool call: it is {kind_of(function)}, not an object")
        arguments = function.get("arguments")
        if columnar and _holds_none(arguments):
            raise ValueError(f"the arguments of a call in message {place} are an object, which has the keys of every "
                             "other one in such a file; store them as JSON text")
        if isinstance(arguments, str):
            _check_json(arguments, place)
        functions.append({key: value for key, value in function.items() if value is not None})
    rendered = _call_text(json.dumps(functions, ensure_ascii=False), place, spec)
    return f"{text}\n{rendered}" if text else rendered


def _holds_none(value: Any) -> bool:
    """Whether an object or a list holds null anywhere, or is an Arrow map, which comes as a list of pairs."""
    if isinstance(value, dict):
        return any(map(_holds_none, value.values()))
    if isinstance(value, list):
        return any(isinstance(one, tuple) or _holds_none(one) for one in value)
    return value is None


def _check_json(arguments: str, place: int) -> None:
    try:
        json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments of a call in message {place} are not valid JSON: {reason(error)}; correct "
                         "them ({} for none)") from error


def _with_thought(text: str, thought: Any, place: int, role: Role) -> str:
    """An answer after its thought, from which the chat template takes both apart again."""
    if role != "assistant" or not isinstance(thought, str):
        what = f"of {role} message {place}" if isinstance(thought, str) else f"of message {place} is {kind_of(thought)}"
        raise ValueError(f"reasoning_content {what}; it must be the thought before an answer, a string")
    if "<think>" in thought or "</think>" in thought + text:
        raise ValueError(f"message {place} has reasoning_content, and <think> or </think> in its texts; keep one")
    return f"<think>\n{thought}\n</think>\n\n{text}"


def _in_loss(turn: Mapping[str, Any], place: int, role: Role) -> bool | None:
    """Whether the loss counts an answer; None: the data file decides."""
    given = {key: turn[key] for key in _SWITCHES if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in _IN_LOSS:
            raise ValueError(f"{key!r} of message {place} is {shorten(value, 40)}; it must be true or false, 1 or 0")
    values = {_IN_LOSS[value] for value in given.values()}
    if len(values) > 1:
        raise ValueError(f"{' and '.join(given)} of message {place} contradict each other; keep one")
    if True in values and role != "assistant":
        raise ValueError(f"{next(iter(given))!r} of message {place} ({role}) is true, and only answers are trained on; "
                         "remove it (basic_parameters.train_on_prompt trains on all text)")
    return values.pop() if values and role == "assistant" else None


def _pair_messages(row: Mapping[str, Any], form: RecordFormat) -> list[Message]:
    """The conversation of a record that is a prompt and its response, after the turns of its history."""

    def text(field: str, *, required: bool) -> str:
        value, column = _column(row, form, field)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            what = f"is {kind_of(value)}, not a string" if column in row else "is missing"
            raise ValueError(f"its column {column!r} (attr.{field}) {what}; it has: {', '.join(map(str, row))}")
        return value

    _refuse_unread(row, form, ())
    history, column = _column(row, form, "history")
    messages = []
    for turn in history or ():
        if not isinstance(history, list) or not (
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)
        ):
            raise ValueError(f"its column {column!r} (attr.history) is not a list of pairs of question and answer")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    prompt = "\n".join(filter(None, (text("prompt", required=True), text("query", required=False))))
    messages += [Message("user", prompt), Message("assistant", text("response", required=True))]
    for place, message in enumerate(messages):
        _checked(message.text, place)
    return messages


def _with_tags(messages: list[Message], listed: Mapping[str, Sequence[Any]]) -> list[Message]:
    """The messages of a pair, with a tag for each image and video in front of the prompt if its texts have none."""
    tags = "".join(tag * len(listed[kind]) for kind, tag in _TAGS.items())
    if not tags or media_tags(messages):
        return messages
    place = next(place for place, message in enumerate(messages) if message.role == "user")
    first = messages[place]
    return [*messages[:place], first._replace(text=f"{tags}{first.text}"), *messages[place + 1 :]]


def _tools(row: Mapping[str, Any], form: RecordFormat) -> list[Any]:
    """Descriptions of the tools that the model may call, from a list of objects or its JSON text."""
    tools, column = _column(row, form, "tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its column {column!r} (attr.tools) is not valid JSON: {reason(error)}") from error
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"its column {column!r} (attr.tools) is not a list of objects that describe tools")
    return tools


def _images(row: Mapping[str, Any], form: RecordFormat) -> list[Any]:
    images, column = _column(row, form, "images")
    if isinstance(images, str | bytes | dict):
        images = [images] if images else []
    images = [] if images is None else images
    where = f"its column {column!r} (attr.images)"
    if not isinstance(images, list):
        raise ValueError(f"{where} is not a list of images")
    return [_image(image, where) for image in images]


def _image(image: Any, where: str) -> Any:
    if not isinstance(image, str | bytes | dict):
        raise ValueError(f"{where} is not a list of images: one is {kind_of(image)}; write paths (docs/media.md)")
    return image


def _remedy(media: Any) -> str:
    """What to do about the content of a video, which files of the Hugging Face hub may hold."""
    held = isinstance(media, bytes) or (isinstance(media, dict) and "bytes" in media)
    return "; it holds video data: write each into a file of its own and its path into the column" if held else ""


def _videos(row: Mapping[str, Any], form: RecordFormat) -> list[Video]:
    videos, column = _column(row, form, "videos")
    where = f"its column {column!r} (attr.videos)"
    if isinstance(videos, str):
        videos = [videos] if videos else []
    videos = [] if videos is None else videos
    if not isinstance(videos, list):
        raise ValueError(f"{where} is not a list of paths or of lists of frame paths{_remedy(videos)}")
    return [_video(video, where) for video in videos]


def _video(video: Any, where: str) -> Video:
    if isinstance(video, str):
        return Video(path=video, frames=None)
    if isinstance(video, list) and video and all(isinstance(path, str) for path in video):
        return Video(path=None, frames=video)
    raise ValueError(f"{where} is not a list of paths or of lists of frame paths{_remedy(video)}")
