"""Mixtures of data sets: how often each one's samples are used per epoch, and which ones, as a function of the seed.

A mixture is resolved once into a cycle of epochs, each a list of indices into the concatenated data sets. Shuffling,
packing, streaming and resuming then work on indices as for a single data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_mm.data.record_files import fingerprint
from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import DataConfig

_LONGEST_CYCLE = 2_000_000  # samples; they are packed when the run starts
_MOST_SAMPLES = 100_000_000  # of an epoch: 8 bytes each, on every rank
_MOST_ORDERS = 1000  # of passes over one data set; then they are repeated
_UNEQUAL = 1e-3  # deviation from equal use that makes no longer cycle necessary


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
        name: of the data set.
        size: samples that it has for training.
        weight: share of the mixture; None where no data set has one.
        repeat: times that each sample is used per epoch, without weights.
    """

    name: str
    size: int
    weight: float | None = None
    repeat: float = 1.0


def parts_of(config: DataConfig, sizes: Sequence[int]) -> list[Part]:
    """The data sets that a data file mixes, with the given numbers of samples."""
    return [
        Part(one.name, size, one.weight, one.repeat) for one, size in zip(config.train_datasets, sizes, strict=True)
    ]


def data_fingerprint(config: DataConfig) -> str:
    """Digest of the data files, and of the shares in which a mixture takes their samples."""
    basic = config.dataset_param.basic_parameters
    of_files = fingerprint(basic.dataset_files)
    if isinstance(basic.dataset, str):
        return of_files
    shares = [(one.name, one.weight, one.repeat, one.limit) for one in config.train_datasets]
    text = json.dumps([shares, basic.stopping_strategy])
    return f"{of_files}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def samples_per_epoch(parts: Sequence[Part], *, all_exhausted: bool = False) -> list[int]:
    """Number of samples that each data set contributes to an epoch.

    With weights, an epoch of N samples has ``N * weight / (sum of weights)`` of each. N is the largest for which no
    data set repeats a sample, or with ``all_exhausted`` the smallest for which each data set is used as a whole.

    Raises:
        UserError: if a data set contributes nothing, or an epoch has too many samples.
    """
    if parts[0].weight is None:
        counts = [round(part.size * part.repeat) for part in parts]
    else:
        rounds = [part.size / part.weight for part in parts]  # type: ignore[operator] - all have a weight
        length = max(rounds) if all_exhausted else min(rounds)
        counts = [round(length * part.weight) for part in parts]  # type: ignore[operator]
    for part, count in zip(parts, counts, strict=True):
        setting = f"repeat {part.repeat:g}" if part.weight is None else f"weight {part.weight:g}"
        if not count:
            raise UserError(f"dataset {part.name}: {setting} leaves an epoch none of its {part.size} samples; raise it")
    if sum(counts) > _MOST_SAMPLES:
        largest, count = max(zip(parts, counts, strict=True), key=lambda pair: pair[1])
        remedy = f"lower repeat {largest.repeat:g} of {largest.name}, or its max_samples"
        if largest.weight is not None:
            remedy = "lower max_samples of the data sets with small weights"
            remedy = f"set stopping_strategy to first_exhausted, or {remedy}" if all_exhausted else remedy
        raise UserError(
            f"an epoch of the mixture has more than {_MOST_SAMPLES:,} samples, since {largest.name} is used "
            f"{count / largest.size:,.1f} times; {remedy}"
        )
    return counts


def epochs_of(parts: Sequence[Part], counts: Sequence[int], *, seed: int, shuffle: bool) -> list[np.ndarray]:
    """The cycle of epochs: for each the indices of its samples in the concatenated data sets.

    A data set of which an epoch uses a fraction gives other samples to each epoch of the cycle: all passes over it are
    laid end to end, each in its own order, and an epoch takes the next ``count``. Where an epoch takes the end of one
    pass and the beginning of the next, no sample is in both. After a cycle all samples of a data set have been used
    equally often, or nearly so where that takes more than ``_LONGEST_CYCLE`` samples, and more than twice as many as
    there are.

    Args:
        parts: the data sets.
        counts: what :func:`samples_per_epoch` gives.
        seed: of the run.
        shuffle: whether a pass over a data set has a random order. Without it an epoch is not shuffled later either:
            data sets with weights are interleaved evenly, those without follow each other.
    """
    length = _cycle(parts, counts)
    starts = np.cumsum([0, *(part.size for part in parts)])
    drawn = [
        start + _passes(part, count, length, seed=seed, shuffle=shuffle).reshape(length, count)
        for part, count, start in zip(parts, counts, starts, strict=False)
    ]
    epochs = np.concatenate(drawn, axis=1)
    if not shuffle and parts[0].weight is not None:
        return [interleave(np.split(epoch, np.cumsum(counts)[:-1])) for epoch in epochs]
    return list(epochs)


