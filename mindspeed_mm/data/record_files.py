"""Data files: JSON list, JSON lines (``.jsonl``) and Parquet (``.parquet``), read whole or one record at a time.

``RecordFile`` gives random access without reading a file into memory, so that ``streaming`` keeps the order, the
shuffling and the exact resume of a data set that was built beforehand. It scans a file once for the offsets of its
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
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import (
    DATA_BYTES,
    DuplicateKey,
    available_memory,
    is_file,
    is_present,
    kind_of,
    open_regular,
    read_bytes,
    reading,
    reason,
    shorten,
    unique_keys,
)

_AGAIN = "correct it (docs/data.md), or create it again (step 3 of the guide)"
_OTHER_FORMATS = (".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".txt", ".yaml", ".yml", ".xml")
_NOT_TEXT = (  # how a file begins, what it then is, and the remedy
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"), (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"\x1f\x8b", "compressed", "unpack it with gunzip"), (b"\x28\xb5\x2f\xfd", "compressed", "unpack it with unzstd"),
    (b"PK\x03\x04", "compressed", "unpack it with unzip"),
    (b"PAR1", "a Parquet file", "give it a name that ends in .parquet"),
)
_BLOCKS, _BLOCK = 16, 1 << 16  # of a fingerprint: number, and bytes of one
_BOM = b"\xef\xbb\xbf"  # written by some editors; means nothing
_ROW_GROUPS_KEPT = 4
# A string matches as a whole, so that brackets within it do not count.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


class RecordError(UserError):
    """A record that cannot be used, with its name; ``on_bad_sample`` decides whether it is skipped."""


def record_name(path: str | Path, index: int) -> str:
    """How every message names a record: its data file, and its index in that file, from 0."""
    return f"{path}, record {index}"


def fingerprint(paths: Sequence[str | Path]) -> str:
    """Digest of data files by their sizes and 16 blocks of each, so that it takes no time for a large one."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with reading(f"dataset {path}", _AGAIN), os.fdopen(open_regular(path, limit=DATA_BYTES), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for block in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def read_rows(path: str | Path, *, limit: int | None = None) -> list[Any] | RecordFile:
    """The rows of a JSON list, a JSON-lines file (``.jsonl``) or a Parquet file (``.parquet``).

    Args:
        path: the file.
        limit: most rows to read, from the first; None for all.

    Returns:
        All rows; if one of them is not valid, a :class:`RecordFile`, which names it when it is reached.

    Raises:
        UserError: if the file is missing or has no list of records.
    """
    path = Path(path)
    require_file(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
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
            f"{path} holds {kind_of(rows)}, not a list of records; create it again (step 3 of the guide), or name "
            "another file"
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
            f"dataset {path} {kind}; make it (step 3 of the guide: "
            "python examples/qwen2vl/llava_instruct_2_mllm_demo_format.py) or correct basic_parameters.dataset"
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
        raise UserError(f"dataset {path} is a {path.suffix} file; data files are JSON lists, JSON lines (.jsonl) or "
                        "Parquet (.parquet): convert it")
    with reading(f"dataset {path}", _AGAIN), os.fdopen(open_regular(path, limit=DATA_BYTES), "rb") as file:
        first = file.read(4)
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
        remedy = _AGAIN
        first, _, rest = content.partition(b"\n")
        if b"\r" in first.strip() and not rest.strip():
            remedy = "its lines end in carriage returns alone: end them with line feeds"
        elif rest.strip() and first.strip().startswith(b"{"):
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(first)
                remedy = "each of its lines is a JSON text: give the file a name that ends in .jsonl"
        raise UserError(f"{source} is not valid JSON ({reason(error)}); {remedy}") from error


def _read_parquet(path: Path, limit: int | None) -> list[Any]:
    import pyarrow.parquet

    _parquet_schema(path)
    _require_memory(path, 3 * _parquet_bytes(path))
    with reading(f"Parquet file {path}", _AGAIN):
        return pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()


def _parquet_schema(path: str | Path) -> Any:
    """The schema of a Parquet file, in which no object has a key twice: of two, one would be read.

    Raises:
        UserError: if the file cannot be read, or a name occurs twice.
    """
    import pyarrow.parquet

    def check(fields: Any) -> None:
        names = [field.name for field in fields]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"Parquet file {path}: {shorten(name)} occurs twice in one object; remove one")
        for field in fields:
            check(_struct_fields(field.type))

    with reading(f"Parquet file {path}", _AGAIN):
        schema = pyarrow.parquet.read_schema(path)
        check(schema)
    return schema


def _struct_fields(kind: Any) -> Any:
    """Fields of an Arrow type that holds objects, or lists of these; nothing for another."""
    import pyarrow.types as types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return list(kind) if types.is_struct(kind) else []


