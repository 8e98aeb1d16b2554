"""Formats of data files: which columns and keys hold a conversation, recognised by a file's first records.

A format is a set of names; what a message may hold (parts, tool calls, thoughts, a switch for the loss) is the same in
all of them, see ``mindspeed_mm.data.parsing``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mindspeed_mm.interfaces.conversation import Role

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import Attributes

OBJECTS = "objects"  # column with boxes and points
CHANNEL = "channel"  # column by which evaluations are reported
RoleField = Literal["user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"]
_ROLE_OF: Mapping[RoleField, Role] = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "assistant",
    "system_tag": "system",
}
# Names of the roles in files whose ``attr`` names none.
_ROLES: Mapping[RoleField, tuple[str, ...]] = {
    "user_tag": ("user",), "assistant_tag": ("assistant",), "observation_tag": ("tool", "tool_response", "observation"),
    "function_tag": ("tool_call", "function_call"), "system_tag": ("system", "developer"),
}
_SHAREGPT_ROLES: Mapping[RoleField, tuple[str, ...]] = {
    **_ROLES, "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"),
}
_COLUMNS = {
    "system": ("system",), "tools": ("tools",), "images": ("images", "image"), "videos": ("videos", "video"),
}
_ALPACA = {"prompt": ("instruction",), "query": ("input",), "response": ("output",), "history": ("history",)}
# Of question and answer, by what is most specific.
_PAIRS = (
    ("question", "answer"), ("query", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("problem", "solution"), ("instruction", "response"), ("input", "output"),
)
_CONVERSATIONS = ("messages", "conversations", "conversation")
_KEYS = (("role", "content"), ("from", "value"))
_OPENAI_KEYS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content")


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """Names of a file's columns and keys.

    Attributes:
        name: of the format, as in ``attr.formatting``.
        messages: column with the conversation; None if a record is a prompt and its response.
        role_tag: key of a message's role.
        content_tag: key of a message's text.
        roles: name of a role in the file -> the field of ``attr`` for it, and the role.
        columns: field of ``attr`` -> candidate columns; a record may use one of them.
        recognised: whether the file's first records decided.
        others: columns of other formats; a record that has one as well is ambiguous and refused.
        columnar: whether objects are stored as structs of one type, as in Parquet, so that missing keys are null.
    """

    name: str
    messages: str | None
    role_tag: str
    content_tag: str
    roles: Mapping[str, tuple[RoleField, Role]]
    columns: Mapping[str, tuple[str, ...]]
    recognised: bool = False
    others: frozenset[str] = frozenset()
    columnar: bool = False

    @property
    def read_columns(self) -> frozenset[str]:
        """All columns that are read."""
        named = {column for columns in self.columns.values() for column in columns}
        return frozenset({OBJECTS, CHANNEL} | named | ({self.messages} if self.messages else set()))

    def __str__(self) -> str:
        if self.messages is None:
            names = ", ".join("/".join(self.columns[part]) for part in ("prompt", "query", "response") if
                              part in self.columns)
            return f"{self.name} (columns {names})"
        return f"{self.name} (column {self.messages}, keys {self.role_tag} and {self.content_tag})"


def format_of(
    attr: Attributes, name: str | None = None, rows: Sequence[Any] = (), *, recognised: bool = False
) -> RecordFormat:
    """The format described by ``attr``, or the named format with the overrides in ``attr``.

    Args:
        attr: of the data file.
        name: of the format; None: ``attr`` alone.
        rows: the file's first records, for names that differ between files of one format.
        recognised: whether the format was detected from the records; then only fields of ``attr`` that differ from
            their defaults override it, because the recipe's data file spells the defaults out. A column that it names
            and the records have is still the only one that is read.
    """
    given = set(type(attr).model_fields) if name is None else set(attr.model_fields_set)
    if recognised:
        present = {column for row in rows for column in row}
        spelled_out = {field for field in (*_COLUMNS, "messages")
                       if field in attr.model_fields_set and getattr(attr, field) in present}
        given = set(attr.changed) | spelled_out
    roles: Mapping[RoleField, tuple[str, ...]] = _ROLES
    columns: dict[str, tuple[str, ...]] = dict(_COLUMNS)
    messages: str | None = "messages"
    keys = _KEYS[0]
    if name in ("sharegpt", "llava"):
        messages, roles, keys = "conversations", _SHAREGPT_ROLES, _KEYS[1]
    if name in ("alpaca", "qa"):
        messages = None
        pair = next((pair for pair in _PAIRS if any(_has(row, *pair) for row in rows)), _PAIRS[0])
        qa = {"prompt": pair[:1], "response": pair[1:], "history": ("history",)}
        if pair[0] == "instruction":  # of Dolly
            qa["query"] = ("context",)
        columns |= _ALPACA if name == "alpaca" else qa
    elif found := next(filter(None, (_conversation(row) for row in rows)), None):
        messages, keys = found
    for field in _COLUMNS:
        if field in given:
            columns[field] = (getattr(attr, field),) if getattr(attr, field) else ()
    if messages is None:
        columns |= {field: (getattr(attr, field),) for field in _ALPACA if field in given and getattr(attr, field)}
        others = {column for pair in _PAIRS for column in pair} if not given & {"prompt", "response"} else set()
    else:
        others = set(_CONVERSATIONS) if "messages" not in given else set()
        messages = attr.messages if "messages" in given else messages
    named = {field: (getattr(attr, field),) if field in given else roles[field] for field in _ROLE_OF}
    found_columns = {column for names in columns.values() for column in names} | {messages}
    return RecordFormat(
        name=name or "messages",
        recognised=recognised,
        others=frozenset(others - found_columns),
        messages=messages,
        role_tag=attr.role_tag if "role_tag" in given else keys[0],
        content_tag=attr.content_tag if "content_tag" in given else keys[1],
        roles={role: (field, _ROLE_OF[field]) for field, names in named.items() for role in names if role},
        columns={field: names for field, names in columns.items() if names},
    )


def recognise(attr: Attributes, rows: Sequence[Any]) -> RecordFormat:
    """Select the format of a file.

    In order of precedence: ``attr.formatting``; ``attr``, if it has other names than the default ones and the records
    have its ``messages`` column; detection from the records.

    Args:
        attr: of the data file.
        rows: the file's first records; some of them may be damaged.
    """
    rows = [row for row in rows if isinstance(row, dict)]
    name = attr.formatting or ("qa" if attr.prompt or attr.response else None)
    if name is not None:
        return format_of(attr, name, rows)
    if not attr.is_open and any(attr.messages in row for row in rows):
        return format_of(attr)
    name = _name_of(rows)
    if name is None:
        return format_of(attr)
    return format_of(attr, name, rows, recognised=True)


def _name_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Name of the format that the records have; None if it is none of those known."""
    found = [(row, conversation) for row in rows if (conversation := _conversation(row))]
    if found:
        _, keys = found[0][1]
        if keys == _KEYS[1]:
            return "llava" if any("image" in row or "video" in row for row, _ in found) else "sharegpt"
        turns = [turn for row, (column, _) in found for turn in row[column] if isinstance(turn, dict)]
        if any(isinstance(turn.get(keys[1]), list) or any(turn.get(key) for key in _OPENAI_KEYS) for turn in turns):
            return "openai"
        if any("objects" in row for row, _ in found) or any("loss" in turn for turn in turns):
            return "swift"
        return "messages"
    if any(_has(row, "instruction", "output") for row in rows):
        return "alpaca"
    return "qa" if any(_has(row, *pair) for row in rows for pair in _PAIRS) else None


def _conversation(row: Mapping[str, Any]) -> tuple[str, tuple[str, str]] | None:
    """Column and keys of a record's conversation; None if it has none."""
    for column in _CONVERSATIONS:
        turns = row.get(column)
        first = turns[0] if isinstance(turns, list) and turns else None
        for keys in _KEYS:
            if isinstance(first, dict) and keys[0] in first:
                return column, keys
    return None


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


FORMATS: tuple[str, ...] = ("messages", "openai", "swift", "sharegpt", "llava", "alpaca", "qa")
