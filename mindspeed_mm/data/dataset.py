"""The data set as the loader sees it: index in, Sample with decoded images and videos out."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mindspeed_mm.data import mixture
from mindspeed_mm.data.collator import Sample
from mindspeed_mm.data.encoder import Encoder, Outcome
from mindspeed_mm.data.images import compiled_resampling
from mindspeed_mm.data.media import Medium, in_order, load_media
from mindspeed_mm.data.mixture import ConcatenatedRows
from mindspeed_mm.data.packing import Costs
from mindspeed_mm.data.prepare import Source, make_encoder, prepare_dataset, prepare_records
from mindspeed_mm.data.record_files import RecordError, RecordFile, record_name
from mindspeed_mm.data.records import require_records
from mindspeed_mm.data.sampler import permutation
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaPatches, MediaSettings
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import DataConfig, NamedDataset

logger = logging.getLogger(__name__)

_RANK_0_ONLY = {"all_ranks": False}  # as training.logging_setup's, which imports this package


class SkippedSample(Exception):
    """A record gives no sample, which was found only now that it was tokenized.

    Attributes:
        outcome: the reason, TOO_LONG or NO_TARGET.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.name)
        self.outcome = outcome


class Rows(Protocol):
    """Records as rows; see ``mindspeed_mm.data.prepare`` for the columns.

    Attributes:
        files: data files, in order.
    """

    files: Sequence[str]

    @property
    def has_videos(self) -> bool:
        """Whether a row has a video; of streamed records, one of the first."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row."""

    def origin(self, index: int) -> tuple[int, int]:
        """Number of a row's data file, and its record's index in that file."""

    def find(self, file: int, record: int) -> int | None:
        """The row of a record; None if there is none."""


class TokenizedOnTheFly:
    """Tokenizes a record when its row is read (``preprocess_on_fly``)."""

    def __init__(self, records: Rows, encoder: Encoder) -> None:
        """Take records as rows with the columns of :class:`~mindspeed_mm.data.records.Record`."""
        self.files = records.files
        self.has_videos = records.has_videos
        self.origin, self.find = records.origin, records.find
        self._records = records
        self._encoder = encoder

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row."""
        return self._encoder.encode(self._records[index])


class Streamed:
    """Records of several files, each read from its file when needed (``streaming``)."""

    def __init__(self, source: Source) -> None:
        """Find the records of all files, and read the first ones for the notes on them.

        Raises:
            UserError: if there is no record.
        """
        self.files = source.files
        self._opened = [RecordFile(path, limit=source.limit) for path in source.files]
        for file in self._opened:
            require_records(file.path, len(file))
        self._ends = np.cumsum([0, *(len(file) for file in self._opened)])
        self._reader = source.reader()
        for number, file in enumerate(self._opened):
            self._reader.recognise(number, file)
        first = source.reader()
        self.has_videos = max([bool(record.videos) for record in first.read(sample=True)], default=False)
        for note in first.notes.values():
            logger.info("%s: of the first records: %s", source.names, note)
        self._said = set(first.notes)

    def __len__(self) -> int:
        """Number of records of all files."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The columns of one checked record."""
        file, record = self.origin(index)
        columns = self._reader.check(self._opened[file][record], file, record).columns()
        for kind, note in self._reader.notes.items():
            if kind not in self._said:
                self._said.add(kind)
                logger.info("%s (said once by each data worker)", note)
        return columns

    def origin(self, index: int) -> tuple[int, int]:
        """See :class:`Rows`."""
        file = int(np.searchsorted(self._ends, index, side="right")) - 1
        return file, index - int(self._ends[file])

    def find(self, file: int, record: int) -> int | None:
        """See :class:`Rows`."""
        return int(self._ends[file]) + record if 0 <= record < len(self._opened[file]) else None


