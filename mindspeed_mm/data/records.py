"""Records: rows of a data file become checked conversations with the paths of their images and videos.

``RecordReader`` is the only place that parses and checks a row: preflight, data set building and streaming all use it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import unquote

from mindspeed_mm.data.record_files import RecordError, RecordFile, read_rows, record_name, struct_columns
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, kind_of, reason, shorten, unique_keys
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, VIDEO_TAG, Message, Role, media_tags
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import Attributes, DataConfig

_STREAMED_ROWS_CHECKED = 1000
_ROLE_FIELDS: tuple[tuple[str, Role], ...] = (  # of attr, with their roles of the template
    ("user_tag", "user"), ("assistant_tag", "assistant"), ("observation_tag", "tool"), ("function_tag", "assistant"),
    ("system_tag", "system"),
)
# Keys by which other formats change what is trained on, with the values that change nothing.
_CHANGES_TARGET: dict[str, tuple[Any, ...]] = {
    "loss": (True, 1), "weight": (1,), "train": (True, 1), "tool_calls": (), "function_call": (),
    "reasoning_content": (), "reasoning": (), "objects": (),
}
_SWITCHES = ("loss", "weight", "train")  # those of them that select what is trained on
_NOT_EMPTY = ("tools", "system")  # columns that need their name in attr
_NO_PARTS = (
    "; write its text as one string, with <image> or <video> in place of each image or video, and their paths in the "
    "columns attr.images and attr.videos"
)
_NO_BYTES = (
    "; it holds image or video data: write each into a file of its own and its path into the column (or an image as a "
    "data URI: data:image/png;base64,...)"
)


class Video(TypedDict):
    """A video: a file, or the image files that are its frames; the other value is None. A struct in Arrow tables."""

    path: str | None
    frames: list[str] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation of a data file. Each field but ``messages`` is a column of the table of records.

    Attributes:
        messages: the conversation.
        images: paths of its images, in the order of their tags.
        videos: its videos, in the order of their tags.
        file: number of its data file.
        record: its index in that file.
    """

    messages: list[Message]
    images: list[str]
    videos: list[Video]
    file: int = -1
    record: int = -1

    def columns(self) -> dict[str, Any]:
        """The record as a row of a table: strings, lists and numbers only."""
        return {
            "roles": [message.role for message in self.messages],
            "texts": [message.text for message in self.messages],
            "images": self.images,
            "videos": self.videos,
            "file": self.file,
            "record": self.record,
        }


def require_records(path: str, count: int) -> None:
    """Check that a data file has records: among others it would be missed by nobody.

    Raises:
        UserError: naming the file.
    """
    if not count:
        raise UserError(f"dataset {path} has no records; create it again (step 3 of the guide), or leave it out")


class SkippedRecords:
    """Counts the records that cannot be used and stops when there are more than the data file allows.

    Attributes:
        messages: file, record and reason of each.
    """

    def __init__(self, config: DataConfig) -> None:
        self.messages: list[str] = []
        self._limit = config.dataloader_param.bad_sample_limit

    def check(self, *, usable: int | None = None) -> None:
        """Stop if there are too many, or if ``usable``, the number of the others, is 0.

        Raises:
            UserError: with the first record's message and the number of the rest.
        """
        if len(self.messages) <= self._limit:
            if usable == 0:
                raise UserError(f"none of {len(self.messages)} records can be used; the first: {self.messages[0]}")
            return
        more = f" (and {len(self.messages) - 1} more such records)" if len(self.messages) > 1 else ""
        limit = f"; dataloader_param.max_bad_samples allows {self._limit}" if self._limit else ""
        raise UserError(f"{self.messages[0]}{more}{limit}")


@dataclasses.dataclass
class Finding:
    """Messages that are used as they are, though the user may not have meant them.

    Attributes:
        what: the messages' name in the singular, and what is said of them.
        messages: their number.
        records: number of records that have some.
        first: where the first is.
    """

    what: tuple[str, str]
    messages: int = 0
    records: int = 0
    first: str = ""

    def add(self, messages: int, place: str) -> None:
        """Count the messages of one record."""
        self.first = self.first or place
        self.messages += messages
        self.records += 1

    def __str__(self) -> str:
        counts = (f"{count} {name}{'s' * (count > 1)}" for count, name in
                  ((self.messages, self.what[0]), (self.records, "record")))
        return f"{' of '.join(counts)} {self.what[1]}; the first: {self.first}"


