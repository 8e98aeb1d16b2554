"""Reading data files: records of named columns become messages and picture paths, by the ``attr`` of the data file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, VIDEO_TAG, Message, Role, media_tags
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import Attributes


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation as it stands in a data file: messages, and the paths of pictures and videos as written.

    A video is a path, or the list of its frames' paths.
    """

    messages: list[Message]
    images: list[str]
    videos: list[str | list[str]] = dataclasses.field(default_factory=list)


def read_rows(path: str | Path, *, limit: int | None = None) -> list[Any]:
    """The rows of a JSON list, a JSON-lines file (``.jsonl``) or a Parquet file (``.parquet``).

    Args:
        path: the file.
        limit: keep the first so many.

    Raises:
        UserError: if the file is missing or holds no list of records.
    """
    path = Path(path)
    require_file(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        rows: Any = []
        for number, line in enumerate(content.splitlines(), start=1):
            if limit is not None and len(rows) >= limit:
                break
            if line.strip():
                rows.append(parse_json(line, f"{path}, line {number}"))
        return rows
    rows = parse_json(content, str(path))
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds {_kind(rows)}, not a list of records; make it anew (step 3 of the guide) or name another "
            "file"
        )
    return rows[:limit]


def require_file(path: Path) -> None:
    """See that a data file is there.

    Raises:
        UserError: naming it and how it is made.
    """
    if not path.is_file():
        raise UserError(
            f"dataset {path} does not exist; make it (step 3 of the guide: "
            "python examples/qwen2vl/llava_instruct_2_mllm_demo_format.py) or correct basic_parameters.dataset"
        )


def parse_json(content: bytes, source: str) -> Any:
    """The value of a JSON text; ``source`` names it in messages.

    Raises:
        UserError: if it is not valid.
    """
    try:
        import orjson
    except ImportError:  # three times slower, same result
        parse: Any = json.loads
    else:
        parse = orjson.loads
    try:
        return parse(content)
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON ({error}); make it anew (step 3 of the guide)") from error


def _read_parquet(path: Path, limit: int | None) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return table.slice(0, limit).to_pylist()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def parse_record(row: Any, attr: Attributes, spec: ModelSpec) -> Record:
    """One row as messages, images and videos.

    Raises:
        ValueError: saying what is wrong with the row; the caller knows the file and the index.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is {_kind(row)}, not an object with columns")
    turns = row.get(attr.messages)
    if not isinstance(turns, list):
        what = f"is {_kind(turns)}, not a list" if attr.messages in row else "is missing"
        raise ValueError(f"its column {attr.messages!r} (attr.messages) {what}; it has: {', '.join(map(str, row))}")
    roles = _roles(attr)
    messages = [_message(turn, place, attr, roles, spec) for place, turn in enumerate(turns)]
    system = row.get(attr.system) if attr.system else None
    if system:
        if not isinstance(system, str):
            raise ValueError(f"its column {attr.system!r} (attr.system) is {_kind(system)}, not a string")
        messages.insert(0, Message("system", system))
    if tools := _tools(row, attr):
        first = messages.pop(0).text if messages and messages[0].role == "system" else None
        messages.insert(0, Message("system", spec.tools_text(tools, first)))
    complaint = check_order(messages)
    if complaint:
        raise ValueError(complaint)
    images, videos = _image_paths(row, attr), _video_paths(row, attr)
    tags = media_tags(messages)
    kinds = ((IMAGE_TAG, attr.images, "images", images), (VIDEO_TAG, attr.videos, "videos", videos))
    for tag, column, name, media in kinds:
        if tags.count(tag) != len(media):
            where = f"its column {column!r}" if column in row else f"no column {column!r} (attr.{name})"
            raise ValueError(f"it has {tags.count(tag)} {tag} tags in its questions, but {len(media)} {name}; {where}")
        if media and name.removesuffix("s") not in spec.media_kinds:
            raise ValueError(f"it has {name}, which this model does not take; use other records or another model")
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
        return f"the conversation starts with the role {turns[0].role}, not with a question"
    for place, (before, after) in enumerate(pairwise(turns), start=first):
        if after.role == "system":
            return "a system message comes after the first message"
        if (before.role == "assistant") == (after.role == "assistant") and {before.role, after.role} != {"tool"}:
            return f"messages {place} ({before.role}) and {place + 1} ({after.role}) do not take turns"
    if turns[-1].role != "assistant":
        return "the last message is no answer"
    return None


def _roles(attr: Attributes) -> Mapping[str, tuple[str, Role]]:
    """Role name in the data file -> attr field, role of the template."""
    fields: list[tuple[str, Role]] = [
        ("user_tag", "user"), ("assistant_tag", "assistant"), ("observation_tag", "tool"),
        ("function_tag", "assistant"), ("system_tag", "system"),
    ]
    return {getattr(attr, name): (name, role) for name, role in fields if getattr(attr, name)}


def _message(
    turn: Any, place: int, attr: Attributes, roles: Mapping[str, tuple[str, Role]], spec: ModelSpec
) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {place} is {_kind(turn)}, not an object")
    for name in (attr.role_tag, attr.content_tag):
        if not isinstance(turn.get(name), str):
            what = f"is {_kind(turn[name])}, not a string" if name in turn else "is missing"
            raise ValueError(f"{name!r} of message {place} {what}")
    if turn[attr.role_tag] not in roles:
        raise ValueError(
            f"message {place} has the role {turn[attr.role_tag]!r}; attr names the roles {', '.join(roles)}"
        )
    field, role = roles[turn[attr.role_tag]]
    text = turn[attr.content_tag]
    if field == "function_tag":
        try:
            text = spec.tool_call_text(text)
        except ValueError as error:
            raise ValueError(f"message {place} is no tool call: {error}") from error
    return Message(role, text)


def _tools(row: Mapping[str, Any], attr: Attributes) -> list[Any]:
    """Descriptions of the tools that the model may call: a list of objects, or its JSON text."""
    tools = row.get(attr.tools) if attr.tools else None
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"its column {attr.tools!r} (attr.tools) is not valid JSON: {error}") from error
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"its column {attr.tools!r} (attr.tools) is no list of objects that describe tools")
    return tools


def _image_paths(row: Mapping[str, Any], attr: Attributes) -> list[str]:
    images = row.get(attr.images) if attr.images else None
    images = [images] if isinstance(images, str) else images or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"its column {attr.images!r} (attr.images) is no list of paths")
    return images


def _video_paths(row: Mapping[str, Any], attr: Attributes) -> list[str | list[str]]:
    videos = row.get(attr.videos) if attr.videos else None
    videos = [videos] if isinstance(videos, str) else videos or []
    if not isinstance(videos, list) or not all(
        isinstance(video, str) or (isinstance(video, list) and video and all(isinstance(path, str) for path in video))
        for video in videos
    ):
        raise ValueError(f"its column {attr.videos!r} (attr.videos) is no list of paths, or of lists of frames' paths")
    return videos


def video_entry(video: str | list[str]) -> str:
    """How a video is named among a row's media, where an image is its path."""
    return VIDEO_TAG + json.dumps(video)


