"""Data files: JSON list, JSON lines (``.jsonl``), tables (``arrow_files``) and directories, by record or read whole.

``RecordFile`` gives random access without reading a file into memory, so that ``streaming`` keeps the order, the
shuffling and the exact resume of a data set that was built beforehand. It scans a JSON file once for the offsets of its
records: 16 bytes of memory each.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindspeed_mm.data.arrow_files import AGAIN, TableRows, is_table, open_table, struct_fields
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import (
    DATA_BYTES,
    DuplicateKey,
    available_memory,
    inside,
    is_directory,
    is_file,
    is_present,
    kind_of,
    open_regular,
    read_bytes,
    read_json,
    reading,
    reason,
    shorten,
    unique_keys,
)

_OTHER_FORMATS = (".xls", ".xlsx", ".txt", ".yaml", ".yml", ".xml")
_NOT_TEXT = (  # how a file begins, what it then is, and the remedy
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"), (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"\x1f\x8b", "compressed", "unpack it with gunzip"), (b"\x28\xb5\x2f\xfd", "compressed", "unpack it with unzstd"),
    (b"PK\x03\x04", "compressed", "unpack it with unzip"),
    (b"PAR1", "a Parquet file", "give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file", "give it a name that ends in .arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "give it a name that ends in .arrow"),
)
_SHARD_SUFFIXES = (".parquet", ".arrow", ".jsonl")
_SHARD = re.compile(r"(?P<split>.*)-\d{5}-of-(?P<count>\d{5})\b")  # as the Hugging Face hub and datasets name them
_SPLIT = re.compile(r"(?P<split>train|test|validation|valid|val|dev|eval)(?![a-zA-Z])")
_BLOCKS, _BLOCK = 16, 1 << 16  # of a fingerprint: number, and bytes of one
_BOM = b"\xef\xbb\xbf"  # written by some editors; means nothing
_PARTS_OPEN = 64  # files of a directory that a process has open at the same time
# A string matches as a whole, so that brackets within it do not count.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


class RecordError(UserError):
    """A record that cannot be used, with its name; ``on_bad_sample`` decides whether it is skipped."""


def record_name(path: str | Path, index: int) -> str:
    """How every message names a record: its data file, and its index in that file, from 0."""
    return f"{path}, record {index}"


def data_parts(path: str | Path) -> list[str]:
    """The files that a data file consists of, in the order of their records: itself, or those of a directory.

    A directory is a data set that ``datasets`` has saved, or has files of one of the kinds Parquet, Arrow and JSON
    lines and of one split, which are taken in the order of their names.

    Raises:
        UserError: if a directory is neither; naming what to write instead.
    """
    directory = Path(path)
    if not is_directory(directory):
        return [str(path)]
    if is_present(directory / "dataset_dict.json"):
        with reading(f"{directory / 'dataset_dict.json'}", "save the data set again, or name the directory of a split"):
            splits = [str(split) for split in read_json(directory / "dataset_dict.json")["splits"]]
            raise UserError(f"dataset {path} holds the splits {shorten(', '.join(splits))}; name one of them: "
                            f"{shorten(directory / splits[0])}")
    if is_present(directory / "state.json"):
        return _saved_parts(directory)
    with reading(f"dataset {path}"):
        names = sorted(name for name in os.listdir(directory) if name[0] not in "._")
    kinds = {Path(name).suffix: name for name in names}
    if len(kinds) != 1 or not kinds.keys() <= set(_SHARD_SUFFIXES):
        found = f"holds {shorten(' and '.join(list(kinds.values())[:2]), 80)}" if kinds else "is empty"
        raise UserError(
            f"dataset {path} is a directory and {found}; name its data files, separated by commas, or a directory that "
            f"datasets has saved (save_to_disk) or that has only {', only '.join(_SHARD_SUFFIXES)} files"
        )
    _check_shards(directory, names)
    return [str(directory / name) for name in names]


def _saved_parts(directory: Path) -> list[str]:
    """The shards of a data set that ``Dataset.save_to_disk`` has written, in its order.

    Raises:
        UserError: if its rows are in another order than in the shards.
    """
    state = read_json(directory / "state.json", remedy="save the data set again")
    if state.get("_indices_data_files"):
        raise UserError(f"dataset {directory} has a table of indices, which is not read; save it again after "
                        "dataset.flatten_indices()")
    with reading(f"{directory / 'state.json'}", "save the data set again"):
        return [str(inside(directory, shard["filename"])) for shard in state["_data_files"]]


def _check_shards(directory: Path, names: Sequence[str]) -> None:
    """Check that files belong to one split, and that no shard is missing.

    Raises:
        UserError: naming the splits, or the numbers of shards.
    """
    remedy = f"name the files to use, separated by commas: {shorten(directory / names[-1])},..."
    found = [_SHARD.match(name) or _SPLIT.match(name) for name in names]
    splits = {match["split"] if match else "" for match in found}
    if len(splits) > 1:
        named = shorten(", ".join(sorted(splits - {""})), 80)
        raise UserError(f"dataset {directory} holds files of several splits ({named}); {remedy}")
    count = found[0].groupdict().get("count") if found[0] else None
    if count is not None and len(names) != int(count):
        raise UserError(f"dataset {directory} holds {len(names)} of {int(count)} shards; add the others, or {remedy}")


def fingerprint(paths: Sequence[str | Path]) -> str:
    """Digest of data files by their sizes and 16 blocks of each, so that it takes no time for a large one."""
    digest = hashlib.blake2b(digest_size=16)
    for path in itertools.chain.from_iterable(map(data_parts, paths)):
        with reading(f"dataset {path}", AGAIN), os.fdopen(open_regular(path, limit=DATA_BYTES), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def read_rows(path: str | Path, *, limit: int | None = None) -> list[Any] | RecordFile:
    """The rows of a data file: JSON list, JSON lines (``.jsonl``), a table, or a directory of such files.

    Args:
        path: the file or directory.
        limit: most rows to read, from the first; None for all.

    Returns:
        All rows of a JSON file; if one of them is not valid, a :class:`RecordFile`, which names it when it is reached.
        A RecordFile, too, for a table, whose images may not fit into memory, and for a directory.

    Raises:
        UserError: if the file is missing or has no list of records.
    """
    if data_parts(path) != [str(path)] or is_table(path):
        return RecordFile(str(path), limit=limit)
    path = Path(path)
    require_file(path)
    require_text(path)
    _require_memory(path, 3 * path.stat().st_size)
    with reading(f"dataset {path}"):
        content = read_bytes(path, limit=DATA_BYTES)
    try:
        if path.suffix == ".jsonl":
            lines = itertools.islice((line for line in content.split(b"\n") if line.strip()), limit)
            return [parse_json(line, record_name(path, index)) for index, line in enumerate(lines)]
        rows = parse_json(content, str(path))
    except UserError:
        with contextlib.suppress(UserError):
            return RecordFile(str(path), limit=limit)
        raise
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds {kind_of(rows)}, not a list of records; write one (docs/formats.md), or name another file"
        )
    return rows[:limit]


def require_file(path: Path) -> None:
    """Check that a data file exists.

    Raises:
        UserError: naming it and how to make it.
    """
    if not is_file(path):
        kind = "is not a regular file" if is_present(path) else "does not exist"
        raise UserError(
            f"dataset {path} {kind}; correct basic_parameters.dataset, or put the data there (docs/own_data.md)"
        )


def _require_memory(path: Path, nbytes: int) -> None:
    """Check that all records of a file fit into memory, as far as it can be known; else the process would be killed.

    Raises:
        UserError: naming the file, and how to read it without.
    """
    available = available_memory()
    if available is not None and nbytes > available:
        raise UserError(f"{path} needs about {nbytes / 1e9:.1f} GB of memory to be read at once, and "
                        f"{available / 1e9:.1f} GB are available; set basic_parameters.streaming to true")


def require_text(path: Path) -> None:
    """Check that a file begins like a UTF-8 text.

    Raises:
        UserError: naming what it is instead, and the remedy.
    """
    if path.suffix.lower() in _OTHER_FORMATS:
        raise UserError(f"dataset {path} is a {path.suffix} file; data files are JSON lists, JSON lines (.jsonl), "
                        "Parquet (.parquet), Arrow (.arrow), CSV (.csv) or TSV (.tsv): convert it")
    with reading(f"dataset {path}", AGAIN), os.fdopen(open_regular(path, limit=DATA_BYTES), "rb") as file:
        first = file.read(8)
    for start, kind, remedy in _NOT_TEXT:
        if first.startswith(start):
            raise UserError(f"{path} is {kind}, not a UTF-8 text; {remedy}")
    if b"\0" in first:
        raise UserError(f"{path} is no UTF-8 text (UTF-16, or no text at all); save it as UTF-8")


def _num_quotes(content: bytes) -> int:
    """Number of quotes that begin or end a string of a JSON text, apart from an end after a backslash."""
    return content.count(b'"') - content.count(b'\\"')


def parse_json(content: bytes, source: str) -> Any:
    """The value of a JSON text in UTF-8, in which no object has a key twice; ``source`` names it in messages.

    Raises:
        UserError: if it is not valid.
    """
    content = content.removeprefix(_BOM)
    with contextlib.suppress(ImportError, ValueError, TypeError):  # the standard library's is slower, and says more
        import orjson

        value = orjson.loads(content)
        if _num_quotes(content) == _num_quotes(orjson.dumps(value)):  # of a key that occurs twice one is lost
            return value
    try:
        return json.loads(content.decode("utf-8", "surrogatepass"), object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise UserError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        remedy = AGAIN
        first, _, rest = content.partition(b"\n")
        if b"\r" in first.strip() and not rest.strip():
            remedy = "its lines end in carriage returns alone: end them with line feeds"
        elif rest.strip() and first.strip().startswith(b"{"):
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(first)
                remedy = "each of its lines is a JSON text: give the file a name that ends in .jsonl"
        raise UserError(f"{source} is not valid JSON ({reason(error)}); {remedy}") from error


def struct_columns(path: str | Path) -> frozenset[str]:
    """Columns of a table that hold objects or lists of objects; none for another kind of file.

    Arrow gives all objects of a column the same keys: an object has the keys of every other one, as nulls.

    Raises:
        UserError: if the file cannot be read.
    """
    tables = [part for part in data_parts(path) if is_table(part)]
    for part in tables:
        require_file(Path(part))
    return frozenset(field.name for part in tables for field in open_table(part).schema if struct_fields(field.type))


class _Rows(Protocol):
    """Random access to the rows of one regular file, once it is open."""

    def __len__(self) -> int: ...

    def open(self, handle: int) -> None: ...

    def close(self) -> None: ...

    def read(self, index: int, name: str) -> Any: ...


class _TextRows:
    """The records of a JSON list or of a JSON-lines file."""

    def __init__(self, path: str) -> None:
        require_text(Path(path))
        self._blank_lines: list[int] | None = None
        if Path(path).suffix == ".jsonl":
            self._places, self._blank_lines = _line_places(path)
        else:
            self._places = _element_places(path)

    def __len__(self) -> int:
        return len(self._places)

    def open(self, handle: int) -> None:
        self._handle = handle

    def close(self) -> None:
        pass

    def read(self, index: int, name: str) -> Any:
        start, end = self._places[index].tolist()
        if self._blank_lines is not None:
            name += f" (line {index + 1 + bisect.bisect_right(self._blank_lines, index)})"
        content = os.pread(self._handle, end - start, start)
        try:
            return parse_json(content, name)
        except UserError:
            if self._blank_lines is None:  # a JSON list, whose records may stand on several lines
                name += f" (which begins in line {1 + self._num_lines(start)} of the file)"
            return parse_json(content, name)

    def _num_lines(self, end: int) -> int:
        """Number of lines that end before the byte ``end``."""
        return sum(os.pread(self._handle, min(_BLOCK, end - start), start).count(b"\n")
                   for start in range(0, end, _BLOCK))


class _Part:
    """One regular file of a data file. Each process opens it anew, and notices when it has changed."""

    def __init__(self, path: str) -> None:
        require_file(Path(path))
        self.path = path
        self._process = -1
        self._state = self._current_state()
        self.rows: _Rows = TableRows(path) if is_table(path) else _TextRows(path)

    def _current_state(self, handle: int | None = None) -> tuple[int, int]:
        status = os.stat(self.path) if handle is None else os.fstat(handle)
        return status.st_size, status.st_mtime_ns

    def open(self) -> None:
        if self._process != os.getpid():
            self.rows.close()  # what the process has that this one was forked from
            self._handle = os.open(self.path, os.O_RDONLY)
            self.rows.open(self._handle)
            self._process = os.getpid()
        # another file of this name, or one that is written to: other records would be at the offsets
        if self._current_state(self._handle) != self._state:
            raise UserError(f"{self.path} has changed since the run began; start it again, or restore the file")

    def close(self) -> None:
        self.rows.close()
        if self._process == os.getpid():
            os.close(self._handle)
        self._process = -1


class RecordFile:
    """Random access to the records of one data file."""

    def __init__(self, path: str, *, limit: int | None = None) -> None:
        """Find the offsets of the records.

        Args:
            path: the file, or a directory that :func:`data_parts` accepts.
            limit: most records to use, from the first; None for all.

        Raises:
            UserError: if the file is missing or no list of records.
        """
        self.path = path
        self._parts = [_Part(part) for part in data_parts(path)]
        self._ends = list(itertools.accumulate((len(part.rows) for part in self._parts), initial=0))
        self._count = self._ends[-1] if limit is None else min(self._ends[-1], limit)
        self._opened: list[_Part] = []

    def __len__(self) -> int:
        """Number of records."""
        return self._count

    def __getitem__(self, index: int) -> Any:
        """Read and parse one record.

        Raises:
            IndexError: if there is none of this index.
            RecordError: if it is not valid.
            UserError: if the file has changed or is gone: no bad record, which could be skipped.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        name = record_name(self.path, index)
        number = bisect.bisect_right(self._ends, index) - 1 if len(self._parts) > 1 else 0
        part = self._parts[number]
        try:
            self._open(part)
        except Exception:
            with reading(f"dataset {part.path}"):  # only now: entering it takes longer than reading most rows
                raise
        try:
            return part.rows.read(index - self._ends[number], name)
        except Exception:
            try:
                with reading(name):
                    raise
            except UserError as error:
                raise RecordError(str(error)) from error

    def _open(self, part: _Part) -> None:
        part.open()
        if part not in self._opened:
            self._opened.append(part)
            if len(self._opened) > _PARTS_OPEN:
                self._opened.pop(0).close()