class RecordReader:
    """Reads and checks the records of some data files.

    Attributes:
        skipped: the records of ``read`` that cannot be used.
        unread: how many records have each column or key that is not read; a message's begin with ``messages.``.
        empty_answers: answers without any text.
        control_tokens: messages in which a control token of the chat format is written out.
    """

    def __init__(self, config: DataConfig, spec: ModelSpec, files: Sequence[str], *, limit: int | None) -> None:
        """Prepare to read.

        Args:
            config: the data file; names columns, roles and the directory of images and videos.
            spec: the model family; formats tool calls.
            files: paths, in order.
            limit: most records to use of each file, from the first; None for all.
        """
        self.skipped = SkippedRecords(config)
        self.unread: Counter[str] = Counter()
        self.empty_answers = Finding(("answer", "without text, which teach at most the end of a turn"))
        self.control_tokens = Finding(
            ("message", "in which control tokens of the chat format are written out, encoded as plain text")
        )
        self._find_control_token = spec.control_token_finder()
        self._files = files
        self._limit = limit
        self._attr = config.dataset_param.attr
        self._spec = spec
        self._finder = MediaFinder(config.dataset_param.basic_parameters.dataset_dir)
        self._columns = frozenset(
            name for name in (self._attr.messages, self._attr.images, self._attr.videos, self._attr.system,
                              self._attr.tools) if name
        )
        self._keys = frozenset((self._attr.role_tag, self._attr.content_tag))
        self._never_seen = set(self._columns)

    @property
    def unread_note(self) -> str:
        """What ``unread`` holds, as a sentence; empty if there is nothing."""
        found = ", ".join(f"{shorten(name, 40)} ({count})" for name, count in self.unread.most_common(10))
        more = f" and {len(self.unread) - 10} more" if len(self.unread) > 10 else ""
        return f"columns and keys that are not read, with the number of records: {found}{more}" if found else ""

    @property
    def notes(self) -> dict[str, str]:
        """What the log has to say about the records that were read, by kind."""
        notes = {"unread": self.unread_note}
        named = {field: getattr(self._attr, field) for field in ("system", "tools", "images", "videos")}
        if absent := [f"{name!r} (attr.{field})" for field, name in named.items()
                      if name in self._never_seen and field in self._attr.model_fields_set]:
            notes["absent"] = f"no record has the column {', '.join(absent)}"
        notes |= {f.what[0]: str(f) for f in (self.empty_answers, self.control_tokens) if f.messages}
        return {kind: note for kind, note in notes.items() if note}

    def read(self, *, sample: bool = False) -> Iterator[Record]:
        """All usable records; the rest is counted in ``skipped``, which the caller checks at the end.

        Args:
            sample: read the first rows of each file only: a file that is streamed may be too large to read at once.

        Raises:
            UserError: if a file is missing or no list of records.
        """
        for path in self._files:
            if self._attr.tools in struct_columns(path):
                raise UserError(
                    f"{path}: its column {self._attr.tools!r} (attr.tools) holds objects; in Parquet these have each "
                    "other's keys: store the tools of a record as one JSON text"
                )
        for file in range(len(self._files)):
            yield from self._read_file(file, sample)

    def _read_file(self, file: int, sample: bool) -> Iterator[Record]:
        if sample:
            limit = min(self._limit or _STREAMED_ROWS_CHECKED, _STREAMED_ROWS_CHECKED)
            rows: Any = RecordFile(self._files[file], limit=limit)
        else:
            rows = read_rows(self._files[file], limit=self._limit)
        require_records(self._files[file], len(rows))
        for index in range(len(rows)):
            try:
                record = self.check(rows[index], file, index)
            except RecordError as error:
                self.skipped.messages.append(str(error))
            else:
                yield record

    def check(self, row: Any, file: int, index: int) -> Record:
        """Parse a row and find its images and videos.

        Args:
            row: as the file has it.
            file: number of the file.
            index: in that file.

        Raises:
            RecordError: saying what is wrong with the row, and the remedy.
            UserError: if there is a video file and nothing that reads it.
        """
        try:
            record = parse_record(row, self._attr, self._spec)
            images, videos = _found_media(record, self._finder) if record.images or record.videos else ([], [])
        except UserError:
            raise
        except ValueError as error:
            raise RecordError(f"{record_name(self._files[file], index)}: {error}") from error
        except Exception as error:  # nesting too deep for a parser, values that JSON does not have
            raise RecordError(f"{record_name(self._files[file], index)}: {reason(error)}") from error
        self._count_unread(row)
        record = Record(record.messages, images, videos, file, index)
        self._examine(record)
        return record

    def _examine(self, record: Record) -> None:
        find = self._find_control_token
        empty = sum(1 for role, text in record.messages if role == "assistant" and (not text or text.isspace()))
        tokens: list[str] = []
        if find is not None and find("".join([text for _, text in record.messages])):
            tokens = [token for _, text in record.messages if (token := find(text))]
        if empty or tokens:
            name = record_name(self._files[record.file], record.record)
            if empty:
                self.empty_answers.add(empty, name)
            if tokens:
                self.control_tokens.add(len(tokens), f"{tokens[0]} in {name}")

    def _count_unread(self, row: Mapping[str, Any]) -> None:
        if self._never_seen:
            self._never_seen -= row.keys()
        if not row.keys() <= self._columns:
            self.unread.update(name for name in row.keys() - self._columns if row[name] is not None)
        turns = row[self._attr.messages]
        if sum(map(len, turns)) > 2 * len(turns):  # each has the two keys that are read
            keys = {key for turn in turns for key in turn.keys() - self._keys if turn[key] is not None}
            self.unread.update(f"{self._attr.messages}.{key}" for key in keys)