class ChatDataset:
    """Conversations as samples; images and videos are decoded when a sample is read.

    Attributes:
        name: for messages.
        epoch_sizes: samples of each epoch of a cycle, which follow each other; of most data sets one epoch.
    """

    def __init__(
        self,
        rows: Rows,
        settings: MediaSettings | None,
        name: str,
        chosen: np.ndarray | None = None,
        *,
        vocab_size: int | None = None,
        parts: Sequence[tuple[str, int]] = (),
        epoch_sizes: tuple[int, ...] = (),
    ) -> None:
        """Wrap ``rows``.

        Args:
            rows: of all samples.
            settings: pixel limits and patch sizes; None for a model that takes text only.
            name: of the data set, for messages.
            chosen: indices of the rows to use; None for all.
            vocab_size: rows of the word embeddings, which every token id must be below; None: not checked.
            parts: name and number of rows of each data set of a mixture, in the order of their rows.
            epoch_sizes: samples of each epoch of a cycle, in order; one epoch of all samples unless given.

        Raises:
            UserError: if a sample that is tokenized already has a token beyond ``vocab_size``.
        """
        self._rows = rows
        self._settings = settings
        self._chosen = chosen
        self._vocab_size = vocab_size
        self._parts = tuple(parts)
        self._part_ends = np.cumsum([size for _, size in parts])
        self.name = name
        self.epoch_sizes = epoch_sizes or (len(self),)
        table = getattr(rows, "table", None)
        if chosen is None and vocab_size is not None and table is not None:
            chunks = table.column("input_ids").chunks
            self._check_tokens(max((chunk.flatten().to_numpy().max(initial=-1) for chunk in chunks), default=-1))

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the data sets of a mixture, which :attr:`Sample.channel` counts."""
        return tuple(name for name, _ in self._parts)

    def data_set_numbers(self) -> np.ndarray:
        """Number of each sample's data set, int64 [n]; 0 for all without a mixture."""
        places = np.arange(len(self)) if self._chosen is None else self._chosen
        return np.searchsorted(self._part_ends, places, side="right") if self._parts else np.zeros(len(self), np.int64)

    def record_channels(self, count: int | None = None) -> set[tuple[int, str]] | None:
        """Number of the data set, as of ``data_set_numbers``, and name in the column ``channel``, empty for none.

        Args:
            count: of the first so many samples; None: of all.

        Returns:
            Each pair that occurs; None where records are read one by one while training.
        """
        table = getattr(self._rows, "table", None)
        if table is None:
            return None
        column = table.column("channel")
        names = column.slice(0, count) if self._chosen is None else column.take(self._chosen[:count])
        encoded = names.combine_chunks().dictionary_encode()
        known, codes = encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        pairs = np.unique(np.stack([self.data_set_numbers()[:count], codes]), axis=1)
        return {(int(number), "" if code < 0 else known[code]) for number, code in pairs.T}

    @property
    def has_videos(self) -> bool:
        """See :class:`Rows`."""
        return self._rows.has_videos

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._rows) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Read a sample and decode its images and videos.

        Raises:
            RecordError: naming data file, record and reason, if the record cannot be used, or an image or video is
                missing, damaged, or has changed its size since the data set was built.
            SkippedSample: if the record is too long, or has no target token.
        """
        try:
            row = self._row(index)
            if Outcome(row["outcome"]).is_skipped:
                raise SkippedSample(Outcome(row["outcome"]))
            grids = np.array(row["grids"], dtype=np.int64).reshape(-1, 3).tolist()
            media = in_order(row["is_video"], row["images"], row["videos"])
            loaded = tuple(self._load(medium, tuple(grid)) for medium, grid in zip(media, grids, strict=True))
        except RecordError:
            raise
        except UserError as error:
            raise RecordError(f"{self.describe(index)}: {error}") from error
        input_ids = np.array(row["input_ids"], dtype=np.int64)
        self._check_tokens(input_ids.max(initial=-1))
        loss_mask = np.zeros(len(input_ids), dtype=bool)
        for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
            loss_mask[start:end] = True
        channel = int(np.searchsorted(self._part_ends, self._place(index), side="right")) if self._parts else None
        return Sample(input_ids, loss_mask, loaded, int(index), channel, row["channel"])

    def _check_tokens(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UserError(
                f"{self.name}: the tokenizer gives token {largest}, and the model has {self._vocab_size} embeddings; "
                "take tokenizer and weights of one checkpoint, or resize the embeddings"
            )

    def places(self) -> list[np.ndarray]:
        """Indices of the samples of each data set of a mixture, or of all; of a data set that is no subset."""
        assert self._chosen is None
        ends = self._part_ends if self._parts else np.array([len(self)])
        return [np.arange(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def costs(self) -> Costs:
        """Tokens and patches of every sample, without reading any of them.

        Raises:
            TypeError: if the samples are tokenized on the fly: their lengths are unknown.
        """
        table = self._table()
        text = table.column("input_ids").combine_chunks()
        grids = table.column("grids").combine_chunks()
        areas = np.cumsum([0, *grids.flatten().to_numpy().reshape(-1, 3).prod(axis=1, dtype=np.int64)])
        ends = np.cumsum(grids.value_lengths().to_numpy() // 3)
        starts = ends - grids.value_lengths().to_numpy() // 3
        costs = Costs(text.value_lengths().to_numpy().astype(np.int64), areas[ends] - areas[starts])
        return costs if self._chosen is None else costs.take(self._chosen)

    def target_token_counts(self) -> np.ndarray:
        """Target tokens of every sample, int64 [n], without reading any of them.

        Raises:
            TypeError: as ``costs`` does.
        """
        spans = self._table().column("spans").combine_chunks()
        borders = spans.flatten().to_numpy().reshape(-1, 2).astype(np.int64)
        ends = np.cumsum(spans.value_lengths().to_numpy() // 2)
        sums = np.cumsum([0, *(borders[:, 1] - borders[:, 0])])
        counts = sums[ends] - sums[ends - spans.value_lengths().to_numpy() // 2]
        return counts if self._chosen is None else counts[self._chosen]

    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages: data file, and record of that file."""
        file, record = self._rows.origin(self._place(index))
        return record_name(self._rows.files[file], record)

    def find(self, path: str, record: int) -> int:
        """The sample of a record.

        Args:
            path: of its data file.
            record: its index in that file.

        Raises:
            UserError: if there is no such file or record, or it was skipped or held out.
        """
        files = [os.path.normpath(file) for file in self._rows.files]
        if os.path.normpath(path) not in files:
            raise UserError(f"{path} is not one of the data files; choose {' or '.join(self._rows.files)}")
        place = self._rows.find(files.index(os.path.normpath(path)), record)
        found = [] if place is None else [place]
        if found and self._chosen is not None:
            found = np.flatnonzero(self._chosen == place).tolist()
        if not found:
            raise UserError(f"{record_name(path, record)} is not in the data set: there is no such record, or it was "
                            "skipped, or val_rate holds it out; choose another")
        return found[0]

    def subset(self, indices: np.ndarray, name: str, *, epoch_sizes: tuple[int, ...] = ()) -> ChatDataset:
        """A data set of some of the samples, in the given order; a sample may occur more than once."""
        chosen = indices if self._chosen is None else self._chosen[indices]
        return ChatDataset(
            self._rows, self._settings, name, chosen, vocab_size=self._vocab_size, parts=self._parts,
            epoch_sizes=epoch_sizes,
        )

    def _table(self) -> Any:
        table = getattr(self._rows, "table", None)
        if table is None:
            raise TypeError("samples that are tokenized on the fly have no known cost")
        return table

    def _place(self, index: int) -> int:
        return int(index) if self._chosen is None else int(self._chosen[index])

    def _row(self, index: int) -> Mapping[str, Any]:
        return self._rows[self._place(index)]

    def _load(self, medium: Medium, grid: tuple[int, ...]) -> MediaPatches:
        patches, found = load_media(medium, self._settings)
        if found != grid:
            raise UserError(
                f"{medium} now has {'x'.join(map(str, found))} slices, rows and columns of patches, not "
                f"{'x'.join(map(str, grid))}; it was replaced after the data set was built: set overwrite_cache"
            )
        return MediaPatches(patches, found)


