"""Which samples each micro-batch of each rank holds: a function of seed, epoch and index only."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np

from mindspeed_mm.errors import UserError


def permutation(size: int, *, seed: int, epoch: int | None) -> np.ndarray:
    """An order of ``size`` samples: int64 [size].

    NumPy guarantees RandomState's streams across versions, which it does not for its newer generators, and a run may be
    resumed under another NumPy.

    Args:
        size: number of samples.
        seed: of the run.
        epoch: number of the pass over the data; None for the choice of held-out samples.
    """
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0 if epoch is None else epoch + 1]
    return np.random.RandomState(words).permutation(size).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class SampleStream:
    """The endless sequence of samples that the ranks train on together.

    Epochs follow each other. With ``drop_last`` an epoch ends after its last whole global batch, and the remaining
    samples are dropped (others in every epoch, when shuffled); without it a batch may hold samples of two epochs.

    Attributes:
        sizes: samples of each epoch of a cycle, which lie one after the other in the data set: of most data sets one
            epoch, all samples.
        global_batch_size: samples of an optimizer step.
        seed: decides the order.
        shuffle: whether each epoch has its own order; otherwise the data set's.
        drop_last: see above.
        things: name of the unit for messages: samples, or packs of samples.
    """

    sizes: tuple[int, ...]
    global_batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    things: str = "samples"

    def __post_init__(self) -> None:
        """Refuse a data set that cannot fill one batch.

        Raises:
            UserError: naming both sizes.
        """
        shortest = min(self.sizes)
        if not self._used(shortest):
            raise UserError(
                f"the data set has {shortest} {self.things}, fewer than the {self.global_batch_size} of a step "
                "(--global-batch-size); lower it, or set drop_last to false"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch contributes to the stream; the mean over a cycle."""
        return self._ends[-1] // len(self.sizes)

    def __getitem__(self, place: int) -> int:
        """Data set index of the sample at ``place`` (from 0) of the stream."""
        cycle, place = divmod(place, self._ends[-1])
        number = bisect.bisect_right(self._ends, place) - 1
        offset = place - self._ends[number]
        if self.shuffle:
            epoch = cycle * len(self.sizes) + number
            offset = int(_cached_permutation(self.sizes[number], self.seed, epoch)[offset])
        return self._starts[number] + offset

    def _used(self, size: int) -> int:
        return size // self.global_batch_size * self.global_batch_size if self.drop_last else size

    @cached_property
    def _ends(self) -> list[int]:
        """0, and where each epoch of the first cycle ends in the stream."""
        return [0, *itertools.accumulate(map(self._used, self.sizes))]

    @cached_property
    def _starts(self) -> list[int]:
        """Where each epoch's samples begin in the data set."""
        return [0, *itertools.accumulate(self.sizes)]


@lru_cache(maxsize=2)
def _cached_permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(size, seed=seed, epoch=epoch)


@dataclasses.dataclass(frozen=True)
class RankSampler:
    """One rank's micro-batches, without end.

    Step k takes places k*G to (k+1)*G of the stream (G the global batch size). Within a step, micro-batch m of rank r
    takes micro_batch_size places from (m * dp_size + r) * micro_batch_size. So the samples of a step do not depend on
    the number of ranks.

    Attributes:
        stream: the samples.
        micro_batch_size: samples of a micro-batch.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
        consumed_samples: samples of the stream that were trained on before; a multiple of G.
    """

    stream: SampleStream
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    consumed_samples: int = 0

    def __post_init__(self) -> None:
        """Check that each step ends with a whole round of the ranks' micro-batches."""
        assert self.stream.global_batch_size % (self.micro_batch_size * self.dp_size) == 0, "see config.checks"

    def __iter__(self) -> Iterator[list[int]]:
        """Data set indices of one micro-batch after the other."""
        place = self.consumed_samples + self.dp_rank * self.micro_batch_size
        while True:
            yield [self.stream[place + slot] for slot in range(self.micro_batch_size)]
            place += self.micro_batch_size * self.dp_size