def struct_columns(path: str | Path) -> frozenset[str]:
    """Columns of a Parquet file that hold objects or lists of objects; none for another kind of file.

    Arrow gives all objects of a column the same keys: an object has the keys of every other one, as nulls.

    Raises:
        UserError: if the file cannot be read.
    """
    if Path(path).suffix != ".parquet":
        return frozenset()
    require_file(Path(path))
    return frozenset(field.name for field in _parquet_schema(path) if _struct_fields(field.type))


class RecordFile:
    """Random access to the records of one data file."""

    def __init__(self, path: str, *, limit: int | None = None) -> None:
        """Find the offsets of the records.

        Args:
            path: the file.
            limit: most records to use, from the first; None for all.

        Raises:
            UserError: if the file is missing or no list of records.
        """
        require_file(Path(path))
        self.path = path
        self._process = -1
        self._state = self._current_state()
        self._parquet = Path(path).suffix == ".parquet"
        if self._parquet:
            _parquet_schema(path)
            self._ends = np.cumsum([0, *_row_groups(path)])
            count = int(self._ends[-1])
        else:
            require_text(Path(path))
            self._blank_lines: list[int] | None = None
            if Path(path).suffix == ".jsonl":
                self._places, self._blank_lines = _line_places(path)
            else:
                self._places = _element_places(path)
            count = len(self._places)
        self._count = count if limit is None else min(count, limit)

    def __len__(self) -> int:
        """Number of records."""
        return self._count

    def __getitem__(self, index: int) -> Any:
        """Read and parse one record.

        Raises:
            RecordError: if it is not valid.
            UserError: if the file has changed or is gone: no bad record, which could be skipped.
        """
        name = record_name(self.path, index)
        with reading(f"dataset {self.path}"):
            self._open()
        try:
            with reading(name):
                if self._parquet:
                    group = bisect.bisect_right(self._ends, index) - 1
                    return self._group(int(group))[index - int(self._ends[group])]
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
        except UserError as error:
            raise RecordError(str(error)) from error

    def _current_state(self, handle: int | None = None) -> tuple[int, int]:
        status = os.stat(self.path) if handle is None else os.fstat(handle)
        return status.st_size, status.st_mtime_ns

    def _open(self) -> None:
        if self._process != os.getpid():
            self._groups: OrderedDict[int, list[Any]] = OrderedDict()
            self._handle = os.open(self.path, os.O_RDONLY)
            if self._parquet:
                import pyarrow.parquet

                self._parquet_file: Any = pyarrow.parquet.ParquetFile(self.path)
            self._process = os.getpid()
        # another file of this name, or one that is written to: other records would be at the offsets
        if self._current_state(self._handle) != self._state:
            raise UserError(f"{self.path} has changed since the run began; start it again, or restore the file")

    def _num_lines(self, end: int) -> int:
        """Number of lines that end before the byte ``end``."""
        return sum(os.pread(self._handle, min(_BLOCK, end - start), start).count(b"\n")
                   for start in range(0, end, _BLOCK))

    def _group(self, group: int) -> list[Any]:
        if group not in self._groups:
            self._groups[group] = self._parquet_file.read_row_group(group).to_pylist()
            if len(self._groups) > _ROW_GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


def _row_groups(path: str) -> list[int]:
    """Rows of each group of a Parquet file."""
    import pyarrow.parquet

    with reading(f"Parquet file {path}", _AGAIN):
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _parquet_bytes(path: str | Path) -> int:
    """Bytes of a Parquet file's values, which compression may hide."""
    import pyarrow.parquet

    with reading(f"Parquet file {path}", _AGAIN):
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


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
            raise UserError(f"{path} is empty; {_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in _BRACKETS.finditer(content):
                mark = content[match.start()]
                if mark in b"{[":
                    depth += 1
                    if depth == 1 and mark != ord("["):
                        raise UserError(f"{path} holds an object, not a list of records; {_AGAIN}")
                    if depth == 2:
                        start = match.start()
                elif mark in b"}]":
                    depth -= 1
                    if depth == 1:
                        places.append((start, match.end()))
            if not depth and places:
                _check_gaps(path, content, places)
    if depth or (not places and start == 0 and not _is_empty_list(path)):
        raise UserError(f"{path} is not a valid JSON list of records; {_AGAIN}")
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
                f"{path}: before record {index} there is {found!r}, which is not an object; create the file again "
                "(step 3 of the guide), or remove it"
            )
        end = following


def _is_empty_list(path: str) -> bool:
    return b"".join(Path(path).read_bytes().split()) == b"[]"
