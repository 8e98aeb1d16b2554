"""From data files to a tokenized data set on disk, with everything but the pixels decided.

Columns of the result: ``input_ids``; ``spans``, the borders [start, end, start, end, ...] of the runs of target tokens;
``images``, resolved paths; ``videos``, structs of :class:`~mindspeed_mm.data.records.Video`; ``is_video``, one flag per
image or video in the order of their placeholders; ``grids``, three numbers for each of these; ``file``, number of the
data file, and ``record``, index in it; ``outcome``, an :class:`~mindspeed_mm.data.encoder.Outcome`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_mm.data import cache
from mindspeed_mm.data.encoder import TOKENIZER_FILES, Encoder, Outcome, load_tokenizer
from mindspeed_mm.data.record_files import data_parts, record_name
from mindspeed_mm.data.records import RecordReader, SkippedRecords
from mindspeed_mm.data.template_check import compare_with_checkpoint
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import reading
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions
from mindspeed_mm.interfaces.media import MediaSettings
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.progress import Phase

if TYPE_CHECKING:
    from datasets import Dataset

    from mindspeed_mm.config.data_config import DataConfig

logger = logging.getLogger(__name__)
_OUTCOMES = {
    Outcome.KEPT: "kept whole", Outcome.SHORTENED: "shortened to whole turns",
    Outcome.TOO_LONG: "skipped: the first turn is too long", Outcome.NO_TARGET: "skipped: no target token",
    Outcome.UNUSABLE: "skipped: unusable",
}
_POLL_SECONDS = 0.2
_RECORDS_PER_PROCESS = 2000  # below this a further process costs more than it saves
# Modules that decide what a cache holds; the model family names its own.
_MODULES = (*(f"{__package__}.{name}" for name in (
    "prepare", "encoder", "template_check", "record_files", "arrow_files", "records", "formats", "parsing", "grounding",
    "media_files", "images", "image_store", "media", "videos")),
            "mindspeed_mm.interfaces.conversation", "mindspeed_mm.interfaces.media")


@dataclasses.dataclass(frozen=True)
class Source:
    """Which files to prepare, and how.

    Attributes:
        config: the data file.
        files: data files, in order.
        limit: records to keep of each file, from the first; None for all.
        spec: the model family, for the chat template.
        media: pixel limits and patch sizes; None for a model that takes text only.
        seq_length: most tokens of a sample.
    """

    config: DataConfig
    files: tuple[str, ...]
    limit: int | None
    spec: ModelSpec
    media: MediaSettings | None
    seq_length: int

    @property
    def may_skip(self) -> bool:
        """Whether records that cannot be used are skipped."""
        return self.config.dataloader_param.bad_sample_limit > 0

    def reader(self) -> RecordReader:
        """A new reader of the records."""
        return RecordReader(self.config, self.spec, self.files, limit=self.limit)

    @property
    def names(self) -> str:
        """The files' names, for messages."""
        return ", ".join(self.files)


class PreparedRows:
    """Rows of a data set on disk.

    Attributes:
        files: data files that the column ``file`` counts.
        table: the columns, a ``pyarrow`` table.
    """

    def __init__(self, dataset: Dataset, files: Sequence[str]) -> None:
        """Wrap ``dataset``, which has the columns ``file`` and ``record``."""
        self.files = files
        self._dataset = dataset

    @property
    def table(self) -> Any:
        return self._dataset.data.table

    @property
    def has_videos(self) -> bool:
        """Whether a row has a video."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.table.column("videos"))
        return bool(pyarrow.compute.max(lengths).as_py())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row."""
        return self._dataset[index]

    def origin(self, index: int) -> tuple[int, int]:
        """Number of a row's data file, and its record's index in that file."""
        file, record = (self.table.column(name)[index].as_py() for name in ("file", "record"))
        return file, record

    def find(self, file: int, record: int) -> int | None:
        """The row of a record; None if there is none."""
        files, records = (self.table.column(name).to_numpy() for name in ("file", "record"))
        return next(iter(np.flatnonzero((files == file) & (records == record)).tolist()), None)


def prepare_dataset(source: Source) -> PreparedRows:
    """Load the tokenized data set from the cache, building it first if it is not there.

    Raises:
        UserError: naming file and record that cannot be used, or if no record is left.
    """
    with _without_bars():
        return _load_rows(source, _cached(source, "tokenized", _build))


def prepare_records(source: Source) -> PreparedRows:
    """The same for ``preprocess_on_fly``: checked records, not tokenized.

    The columns are those of :class:`~mindspeed_mm.data.records.Record`.

    Raises:
        UserError: naming file and record that cannot be used, or if no record is left.
    """
    with _without_bars():
        return _load_rows(source, _cached(source, "records", _build_records))


