"""Reading what comes from outside: files, JSON and YAML texts, and what libraries make of them.

A file is read only if it is a regular one of plausible size, so that a FIFO, a device or a sparse file neither hangs
the program nor fills its memory. Whatever a parser or a library raises becomes one line that names the file. Imports
no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError

MIB = 1 << 20
CONFIG_BYTES = 16 * MIB
"""Largest file of settings: configuration, ``config.json``, processor files, tracker, chat template."""
INDEX_BYTES = 1024 * MIB
"""Largest file with an entry per tensor, token or file: manifest, ``.metadata``, weight index, tokenizer."""
DATA_BYTES = 256 << 30
"""Largest data file."""
MEDIA_BYTES = 512 * MIB
"""Largest image file."""
MAX_DEPTH = 200
"""Deepest nesting of a JSON or YAML file of settings."""
MAX_NODES = 1_000_000
"""Most values in a YAML file, whose aliases repeat parts of it."""
_QUOTED = 200
_OLD_NUMBER = re.compile(r"[:_]|^[-+]?0[0-9]")  # 1:30 (90), 1_000, 010 (8): text or another number in YAML 1.2
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def shorten(value: Any, limit: int = _QUOTED) -> str:
    """``value`` as text for a message: on one line, without control characters, the middle of a long one left out."""
    text = value if isinstance(value, str) else str(value)
    total = len(text)
    if total > limit:
        half = limit // 2
        text = f"{text[:half]}...({total} characters)...{text[-half // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in text)


def shown(value: Any) -> str:
    """A value of a settings file as JSON, shortened for a message."""
    return shorten(json.dumps(value, ensure_ascii=False, default=str), 60)


def reason(error: BaseException) -> str:
    """Why something failed, in a few words; the path that many messages repeat is left out."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return shorten(text) if text else type(error).__name__


@contextlib.contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever is raised inside, by Python or a library, into one line: ``WHAT cannot be read: REASON; REMEDY``.

    Raises:
        UserError: instead of any other Exception; one raised inside passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise almost anything for a damaged file
        raise UserError(f"{what} cannot be read: {reason(error)}{remedy and f'; {remedy}'}") from error


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file. Unlike ``Path.is_file`` False for any path that cannot be looked up.

    That is a path too long, one with a NUL, a loop of links, a directory that may not be entered.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether there is a directory; as :func:`is_file`."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_present(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything of this name, if only a FIFO or a broken link; reading it says what is wrong with it.

    Also True where the directory may not be searched, so that reading says so, and not that the file is missing.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def open_regular(path: str | os.PathLike[str], *, limit: int) -> int:
    """A file descriptor of a regular file of at most ``limit`` bytes, open for reading.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be opened, is not a regular file, or is too large; ``strerror`` says which.
    """
    try:
        # without O_NONBLOCK opening a FIFO waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the path
        raise OSError(22, "its path is not valid", str(path)) from error
    status = os.fstat(descriptor)
    problem = ""
    if stat.S_ISDIR(status.st_mode):
        problem = "it is a directory"
    elif not stat.S_ISREG(status.st_mode):
        problem = "it is not a regular file"
    elif status.st_size > limit:
        problem = f"it has {status.st_size} bytes, more than the {limit} that such a file may have"
    if problem:
        os.close(descriptor)
        raise OSError(22, problem, str(path))
    os.set_blocking(descriptor, True)
    return descriptor


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Bytes of host memory that new allocations can have, at most; None where the system does not say.

    Args:
        meminfo: the system's account of its memory.
        limit: the container's limit, or ``max``.
    """
    found = []
    with contextlib.suppress(OSError):
        lines = meminfo.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        found.append(int(limit.read_text()))
    return min(found, default=None)


def read_bytes(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with os.fdopen(open_regular(path, limit=limit), "rb") as file:
        content = file.read()
    if len(content) > limit:  # it has grown
        raise OSError(27, f"it has more than the {limit} bytes that such a file may have", str(path))
    return content


def read_text(path: str | os.PathLike[str], *, name: str = "", remedy: str = "", limit: int = CONFIG_BYTES) -> str:
    """The content of a UTF-8 file; a byte-order mark is dropped.

    Args:
        path: the file.
        name: what it is, for messages; empty for nothing but the path.
        remedy: for messages, also where the file is missing.
        limit: most bytes.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    what = f"{name} {shorten(os.fspath(path))}".strip()
    with reading(what, remedy):
        try:
            return read_bytes(path, limit=limit).decode("utf-8-sig")
        except FileNotFoundError as error:
            raise UserError(f"{what} does not exist{remedy and f'; {remedy}'}") from error