def _cycle(parts: Sequence[Part], counts: Sequence[int]) -> int:
    """Number of epochs after which the samples of each data set have been used equally often.

    If that is too long, the number for which the mean deviation from equal use, relative to the use, is least.
    """
    exact = math.lcm(*(part.size // math.gcd(part.size, count) for part, count in zip(parts, counts, strict=True)))
    most = max(1, max(_LONGEST_CYCLE, 2 * sum(part.size for part in parts)) // sum(counts))
    if exact <= most:
        return exact
    lengths = np.arange(1, most + 1)
    worst = np.zeros(len(lengths))
    for part, count in zip(parts, counts, strict=True):
        uses = lengths * count / part.size
        rest = uses - np.floor(uses)
        worst = np.maximum(worst, 2 * rest * (1 - rest) / uses)
    return int(np.argmax(worst <= max(worst.min(), _UNEQUAL))) + 1


def interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all, each part in its order and evenly spread over the whole."""
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(places, kind="stable")]


def ordered(name: str, size: int, *, seed: int, number: int) -> np.ndarray:
    """A random order of one data set's samples, which depends on no other data set: int64 [size].

    Args:
        name: of the data set.
        size: its number of samples.
        seed: of the run.
        number: of the pass over the data set, from 1; 0 for the choice of held-out samples.
    """
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, zlib.crc32(name.encode()), number]
    return np.random.RandomState(words).permutation(size).astype(np.int64)


def _passes(part: Part, count: int, length: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """What ``length`` epochs of ``count`` samples take of endless passes over a data set: int64 [length * count]."""
    passes = math.ceil(count * length / part.size)
    if not shuffle:
        return np.tile(np.arange(part.size), passes)[: count * length]
    different = min(passes, _MOST_ORDERS)
    orders = [ordered(part.name, part.size, seed=seed, number=number + 1) for number in range(different)]
    stream = np.concatenate([orders[number % different] for number in range(passes)]) if passes > 1 else orders[0]
    if count < part.size:
        for border in range(part.size, count * length, part.size):
            taken = stream[border // count * count : border]  # by the epoch that the border is in
            if len(taken):
                order = stream[border : border + part.size]
                again = np.isin(order, taken)
                first = np.flatnonzero(~again)[: count - len(taken)]
                later = np.delete(np.arange(part.size), first)
                stream[border : border + part.size] = np.concatenate([order[first], order[later]])
    return stream[: count * length]


def describe(parts: Sequence[Part], counts: Sequence[int], *, epochs: int) -> list[str]:
    """Lines for the log: each data set's samples, and what an epoch uses of them."""
    total = sum(counts)
    lines = [
        f"data set {part.name}: {part.size} samples, {count} per epoch ({count / total:.1%} of it), each "
        f"{count / part.size:.3g} times"
        for part, count in zip(parts, counts, strict=True)
    ]
    if epochs > 1:
        lines.append(f"mixture: other samples in each of {epochs} epochs of {total}, then again from the first")
    return lines


class ConcatenatedRows:
    """Rows of several data sets, one after the other; see ``dataset.Rows``.

    Attributes:
        files: data files of all.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        """Take the rows of each data set."""
        self._parts = parts
        self._ends = np.cumsum([0, *map(len, parts)])
        self._file_ends = np.cumsum([0, *(len(part.files) for part in parts)])
        self.files = [file for part in parts for file in part.files]

    @property
    def has_videos(self) -> bool:
        """Whether a row has a video."""
        return any(part.has_videos for part in self._parts)

    @cached_property
    def table(self) -> Any:
        """The tokenized columns of all, a ``pyarrow`` table; None if some are tokenized on the fly."""
        import pyarrow

        tables = [getattr(part, "table", None) for part in self._parts]
        return None if None in tables else pyarrow.concat_tables([table.replace_schema_metadata() for table in tables])

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row."""
        part, row = self._place(index)
        return self._parts[part][row]

    def origin(self, index: int) -> tuple[int, int]:
        """Number of a row's data file, and its record's index in that file."""
        part, row = self._place(index)
        file, record = self._parts[part].origin(row)
        return int(self._file_ends[part]) + file, record

    def find(self, file: int, record: int) -> int | None:
        """The row of a record; None if there is none."""
        part = int(np.searchsorted(self._file_ends, file, side="right")) - 1
        row = self._parts[part].find(file - int(self._file_ends[part]), record)
        return None if row is None else int(self._ends[part]) + row

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return part, index - int(self._ends[part])