def build_datasets(
    config: DataConfig,
    *,
    spec: ModelSpec,
    media: MediaSettings | None,
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
) -> tuple[ChatDataset, ChatDataset | None]:
    """The training data set and the one to evaluate on, if the data file asks for one.

    Every rank calls this; one process per shared cache directory builds, and the rest waits.

    Args:
        config: the data file.
        spec: the model family.
        media: what the family's ``read_media_settings`` gives for this data file.
        seq_length: most tokens of a sample.
        seed: decides which records ``val_rate`` holds out.
        vocab_size: rows of the model's word embeddings; None: token ids are not compared with it.

    Raises:
        UserError: for anything in the files that cannot be trained on.
    """
    basic = config.dataset_param.basic_parameters
    _refuse_repeated_files(basic.dataset_files, basic.val_rate)
    for line in _repeated_files(basic.dataset_files, basic.val_dataset_files):
        logger.warning(line, extra=_RANK_0_ONLY)
    compiled_resampling()  # here once, instead of in every worker process

    def load(datasets: Sequence[NamedDataset]) -> ChatDataset:
        sources = [Source(one.config, one.files, one.limit, spec, media, seq_length) for one in datasets]
        rows, name = [_rows(source) for source in sources], ", ".join(source.names for source in sources)
        if not datasets[0].name:
            return ChatDataset(rows[0], media, name, vocab_size=vocab_size)
        parts = [(one.name, len(of_one)) for one, of_one in zip(datasets, rows, strict=True)]
        return ChatDataset(ConcatenatedRows(rows), media, name, vocab_size=vocab_size, parts=parts)

    train = load(config.train_datasets)
    if basic.val_dataset_files:
        return _mix(train, config, train.places(), seed=seed), _interleaved(load(config.val_datasets))
    kept, held_out = _hold_out(train, basic.val_rate or 0.0, seed=seed)
    if basic.val_rate and not any(map(len, held_out)):
        none = "val_rate %s of %d samples holds out no sample: nothing is evaluated"
        logger.warning(none, basic.val_rate, len(train), extra=_RANK_0_ONLY)
    elif basic.val_rate:
        for name, places in zip(train.channels, held_out, strict=False):
            if not len(places):
                none = "val_rate %s holds out no sample of data set %s"
                logger.warning(none, basic.val_rate, name, extra=_RANK_0_ONLY)
    if not all(map(len, kept)):
        raise UserError(f"val_rate {basic.val_rate} leaves nothing of {len(train)} samples to train on; lower it")
    held = mixture.interleave([places[: basic.val_max_samples] for places in held_out])
    evaluated = train.subset(held, f"val_rate of {train.name}") if len(held) else None
    return _mix(train, config, kept, seed=seed), evaluated