def read_json(
    path: str | os.PathLike[str], *, name: str = "", remedy: str = "", limit: int = CONFIG_BYTES
) -> dict[str, Any]:
    """The object in a JSON file; arguments and errors as :func:`read_text` and :func:`parse_json`."""
    what = f"{name} {shorten(os.fspath(path))}".strip()
    content = parse_json(read_text(path, name=name, remedy=remedy, limit=limit), what, remedy=remedy)
    if not isinstance(content, dict):
        raise UserError(f"{what} holds {kind_of(content)}; it must hold an object with named fields"
                        f"{remedy and f'; {remedy}'}")
    return content


class DuplicateKey(ValueError):
    """A key that occurs twice in one object; the message names it."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its keys and values: the ``object_pairs_hook`` of ``json.loads``, which would keep the last value.

    Raises:
        DuplicateKey: if a key occurs twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"{shorten(twice)} occurs twice in one object; remove one")
    return content


def parse_json(text: str, what: str, *, remedy: str = "", strict: bool = False) -> Any:
    """The value of a JSON text, in which no object has a key twice.

    Args:
        text: the text.
        what: names it, in messages.
        remedy: for messages.
        strict: refuse NaN and the infinities.

    Raises:
        UserError: if it is not valid, or nested deeper than ``MAX_DEPTH``.
    """
    end = remedy and f"; {remedy}"

    def no_constant(name: str) -> Any:
        raise UserError(f"{what}: {name} is not a JSON value; write a finite number")

    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant if strict else None)
    except DuplicateKey as error:
        raise UserError(f"{what}: {error}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{what}, {place} is not valid JSON: {error.msg}{end}") from error
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits; deep nesting
        raise UserError(f"{what} is not valid JSON: {reason(error)}{end}") from error
    if depth_exceeds(value, MAX_DEPTH):
        raise UserError(f"{what} is nested deeper than {MAX_DEPTH} levels{end}")
    return value


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text: JSON's types only, no key twice, aliases expanded to a bounded size.

    Raises:
        UserError: if it is not valid.
    """
    import yaml  # here, since few programs need it

    class UniqueLoader(yaml.SafeLoader):
        """PyYAML keeps the last of two equal keys and says nothing."""

    def unique(loader: UniqueLoader, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{what}, line {line}: a key must be a word, not a list or an object")
            value = loader.construct_object(value_node, deep=True)
            if key_node.tag == "tag:yaml.org,2002:merge":  # PyYAML's own merges get nested ones wrong
                for one in value if isinstance(value, list) else [value]:
                    if not isinstance(one, dict):
                        raise UserError(f"{what}, line {line}: << takes an object or a list of objects")
                    merged = {**one, **merged}  # the first of several wins
                continue
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"{what}, line {line}: the key {shorten(key_node.value)} is {kind_of(key)}; correct "
                                "it, or write it in quotes")
            if key in own:
                raise UserError(f"{what}, line {line}: {shorten(key)} occurs twice; remove one")
            own[key] = value
        return {**merged, **own}

    def number(loader: UniqueLoader, node: yaml.ScalarNode) -> Any:
        if _OLD_NUMBER.search(node.value):
            line = node.start_mark.line + 1
            raise UserError(f"{what}, line {line}: {shorten(node.value)} is another number in YAML 1.1; write a "
                            "decimal number, or quotes")
        kind = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
        return kind(node)

    # 1e-5 is a number in YAML 1.2, and a string to PyYAML
    UniqueLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique)
    for kind in ("int", "float"):
        UniqueLoader.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    try:
        value = yaml.load(text, Loader=UniqueLoader)
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or reason(error)
        raise UserError(f"{what}{where} is not valid YAML: {shorten(problem)}") from error
    except Exception as error:  # constructors: a date without sense, !!int of a word; deep nesting
        raise UserError(f"{what} is not valid YAML: {reason(error)}") from error
    if depth_exceeds(value, MAX_DEPTH):
        raise UserError(f"{what} is nested deeper than {MAX_DEPTH} levels, or its aliases repeat too much")
    return value


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than ``limit``, or hold more than ``MAX_NODES`` where they repeat."""
    level, depth = [value], 0
    while level:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, (dict, list))
        ]
        depth += 1
        if depth > limit or len(level) > MAX_NODES:
            return True
    return False


def kind_of(value: Any) -> str:
    """A value's JSON type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def inside(directory: str | os.PathLike[str], name: Any) -> Path:
    """``directory / name``, where ``name`` comes from a file and must stay within the directory.

    A link that leads elsewhere is followed: the user has made it.

    Raises:
        UserError: if ``name`` is no string, is absolute, or climbs out with ``..``.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{directory}: {shorten(name)!r} is not a file name")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{directory}: {shorten(name)} leads out of the directory; it must name a file inside")
    return Path(directory) / path