def _cached(source: Source, kind: str, build: Callable[[Source, Path], None]) -> Path:
    import datasets

    basic = source.config.dataset_param.basic_parameters
    root = Path(basic.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mindspeed_mm")
    target = root / f"{kind}-{cache_key(source)}"
    return cache.build_once(target, lambda directory: build(source, directory), overwrite=basic.overwrite_cache)


def _load_rows(source: Source, target: Path) -> PreparedRows:
    import datasets

    with reading(f"prepared data in {target}", "delete that directory; it is rebuilt"):
        for line in (target / "summary.txt").read_text().splitlines():
            level = logging.WARNING if " skipped: " in line else logging.INFO
            logger.log(level, "%s: %s", source.names, line, extra={"all_ranks": False})
        skipped = SkippedRecords(source.config)
        skipped.messages = (target / "skipped.txt").read_text().splitlines()
        skipped.check()  # against the present limit
        return PreparedRows(datasets.load_from_disk(str(target / "rows")), source.files)


def _build_records(source: Source, directory: Path) -> None:
    table, reader = _read_records(source)
    table.save_to_disk(str(directory / "rows"))
    _write_summary(directory, [f"{len(table)} records", *reader.notes.values()])
    _write_skipped(directory, reader.skipped)


def cache_key(source: Source) -> str:
    """Digest of everything that changes the result: data files, settings, tokenizer, and code.

    Images and videos are not read for it; one that has changed its size since is noticed when it is decoded.
    """
    parameters = source.config.dataset_param
    basic = parameters.basic_parameters
    root = Path(parameters.preprocess_parameters.model_name_or_path)
    settings = {
        "files": [(path, [_digest(Path(part)) for part in data_parts(path)]) for path in source.files],
        "limit": source.limit,
        "media": None if source.media is None else dataclasses.asdict(source.media),
        "seq_length": source.seq_length,
        "template": dataclasses.asdict(template_options(source.config, source.spec)),
        "dataset_dir": os.path.abspath(basic.dataset_dir),
        "working_directory": os.getcwd(),
        "attr": [dict(parameters.attr), sorted(parameters.attr.model_fields_set)],
        "boxes": basic.box_format,
        "tokenizer": {name: _digest(root / name) for name in TOKENIZER_FILES if (root / name).is_file()},
        "skip": source.may_skip,
        "code": {name: _digest(_module_file(name)) for name in (*_MODULES, *source.spec.data_modules)},
        "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def _module_file(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    return Path(found.origin)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; correct the path, or its permissions") from error
    return digest.hexdigest()


def make_encoder(source: Source) -> Encoder:
    """The encoder that turns records into rows, with the data file's template.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
    directory = source.config.dataset_param.preprocess_parameters.model_name_or_path
    options = template_options(source.config, source.spec)
    tokenizer = load_tokenizer(directory)
    template = source.spec.build_chat_template(tokenizer, options)
    warning = compare_with_checkpoint(tokenizer, directory, source.spec, options)
    return Encoder(source.files, template, source.media, source.seq_length, may_skip=source.may_skip, warning=warning)


def template_options(config: DataConfig, spec: ModelSpec) -> ChatTemplateOptions:
    """What the data file chooses about the chat template."""
    basic = config.dataset_param.basic_parameters
    return ChatTemplateOptions(
        name=basic.template or spec.chat_templates[0],
        enable_thinking=basic.enable_thinking,
        train_on_prompt=basic.train_on_prompt,
        mask_history=basic.mask_history,
        split_special_tokens=config.dataset_param.preprocess_parameters.split_special_tokens,
    )


def _build(source: Source, directory: Path) -> None:
    """Tokenize all records with ``datasets.map`` and write the rows that are kept."""
    import datasets

    basic = source.config.dataset_param.basic_parameters
    table, reader = _read_records(source)
    skipped = reader.skipped
    count = len(table)
    processes = min(basic.preprocessing_num_workers or 1, os.cpu_count() or 1, count // _RECORDS_PER_PROCESS)
    encoder = make_encoder(source)
    dataset = _mapped(
        table,
        encoder,
        directory / "progress",
        batched=True,
        batch_size=basic.preprocessing_batch_size,
        num_proc=processes if processes > 1 else None,
        remove_columns=["roles", "texts", "in_loss"],
        features=_row_features(datasets),
        load_from_cache_file=False,
        keep_in_memory=processes <= 1,
        cache_file_name=str(directory / "rows.arrow") if processes > 1 else None,  # not in the machine's /tmp
        new_fingerprint=directory.name,
    )
    outcomes = np.array(dataset["outcome"])
    chosen = np.flatnonzero(outcomes <= Outcome.SHORTENED)
    summary = _summary(source, outcomes, dataset, unreadable=len(skipped.messages))
    skipped.messages += dataset.select(np.flatnonzero(outcomes == Outcome.UNUSABLE))["problem"]
    skipped.check()
    if not len(chosen):
        raise UserError(
            f"{source.names}: no record can be trained on ({summary}); raise --seq-length "
            f"{source.seq_length} or lower image_max_pixels"
        )
    rows = dataset.select(chosen) if len(chosen) < count else dataset
    rows.remove_columns("problem").save_to_disk(str(directory / "rows"))
    for part in directory.glob("rows*.arrow"):  # of the processes
        part.unlink()
    _write_summary(directory, [summary, *reader.notes.values(), encoder.warning])
    _write_skipped(directory, skipped)


@dataclasses.dataclass(frozen=True)
class _Counted:
    """An encoder that leaves a byte for each record in a file, to which all processes append."""

    encoder: Encoder
    file: Path

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The encoder's rows."""
        rows = self.encoder(batch)
        with self.file.open("ab", buffering=0) as file:
            file.write(bytes(len(next(iter(batch.values())))))
        return rows


@contextlib.contextmanager
def _followed(file: Path, total: int) -> Iterator[None]:
    """Report the size of ``file``, of at most ``total`` bytes, as the progress of tokenizing; then remove it."""
    ended = threading.Event()

    def follow(phase: Phase) -> None:
        done = 0
        while not ended.wait(_POLL_SECONDS):
            size = file.stat().st_size if file.exists() else 0
            phase.advance(size - done)
            done = size

    with Phase("tokenizing", unit="records", total=total) as phase:
        thread = threading.Thread(target=follow, args=(phase,), name="tokenizing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of ``datasets``, which fill a log."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _mapped(dataset: Dataset, encoder: Encoder, progress: Path, **options: Any) -> Dataset:
    """``dataset.map``; a process that dies is an error of one line.

    Raises:
        UserError: if a process dies, most likely out of memory.
    """
    try:
        with _followed(progress, len(dataset)):
            return dataset.map(_Counted(encoder, progress), **options)
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise UserError(
            "a process that tokenizes has died; it may have run out of memory: lower preprocessing_num_workers"
        ) from error


def _write_summary(directory: Path, notes: list[str]) -> None:
    (directory / "summary.txt").write_text("".join(f"{note}\n" for note in notes if note))


def _write_skipped(directory: Path, skipped: SkippedRecords) -> None:
    (directory / "skipped.txt").write_text("".join(f"{message}\n" for message in skipped.messages))
    for message in skipped.messages[:5]:
        logger.warning("skipped: %s", message)
    if skipped.messages:
        final = cache.final_path(directory) / "skipped.txt"
        logger.warning("%d unusable records skipped; all: %s", len(skipped.messages), final)


def _media_features(datasets: Any) -> dict[str, Any]:
    value = datasets.Value
    return {
        "images": [value("string")], "videos": [{"path": value("string"), "frames": [value("string")]}],
        "file": value("int32"), "record": value("int64"), "channel": value("string"),
    }


def _record_features(datasets: Any) -> Any:
    value = datasets.Value
    texts = {"roles": [value("string")], "texts": [value("string")], "in_loss": [value("bool")]}
    return datasets.Features({**texts, **_media_features(datasets)})


def _row_features(datasets: Any) -> Any:
    value = datasets.Value
    return datasets.Features({
        "input_ids": [value("int32")], "spans": [value("int32")], "is_video": [value("bool")],
        "grids": [value("int32")], "outcome": value("int8"), "problem": value("string"), **_media_features(datasets),
    })


def _summary(source: Source, outcomes: np.ndarray, dataset: Dataset, *, unreadable: int) -> str:
    """Counts of what became of the records, and the first of those that were shortened or skipped.

    Args:
        source: names the files.
        outcomes: of the records that could be parsed.
        dataset: these records, with the columns ``file`` and ``record``.
        unreadable: number of records that could not be parsed.
    """
    parts = [f"{len(outcomes) + unreadable} records"]
    for outcome, words in _OUTCOMES.items():
        found = np.flatnonzero(outcomes == outcome)
        count = len(found) + (unreadable if outcome == Outcome.UNUSABLE else 0)
        some = ""
        if len(found) and outcome != Outcome.KEPT:
            first = dataset[int(found[0])]
            some = f" ({'the first: ' * (count > 1)}{record_name(source.files[first['file']], first['record'])})"
        if count:
            parts.append(f"{count} {words}{some}")
    return ", ".join(parts)


def _read_records(source: Source) -> tuple[Dataset, RecordReader]:
    """All usable records of all files as a table, and the reader, which knows the rest.

    Raises:
        UserError: if more records are unusable than the data file allows, or none is usable.
    """
    import datasets

    reader = source.reader()
    features = _record_features(datasets)
    columns: dict[str, list[Any]] = {name: [] for name in features}
    with Phase("reading records", unit="records") as phase:
        for record in reader.read():
            for name, value in record.columns().items():
                columns[name].append(value)
            phase.advance(1)
    reader.skipped.check(usable=len(columns["record"]))
    return datasets.Dataset.from_dict(columns, features=features), reader