def _refuse_unread(row: Mapping[str, Any], attr: Attributes) -> None:
    """Refuse columns and keys that would change what is trained on, and that are not read.

    Raises:
        ValueError: naming the key and its value.
    """
    read = (attr.messages, attr.images, attr.videos, attr.system, attr.tools)
    for name in _NOT_EMPTY:
        if name not in read and row.get(name):
            raise ValueError(f"its column {name!r} has content and is not read; name it in attr.{name}, or remove it")
    places = [("column", "", row, read)]
    places += [("key", f" of message {place}", turn, (attr.role_tag, attr.content_tag))
               for place, turn in enumerate(row[attr.messages]) if isinstance(turn, dict) and len(turn) > 2]
    for what, where, holder, known in places:
        for name in _CHANGES_TARGET.keys() & holder.keys():
            value = holder[name]
            if name not in known and value not in (None, "", [], {}, *_CHANGES_TARGET[name]):
                remedy = "write it into the message's text, or remove it"
                if name in _SWITCHES:
                    remedy = "remove it: all answers are trained on (basic_parameters.mask_history: the last alone)"
                raise ValueError(
                    f"its {what} {name!r}{where} is {shorten(value, 60)}, which would change what is trained on and is "
                    f"not read; {remedy}"
                )


def parse_record(row: Any, attr: Attributes, spec: ModelSpec) -> Record:
    """One row as messages, images and videos, with paths as written.

    Raises:
        ValueError: saying what is wrong with the row; the caller knows the file and the index.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is {kind_of(row)}, not an object with columns")
    turns = row.get(attr.messages)
    if not isinstance(turns, list):
        what = f"is {kind_of(turns)}, not a list" if attr.messages in row else "is missing"
        names = ", ".join(map(str, row))
        raise ValueError(f"its column {attr.messages!r} (attr.messages) {what}; it has: {names}; set attr to its "
                         "columns and keys (docs/data.md)")
    _refuse_unread(row, attr)
    roles = _roles(attr.user_tag, attr.assistant_tag, attr.observation_tag, attr.function_tag, attr.system_tag)
    messages = [_message(turn, place, attr, roles, spec) for place, turn in enumerate(turns)]
    system = row.get(attr.system) if attr.system else None
    if system:
        if not isinstance(system, str):
            raise ValueError(f"its column {attr.system!r} (attr.system) is {kind_of(system)}, not a string")
        if messages and messages[0].role == "system":
            raise ValueError(f"it has a system message and a column {attr.system!r} (attr.system); remove one of them")
        messages.insert(0, Message("system", system))
    if tools := _tools(row, attr):
        first = messages.pop(0).text if messages and messages[0].role == "system" else None
        messages.insert(0, Message("system", spec.tools_text(tools, first)))
    complaint = check_order(messages)
    if complaint:
        raise ValueError(complaint)
    images, videos = _images(row, attr), _videos(row, attr)
    tags = media_tags(messages)
    if not (tags or images or videos):
        return Record(messages, images, videos)
    # the tags are plain text for a model that takes text only
    kinds = ((IMAGE_TAG, attr.images, "images", images), (VIDEO_TAG, attr.videos, "videos", videos))
    for tag, column, name, media in kinds:
        if media and name.removesuffix("s") not in spec.media_kinds:
            raise ValueError(f"it has {name}, which this model does not take; use other records or another model")
        if spec.media_kinds and tags.count(tag) != len(media):
            found = f"it has {tags.count(tag)} {tag} tags in its questions, but "
            if column is None:
                raise ValueError(f"{found}attr.{name} is null; set it to the column of their paths, or remove the tags")
            if column not in row:
                raise ValueError(f"{found}no column {column!r} (attr.{name}); it has: {', '.join(map(str, row))}; set "
                                 f"attr.{name} to the column of their paths, or remove the tags")
            raise ValueError(f"{found}{len(media)} {name} in its column {column!r}; write one tag for each")
    return Record(messages, images, videos)


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


@functools.cache
def _roles(*names: str | None) -> Mapping[str, tuple[str, Role]]:
    """Role name in the data file -> attr field, role of the template; ``names``: what ``attr`` has in these fields."""
    return {name: field for name, field in zip(names, _ROLE_FIELDS, strict=True) if name}


def _message(
    turn: Any, place: int, attr: Attributes, roles: Mapping[str, tuple[str, Role]], spec: ModelSpec
) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {place} is {kind_of(turn)}, not an object")
    speaker, text = turn.get(attr.role_tag), turn.get(attr.content_tag)
    if not isinstance(speaker, str) or not isinstance(text, str):
        name = attr.content_tag if isinstance(speaker, str) else attr.role_tag
        what = f"is {kind_of(turn[name])}, not a string" if name in turn else "is missing"
        remedy = _NO_PARTS if name == attr.content_tag and isinstance(text, list) else ""
        if name not in turn:
            field = "content_tag" if name == attr.content_tag else "role_tag"
            remedy = f"; it has: {shorten(', '.join(map(str, turn)))}; set attr.{field} to its key (docs/data.md)"
        raise ValueError(f"{name!r} of message {place} {what}{remedy}")
    if speaker not in roles:
        raise ValueError(
            f"message {place} has the role {shorten(speaker, 40)!r}; attr names the roles "
            f"{', '.join(roles)}: {_missing_role(speaker)}"
        )
    field, role = roles[speaker]
    if not _is_text(text):
        raise ValueError(f"message {place} holds half of a character (a cut emoji); write it again")
    if field == "function_tag":
        try:
            text = spec.tool_call_text(text)
        except ValueError as error:
            raise ValueError(f"message {place} is not a tool call: {error}") from error
    return Message(role, text)


def _is_text(text: str) -> bool:
    """Whether ``text`` can be stored: JSON can hold halves of UTF-16 pairs, UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing_role(role: str) -> str:
    fields = {"system": "system_tag", "tool": "observation_tag", "observation": "observation_tag",
              "function_call": "function_tag", "function": "function_tag"}
    return f"set attr.{fields[role]} to {role!r}" if role in fields else "correct the role, or attr's names"