def _line_places(path: str) -> tuple[np.ndarray, list[int]]:
    """Start and end of each line that is not blank, int64 [n, 2]; and for each blank one, how many came before it."""
    places: list[tuple[int, int]] = []
    blank, start = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                places.append((start, start + len(line)))
            else:
                blank.append(len(places))
            start += len(line)
    return np.array(places, dtype=np.int64).reshape(-1, 2), blank


def _element_places(path: str) -> np.ndarray:
    """Start and end of each object of a JSON list: int64 [n, 2].

    Raises:
        UserError: if the file is not a list of objects, or ends too soon.
    """
    places: list[tuple[int, int]] = []
    depth, start = 0, 0
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{path} is empty; {AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in _BRACKETS.finditer(content):
                mark = content[match.start()]
                if mark in b"{[":
                    depth += 1
                    if depth == 1 and mark != ord("["):
                        raise UserError(f"{path} holds an object, not a list of records; {AGAIN}")
                    if depth == 2:
                        start = match.start()
                elif mark in b"}]":
                    depth -= 1
                    if depth == 1:
                        places.append((start, match.end()))
            if not depth and places:
                _check_gaps(path, content, places)
    if depth or (not places and start == 0 and not _is_empty_list(path)):
        raise UserError(f"{path} is not a valid JSON list of records; {AGAIN}")
    return np.array(places, dtype=np.int64).reshape(-1, 2)


def _check_gaps(path: str, content: mmap.mmap, places: list[tuple[int, int]]) -> None:
    """Check that there is nothing between the objects of a list but commas: a number there would not be a record.

    Raises:
        UserError: naming what else there is.
    """
    end = 0
    for index, (start, following) in enumerate([*places, (len(content), len(content))]):
        gap = content[end:start].strip().removeprefix(_BOM)
        if gap != (b"[" if index == 0 else b"]" if index == len(places) else b","):
            found = shorten(gap.decode(errors="replace"), 40)
            raise UserError(
                f"{path}: before record {index} there is {found!r}, which is not an object; remove it, or write the "
                "file again"
            )
        end = following


def _is_empty_list(path: str) -> bool:
    return b"".join(Path(path).read_bytes().split()) == b"[]"
