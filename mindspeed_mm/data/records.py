"""Records: rows of a data file become checked conversations with the paths of their images and videos.

``RecordReader`` is the only place that parses and checks a row: preflight, data set building and streaming all use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.cache import image_directory
from mindspeed_mm.data.formats import OBJECTS, RecordFormat, format_of, recognise
from mindspeed_mm.data.grounding import with_objects
from mindspeed_mm.data.image_store import ImageStore
from mindspeed_mm.data.media_files import MediaFinder, found_media
from mindspeed_mm.data.parsing import MESSAGE_KEYS, PART_KEYS, Record, parse_record
from mindspeed_mm.data.record_files import RecordError, RecordFile, read_rows, record_name, struct_columns
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import reason, shorten
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import DataConfig

_STREAMED_ROWS_CHECKED = 1000
_ROWS_RECOGNISED = 20  # of a file's first rows, by which its format is recognised


def require_records(path: str, count: int) -> None:
    """Check that a data file has records: among others it would be missed by nobody.

    Raises:
        UserError: naming the file.
    """
    if not count:
        raise UserError(f"dataset {path} has no records; write records into it (docs/formats.md), or leave it out")


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
        basic = config.dataset_param.basic_parameters
        store = ImageStore(image_directory(basic.cache_dir), copies=not basic.streaming,
                           allow_download=basic.download_images)
        self._finder = MediaFinder(basic.dataset_dir, store)
        self._box_tokens = basic.box_format == "special_tokens"
        template = basic.template or spec.chat_templates[0]
        self._thoughts = template in spec.thinking_templates
        self._formats: dict[int, RecordFormat] = {}
        self._never_seen = {column for names in format_of(self._attr).columns.values() for column in names}

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
        recognised = {self._files[file]: str(form) for file, form in self._formats.items() if form.recognised}
        if recognised:
            same = len(set(recognised.values())) == 1 and len(recognised) == len(self._files)
            named = [form if same else f"{path}: {form}" for path, form in recognised.items()]
            notes["format"] = f"format, recognised by the first records: {', '.join(dict.fromkeys(named))}"
        notes |= {f.what[0]: str(f) for f in (self.empty_answers, self.control_tokens) if f.messages}
        return {kind: note for kind, note in notes.items() if note}

    def read(self, *, sample: bool = False) -> Iterator[Record]:
        """All usable records; the rest is counted in ``skipped``, which the caller checks at the end.

        Args:
            sample: read the first rows of each file only: a file that is streamed may be too large to read at once.

        Raises:
            UserError: if a file is missing or no list of records.
        """
        for file, path in enumerate(self._files):
            if sample:
                limit = min(self._limit or _STREAMED_ROWS_CHECKED, _STREAMED_ROWS_CHECKED)
                rows: Any = RecordFile(path, limit=limit)
            else:
                rows = read_rows(path, limit=self._limit)
            require_records(path, len(rows))
            self.recognise(file, rows)
            for index in range(len(rows)):
                try:
                    record = self.check(rows[index], file, index)
                except RecordError as error:
                    self.skipped.messages.append(str(error))
                else:
                    yield record

    def recognise(self, file: int, rows: Sequence[Any] | RecordFile) -> None:
        """Choose the format of a file before its records are checked.

        Args:
            file: number of the file.
            rows: its records.

        Raises:
            UserError: if a column holds objects that the kind of file mixes up.
        """
        first = []
        for index in range(min(len(rows), _ROWS_RECOGNISED)):
            with contextlib.suppress(RecordError):  # which is said when it is read
                first.append(rows[index])
        path = self._files[file]
        structs = struct_columns(path)
        form = recognise(self._attr, first)
        for column in form.columns.get("tools", ()):
            if column in structs:
                raise UserError(
                    f"{path}: its column {column!r} (attr.tools) holds objects; in Parquet these have each other's "
                    "keys: store the tools of a record as one JSON text"
                )
        self._formats[file] = dataclasses.replace(form, columnar=bool(structs))

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
            form = self._formats[file]
            record = parse_record(row, form, self._spec, thoughts=self._thoughts)
            images, videos = found_media(record, self._finder) if record.images or record.videos else ([], [])
            messages = record.messages
            if objects := row.get(OBJECTS):
                messages = with_objects(messages, objects, images, self._spec, special_tokens=self._box_tokens)
        except UserError:
            raise
        except ValueError as error:
            raise RecordError(f"{record_name(self._files[file], index)}: {error}") from error
        except Exception as error:  # nesting too deep for a parser, values that JSON does not have
            raise RecordError(f"{record_name(self._files[file], index)}: {reason(error)}") from error
        self._count_unread(row, form)
        record = Record(messages, images, videos, file, index, record.channel)
        self._examine(record)
        return record

    def _examine(self, record: Record) -> None:
        find = self._find_control_token
        empty = sum(1 for role, text, _ in record.messages if role == "assistant" and (not text or text.isspace()))
        tokens: list[str] = []
        if find is not None and find("".join([message.text for message in record.messages])):
            tokens = [token for message in record.messages if (token := find(message.text))]
        if empty or tokens:
            name = record_name(self._files[record.file], record.record)
            if empty:
                self.empty_answers.add(empty, name)
            if tokens:
                self.control_tokens.add(len(tokens), f"{tokens[0]} in {name}")

    def _count_unread(self, row: Mapping[str, Any], form: RecordFormat) -> None:
        if self._never_seen:
            self._never_seen -= row.keys()
        columns = form.read_columns
        if not row.keys() <= columns:
            self.unread.update(name for name in row.keys() - columns if row[name] is not None)
        turns = row[form.messages] if form.messages else ()
        if sum(map(len, turns)) > 2 * len(turns):  # each has the two keys that are read
            known = {form.role_tag, form.content_tag, *MESSAGE_KEYS}
            if not self._thoughts:
                known.discard("reasoning_content")
            keys = {key for turn in turns for key in turn.keys() - known if turn[key] is not None}
            self.unread.update(f"{form.messages}.{key}" for key in keys)
        if form.messages:
            keys = {key for turn in turns if isinstance(turn[form.content_tag], list)
                    for part in turn[form.content_tag] if isinstance(part, dict)
                    for key in part.keys() - PART_KEYS if part[key] is not None}
            self.unread.update(f"{form.messages}.{form.content_tag}.{key}" for key in keys)