def as_video(entry: str) -> str | list[str] | None:
    """The video that an entry names, or None for an image."""
    return json.loads(entry.removeprefix(VIDEO_TAG)) if entry.startswith(VIDEO_TAG) else None


def require_video_reader() -> None:
    """See that video files can be read.

    Raises:
        UserError: if PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise UserError("the data has videos, and PyAV, which reads them, is not installed: pip install av")


def resolve_media(record: Record, finder: MediaFinder) -> list[str]:
    """Entries of a record's images and videos in the order of their tags, paths resolved.

    Raises:
        ValueError: naming the first file that does not exist.
        UserError: if there is a video file and nothing that reads it.
    """

    def found(path: str, kind: str) -> str:
        place = finder.find(path)
        if place is None:
            raise ValueError(f"{kind} {path} does not exist")
        return place

    images, videos = iter(record.images), iter(record.videos)
    entries = []
    for tag in media_tags(record.messages):
        if tag == IMAGE_TAG:
            entries.append(found(next(images), "image"))
            continue
        video = next(videos)
        if isinstance(video, str):
            require_video_reader()
            entries.append(video_entry(found(video, "video")))
        else:
            entries.append(video_entry([found(path, "video frame") for path in video]))
    return entries


class MediaFinder:
    """Finds pictures and videos.

    Absolute paths are taken as they are; a relative one starts from ``dataset_dir``, or, if there is no such file, from
    the working directory. So a path that already contains ``dataset_dir`` is not joined to it a second time.

    Directories are listed once and kept, because asking for 80,000 files one by one takes minutes on shared storage.
    """

    def __init__(self, dataset_dir: str | Path) -> None:
        self._root = str(dataset_dir)
        self._names: dict[str, frozenset[str]] = {}

    def find(self, path: str) -> str | None:
        """Where the picture is, or None if there is no such file."""
        candidates = [path] if os.path.isabs(path) else [os.path.join(self._root, path), path]
        return next((candidate for candidate in candidates if self._exists(candidate)), None)

    def _exists(self, path: str) -> bool:
        directory, name = os.path.split(path)
        names = self._names.get(directory)
        if names is None:
            try:
                with os.scandir(directory or ".") as entries:
                    names = frozenset(entry.name for entry in entries if not entry.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                names = frozenset()
            self._names[directory] = names
        return name in names
