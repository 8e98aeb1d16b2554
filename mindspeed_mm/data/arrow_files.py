"""Tables as data files: Parquet, Arrow and CSV files, one record per row.

A table is read by groups of rows: the row groups of a Parquet file, the record batches of an Arrow file, which is
mapped into memory. Rows become Python values when they are asked for.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import available_memory, reading, shorten

AGAIN = "correct it (docs/data.md), or write it again"
_ARROW_FILE, _STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
_COMPRESSED = 256 << 20  # bytes that a compressed Arrow stream may take, which is held unpacked
_GROUPS_KEPT, _GROUPS_BYTES = 4, 256 << 20
# Rows that are read in order are converted together, in a fifth of the time of one by one: most rows, and most bytes.
_AHEAD, _AHEAD_BYTES = 256, 8 << 20


class Groups(Protocol):
    """An open table.

    Attributes:
        schema: its ``pyarrow.Schema``.
        rows: number of rows of each group.
    """

    schema: Any
    rows: list[int]

    def read(self, group: int) -> Any:
        """A group as a ``pyarrow`` table or record batch.

        Raises:
            Exception: any, if the file is damaged.
        """


class _Parquet:
    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, group: int) -> Any:
        return self._file.read_row_group(group)


class _Arrow:
    """An Arrow IPC file, or a stream, which ``datasets`` writes."""

    def __init__(self, path: str) -> None:
        import pyarrow

        source = pyarrow.memory_map(path)
        if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
            file = pyarrow.ipc.open_file(source)
            self.schema, self._batch = file.schema, file.get_batch
            self.rows = [file.get_batch(group).num_rows for group in range(file.num_record_batches)]
        else:
            self.schema, batches = _stream(source)
            self._batch = batches.__getitem__
            self.rows = [batch.num_rows for batch in batches]
        self._valid: set[int] = set()

    def read(self, group: int) -> Any:
        batch = self._batch(group)
        if group not in self._valid:  # offsets in the file are used as they are: wrong ones would end the process
            batch.validate(full=True)
            self._valid.add(group)
        return batch


def _stream(source: Any) -> tuple[Any, list[Any]]:
    """Schema and record batches of an Arrow stream, which has no index: views of the mapped file.

    Raises:
        ValueError: if it ends too soon, or is compressed and large.
    """
    import pyarrow

    source.seek(max(0, source.size() - len(_STREAM_END)))
    complete = source.read() == _STREAM_END
    source.seek(0)
    reader = pyarrow.ipc.open_stream(source)
    allocated = pyarrow.total_allocated_bytes()
    batches = []
    for batch in reader:
        batches.append(batch)
        if pyarrow.total_allocated_bytes() - allocated > _COMPRESSED:
            raise ValueError("it is a compressed stream, which cannot be read in parts; write it uncompressed, or as a "
                             "Parquet file")
    if not complete:  # a stream cut off between two batches looks like a shorter one
        raise ValueError("it ends without the mark of a stream's end: it was cut off")
    return reader.schema, batches


class _Text:
    """A CSV or TSV file with a header, as one group of strings."""

    def __init__(self, path: str) -> None:
        import pyarrow.csv as csv

        available = available_memory()
        if available is not None and 2 * os.path.getsize(path) > available:
            raise ValueError("it is read at once and does not fit into memory; convert it to Parquet")
        parse = csv.ParseOptions(delimiter="\t" if path.lower().endswith(".tsv") else ",", newlines_in_values=True)
        with csv.open_csv(path, parse_options=parse) as reader:
            names = reader.schema.names
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, "string"))
        self._table = csv.read_csv(path, parse_options=parse, convert_options=convert)
        self.schema, self.rows = self._table.schema, [len(self._table)]

    def read(self, group: int) -> Any:
        return self._table


_KINDS: dict[str, tuple[Callable[[str], Groups], str]] = {
    ".parquet": (_Parquet, "Parquet"), ".arrow": (_Arrow, "Arrow"), ".csv": (_Text, "CSV"), ".tsv": (_Text, "TSV"),
}


def is_table(path: str | Path) -> bool:
    """Whether a data file is a table, by its suffix."""
    return Path(path).suffix.lower() in _KINDS


def open_table(path: str) -> Groups:
    """Open a table, in which no object has a key twice: of two, one would be read.

    Raises:
        UserError: if the file cannot be read, or a name occurs twice.
    """
    kind, name = _KINDS[Path(path).suffix.lower()]
    with reading(f"{name} file {path}", AGAIN):
        table = kind(path)
        _check_names(table.schema, f"{name} file {path}")
    return table


def _check_names(fields: Any, source: str) -> None:
    names = [field.name for field in fields]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{source}: {shorten(name)} occurs twice in one object; remove one")
    for field in fields:
        _check_names(struct_fields(field.type), source)


def struct_fields(kind: Any) -> list[Any]:
    """Fields of an Arrow type that holds objects, or lists of these; nothing for another."""
    import pyarrow.types as types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return list(kind) if types.is_struct(kind) else []


class TableRows:
    """Random access to the rows of one table file."""

    def __init__(self, path: str) -> None:
        """Count the rows.

        Raises:
            UserError: as :func:`open_table`.
        """
        self._path = path
        self._ends = list(itertools.accumulate(open_table(path).rows, initial=0))
        self.close()

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1]

    def open(self, handle: int) -> None:
        """Open the file in this process; ``handle`` is not used."""
        self._table = open_table(self._path)

    def close(self) -> None:
        """Release the file, and the rows that are kept in memory."""
        self._table: Groups | None = None
        self._groups: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._rows: list[Any] = []
        self._start = 0

    def read(self, index: int, name: str) -> Any:
        """One row; ``name`` is not used.

        Raises:
            Exception: any, if the row is damaged.
        """
        if not self._start <= index < self._start + len(self._rows):
            group = bisect.bisect_right(self._ends, index) - 1
            (table, ahead), first = self._group(group), index - self._ends[group]
            in_order = index == self._start + len(self._rows)
            try:
                rows = table.slice(first, ahead if in_order else 1).to_pylist()
            except Exception:  # of one of the rows, perhaps of a later one
                rows = table.slice(first, 1).to_pylist()
            self._rows, self._start = rows, index
        return self._rows[index - self._start]

    def _group(self, group: int) -> tuple[Any, int]:
        """A group, and the number of its rows to convert together."""
        if group not in self._groups:
            assert self._table is not None
            table = self._table.read(group)
            ahead = min(_AHEAD, 1 + _AHEAD_BYTES * table.num_rows // max(1, table.nbytes))
            self._groups[group] = table, ahead
            while len(self._groups) > 1 and (
                len(self._groups) > _GROUPS_KEPT or sum(one.nbytes for one, _ in self._groups.values()) > _GROUPS_BYTES
            ):
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]