def _tools(row: Mapping[str, Any], attr: Attributes) -> list[Any]:
    """Descriptions of the tools that the model may call, from a list of objects or its JSON text."""
    tools = row.get(attr.tools) if attr.tools else None
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its column {attr.tools!r} (attr.tools) is not valid JSON: {reason(error)}") from error
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"its column {attr.tools!r} (attr.tools) is not a list of objects that describe tools")
    return tools


def _images(row: Mapping[str, Any], attr: Attributes) -> list[str]:
    images = row.get(attr.images) if attr.images else None
    images = [images] if isinstance(images, str) else images or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        remedy = _NO_BYTES if _is_data(images) else ""
        raise ValueError(f"its column {attr.images!r} (attr.images) is not a list of paths{remedy}")
    return images


def _is_data(media: Any) -> bool:
    """Whether a column holds the content of files, as Parquet files of the Hugging Face hub do."""
    first = media[0] if isinstance(media, list) and media else media
    return isinstance(first, bytes) or (isinstance(first, dict) and "bytes" in first)


def _videos(row: Mapping[str, Any], attr: Attributes) -> list[Video]:
    videos = row.get(attr.videos) if attr.videos else None
    videos = [videos] if isinstance(videos, str) else videos or []
    if not isinstance(videos, list) or not all(
        isinstance(video, str) or (isinstance(video, list) and video and all(isinstance(path, str) for path in video))
        for video in videos
    ):
        remedy = _NO_BYTES if _is_data(videos) else ""
        raise ValueError(
            f"its column {attr.videos!r} (attr.videos) is not a list of paths or of lists of frame paths{remedy}"
        )
    return [
        Video(path=video, frames=None) if isinstance(video, str) else Video(path=None, frames=video)
        for video in videos
    ]


