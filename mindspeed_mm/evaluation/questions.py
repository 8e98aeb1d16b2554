"""Questions of an evaluation: records of data files, read as for training, become prompts and expected answers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mindspeed_mm.data.formats import RecordFormat, recognise
from mindspeed_mm.data.record_files import RecordError, read_rows, record_name
from mindspeed_mm.data.records import RecordReader, require_records
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, is_present, kind_of
from mindspeed_mm.interfaces.conversation import IMAGE_TAG, Message

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import NamedDataset
    from mindspeed_mm.models.spec import ModelSpec

Turns = Literal["all", "first", "last"]
_ROWS_RECOGNISED = 20
CHANNEL, ANSWERS = "channel", "answers"  # columns: name of a group of records; acceptable last answers


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a question.

    Attributes:
        messages: an ``<image>`` tag in a question stands for the next of ``images``.
        images: paths or data URIs.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """Text of the last message."""
        return self.messages[-1].text

    @property
    def length(self) -> int:
        """Characters of all messages: batches are made of prompts of similar lengths."""
        return sum(len(message.text) for message in self.messages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question with the answers that count as right.

    Attributes:
        data_set: name of the data set.
        channel: of the record; empty without one.
        source: data file and record, as messages name them.
        turn: number of the answer in the record, from 0.
        prompt: the conversation before the answer.
        references: acceptable answers, at least one.
    """

    data_set: str
    channel: str = ""
    source: str = ""
    turn: int = 0
    prompt: Prompt
    references: tuple[str, ...]


