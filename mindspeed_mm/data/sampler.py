"""Which samples each micro-batch of each rank holds: a function of seed, epoch and index only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

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
        size: samples in the data set.
        global_batch_size: samples of an optimizer step.
        seed: decides the order.
        shuffle: whether each epoch has its own order; otherwise the data set's.
        drop_last: see above.
        things: name of the unit for messages: samples, or packs of samples.
    """

    size: int
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
        if not self.samples_per_epoch:
            raise UserError(
                f"the data set has {self.size} {self.things}, fewer than the {self.global_batch_size} of a step "
                "(--global-batch-size); lower it, or set drop_last to false"
            )

    @property
    def samples_per_epoch(self) -> int:
        """Samples that one epoch contributes to the stream."""
        if self.drop_last:
            return self.size // self.global_batch_size * self.global_batch_size
        return self.size

    def __getitem__(self, place: int) -> int:
        """Data set index of the sample at ``place`` (from 0) of the stream."""
        epoch, offset = divmod(place, self.samples_per_epoch)
        return int(self._order(epoch)[offset]) if self.shuffle else offset

    def _order(self, epoch: int) -> np.ndarray:
        return _cached_permutation(self.size, self.seed, epoch)


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