def _interleaved(dataset: ChatDataset) -> ChatDataset:
    """The data sets evenly mixed, so that a part of an evaluation has all of them in their shares."""
    return dataset.subset(mixture.interleave(dataset.places()), dataset.name) if dataset.channels else dataset


def _hold_out(dataset: ChatDataset, rate: float, *, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each data set the samples to train on, and those to evaluate on: a fraction ``rate`` of it, at random."""
    kept, held_out = [], []
    for name, places in zip(dataset.channels or ("",), dataset.places(), strict=True):
        if name:
            order = mixture.ordered(name, len(places), seed=seed, number=0)
        else:
            order = permutation(len(places), seed=seed, epoch=None)
        count = round(len(places) * rate)
        held_out.append(places[np.sort(order[:count])])
        kept.append(places[np.sort(order[count:])])
    return kept, held_out


def _mix(dataset: ChatDataset, config: DataConfig, places: Sequence[np.ndarray], *, seed: int) -> ChatDataset:
    """The samples to train on, in the shares that the data file asks for.

    Args:
        dataset: all samples.
        config: the data file.
        places: of each data set, the samples to train on.
        seed: decides which ones an epoch uses.

    Raises:
        UserError: if a data set's weight leaves nothing of it.
    """
    if not dataset.channels:
        return dataset if len(places[0]) == len(dataset) else dataset.subset(places[0], dataset.name)
    basic = config.dataset_param.basic_parameters
    parts = mixture.parts_of(config, [len(of_one) for of_one in places])
    counts = mixture.samples_per_epoch(parts, all_exhausted=basic.stopping_strategy == "all_exhausted")
    epochs = mixture.epochs_of(parts, counts, seed=seed, shuffle=config.dataloader_param.shuffle)
    for line in mixture.describe(parts, counts, epochs=len(epochs)):
        logger.info(line, extra=_RANK_0_ONLY)
    chosen = np.concatenate(places)[np.concatenate(epochs)]
    return dataset.subset(chosen, dataset.name, epoch_sizes=tuple(map(len, epochs)))


def _refuse_repeated_files(files: Sequence[str], val_rate: float | None) -> None:
    """A file that is named twice would have records held out under one name and trained on under the other."""
    real = [os.path.realpath(path) for path in files]
    twice = next((path for path, name in zip(files, real, strict=True) if real.count(name) > 1), None)
    if val_rate and twice is not None:
        raise UserError(
            f"dataset names {twice} more than once, so that val_rate {val_rate} would hold out records that are "
            "trained on; name it once, or set val_dataset instead"
        )


def _repeated_files(train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """What to say of data files that are named more than once."""
    real = [os.path.realpath(path) for path in train]
    twice = sorted({path for path, name in zip(train, real, strict=True) if real.count(name) > 1})
    both = [path for path in held_out if os.path.realpath(path) in real]
    return [
        *(f"dataset names {path} more than once: its records count as often" for path in twice),
        *(f"{path} is trained on and evaluated on: its evaluation says nothing of other data" for path in both),
    ]


def _rows(source: Source) -> Rows:
    """The samples, prepared beforehand or on the fly as the data file says."""
    basic = source.config.dataset_param.basic_parameters
    if basic.streaming:
        return TokenizedOnTheFly(Streamed(source), _encoder(source))
    if basic.preprocess_on_fly:
        return TokenizedOnTheFly(prepare_records(source), _encoder(source))
    return prepare_dataset(source)


def _encoder(source: Source) -> Encoder:
    encoder = make_encoder(source)
    if encoder.warning:
        logger.info("%s: %s", source.names, encoder.warning)
    return encoder