@dataclasses.dataclass
class QuestionSet:
    """The questions of an evaluation.

    Attributes:
        questions: in the order of data sets, files, records and turns.
        files: data set -> its files.
        skipped_videos: records with videos, which are not asked.
        skipped_records: records that cannot be used, where a training's data file says that they are skipped.
    """

    questions: list[Question]
    files: Mapping[str, tuple[str, ...]]
    skipped_videos: int = 0
    skipped_records: int = 0

    @property
    def digest(self) -> str:
        """Identifies all prompts and references."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            facts = (question.data_set, question.channel, question.prompt.messages, question.prompt.images,
                     question.references)
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()


def data_config(
    spec: ModelSpec, data: Sequence[str], data_dir: str | None, *, model: str
) -> list[NamedDataset]:
    """Data sets of ``--data``: each a file, or ``NAME=FILE``; without a name the stem of its file.

    Relative paths of images start from ``data_dir``, by default the directory of the data file, or the data's own.

    Raises:
        UserError: if a file is missing, or two data sets have one name.
    """
    from mindspeed_mm.config.data_config import DataConfig, NamedDataset

    found: dict[str, NamedDataset] = {}
    for given in data:
        name, equals, path = given.partition("=")
        if not equals or is_present(given):
            name, path = "", given
        name = name or Path(path).stem
        if not is_present(path):
            raise UserError(f"--data {path} does not exist; correct the path")
        if name in found:
            raise UserError(f"--data names two data sets {name!r}; give them names: --data first={path}")
        start = data_dir or (path if is_directory(path) else Path(path).parent)
        content = {"dataset_param": {
            "preprocess_parameters": {"model_name_or_path": model},
            "basic_parameters": {
                "dataset": {"data": path}, "dataset_dir": str(start), "template": spec.chat_templates[0],
            },
        }}
        found[name] = NamedDataset(name, (path,), None, DataConfig(**content))
    if data_dir is not None and not is_directory(data_dir):
        raise UserError(f"--data-dir {data_dir} is not a directory; correct the path")
    return list(found.values())


def read_questions(
    data_sets: Sequence[NamedDataset], spec: ModelSpec, *, turns: Turns = "all", limit: int | None = None,
    only: Collection[str] | None = None,
) -> QuestionSet:
    """The questions of some data sets.

    Every answer of a record that training would count is asked for, with the true conversation before it. A response
    may be a list of acceptable answers, and a column ``answers`` holds further ones for a record's last answer.

    Args:
        data_sets: files and their formats.
        spec: of the model.
        turns: which answers of a record to ask for.
        limit: records of each file, from the first; None: as the data set says.
        only: names of the records to take, by :func:`~mindspeed_mm.data.record_files.record_name`; None: all.

    Raises:
        UserError: naming the file and the record that cannot be read, or if there is no question.
    """
    questions: list[Question] = []
    videos = bad = 0
    for data_set in data_sets:
        reader = RecordReader(data_set.config, spec, data_set.files, limit=None)
        attr = data_set.config.dataset_param.attr
        for number, path in enumerate(data_set.files):
            rows = read_rows(path, limit=data_set.limit if only is not None else limit or data_set.limit)
            require_records(path, len(rows))
            reader.recognise(number, rows)
            form = recognise(attr, list(_first_rows(rows)))
            chosen = [index for index in range(len(rows)) if only is None or record_name(path, index) in only]
            for index in chosen[:limit]:
                source = record_name(path, index)
                try:
                    row, references, channel = _own_columns(rows[index], form, source)
                    record = reader.check(row, number, index)
                except RecordError as error:
                    reader.skipped.messages.append(str(error))
                    continue
                if record.videos:
                    videos += 1
                    continue
                questions += _asked(record, data_set.name, channel, source, references, turns)
        reader.skipped.check()
        bad += len(reader.skipped.messages)
    if not questions:
        why = f"all {videos} records have videos, which are not evaluated" if videos else "no record has an answer"
        raise UserError(f"{', '.join(path for one in data_sets for path in one.files)}: {why}; give other data")
    return QuestionSet(questions, {one.name: tuple(one.files) for one in data_sets}, videos, bad)


def _first_rows(rows: Any) -> Iterator[Any]:
    for index in range(min(len(rows), _ROWS_RECOGNISED)):
        with contextlib.suppress(RecordError):  # which is said when it is read
            yield rows[index]


def _own_columns(row: Any, form: RecordFormat, source: str) -> tuple[Any, tuple[str, ...], str]:
    """A row as training reads it, its further references, and its channel.

    Raises:
        RecordError: if a column holds something else.
    """
    if not isinstance(row, dict):
        return row, (), ""
    channel, answers = row.get(CHANNEL), row.get(ANSWERS)
    if channel is not None and not isinstance(channel, str):
        raise RecordError(f"{source}: its column {CHANNEL!r} is {kind_of(channel)}, not a string")
    references: list[Any] = answers if isinstance(answers, list) else []
    for column in form.columns.get("response", ()):
        value = row.get(column)
        if isinstance(value, list) and value:
            references, row = [*value, *references], {**row, column: value[0]}
    if not all(isinstance(reference, str) for reference in references):
        raise RecordError(f"{source}: its list of acceptable answers holds something that is not a string")
    return row, tuple(references), channel or ""


def _asked(
    record: Any, data_set: str, channel: str, source: str, references: Sequence[str], turns: Turns
) -> Iterator[Question]:
    messages = tuple(record.messages)
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    counted = [(turn, place) for turn, place in enumerate(places) if messages[place].in_loss is not False]
    chosen = {"all": counted, "first": counted[:1], "last": counted[-1:]}[turns]
    for turn, place in chosen:
        before = tuple(message._replace(in_loss=None) for message in messages[:place])
        tags = sum(message.text.count(IMAGE_TAG) for message in before if message.role == "user")
        further = references if place == places[-1] else ()
        yield Question(
            data_set=data_set, channel=channel, source=source, turn=turn,
            prompt=Prompt(before, tuple(record.images[:tags])),
            references=tuple(dict.fromkeys([messages[place].text, *further])),
        )


def as_columns(question: Question) -> Mapping[str, Any]:
    """A question as the results file has it; images in the text of a data URI are shortened."""
    return {
        "data_set": question.data_set, "channel": question.channel, "source": question.source, "turn": question.turn,
        "messages": [{"role": message.role, "text": message.text} for message in question.prompt.messages],
        "images": [image if len(image) < 500 else f"{image[:40]}... ({len(image)} characters)"
                   for image in question.prompt.images],
        "references": list(question.references),
    }