def require_video_reader() -> None:
    """Check that video files can be read.

    Raises:
        UserError: if PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("the data has videos, and PyAV, which reads them, is not installed: pip install av")


def _found_media(record: Record, finder: MediaFinder) -> tuple[list[str], list[Video]]:
    """A record's images and videos with their paths resolved.

    Raises:
        ValueError: naming the first file that does not exist.
        UserError: if there is a video file and nothing that reads it.
    """

    def found(path: str, kind: str) -> str:
        if not path:
            raise ValueError(f"the path of {'an' if kind == 'image' else 'a'} {kind} is empty; write it, or remove it")
        if path.startswith("data:") and kind != "video":
            return path
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        if "://" in path[:16]:
            raise ValueError(f"{kind} {shorten(path)} is a URL, and nothing is fetched from a network; download it, "
                             "and write its path")
        place = finder.find(path) if _is_text(path) and "\0" not in path else None
        if place is None and (directory := finder.find_directory(path)):
            raise ValueError(f"{kind} {shorten(directory)} is a directory; write the path of a file")
        if place is None:
            places = " and ".join(map(shorten, finder.places(path)))
            raise ValueError(
                f"{kind} {shorten(path)} does not exist (looked for {places}); put it there, correct the path or "
                'basic_parameters.dataset_dir, or set dataloader_param.on_bad_sample to "skip"'
            )
        return place

    images = [found(path, "image") for path in record.images]
    videos = []
    for video in record.videos:
        if video["path"] is not None:
            require_video_reader()
            videos.append(Video(path=found(video["path"], "video"), frames=None))
        else:
            videos.append(Video(path=None, frames=[found(path, "video frame") for path in video["frames"] or ()]))
    return images, videos


class MediaFinder:
    """Finds image and video files.

    Absolute paths are taken as they are; a relative one starts from ``dataset_dir``, or, if there is no such file, from
    the working directory. So a path that already contains ``dataset_dir`` is not joined to it a second time.

    Each directory is listed once and cached, because 80,000 stat calls take minutes on shared storage.
    """

    def __init__(self, dataset_dir: str | Path) -> None:
        self._root = str(dataset_dir)
        self._names: dict[str, frozenset[str]] = {}

    def find(self, path: str) -> str | None:
        """Path of the file, or None if there is no such file."""
        return next((place for place in self.places(path) if self._exists(place)), None)

    def find_directory(self, path: str) -> str | None:
        """Path of a directory of this name, or None."""
        return next((place for place in self.places(path) if is_directory(place)), None)

    def places(self, path: str) -> list[str]:
        """Where a path may lead, in order."""
        return [path] if os.path.isabs(path) else [os.path.join(self._root, path), path]

    def _exists(self, path: str) -> bool:
        directory, name = os.path.split(path)
        names = self._names.get(directory)
        if names is None:
            names = self._names[directory] = _list(directory or ".")
        return name in names


def _list(directory: str) -> frozenset[str]:
    """Names of the files in a directory; none if it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if not _is_directory(entry))
    except OSError:
        return frozenset()


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: opening it says so
        return False
