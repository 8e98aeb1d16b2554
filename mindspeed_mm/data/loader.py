"""Micro-batches for one rank: worker processes decode and pack while the device computes."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from mindspeed_mm.data.batch import Batch
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.dataset import ChatDataset, build_datasets
from mindspeed_mm.data.sampler import RankSampler, SampleStream
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.geometry import Qwen3VLGeometry

if TYPE_CHECKING:
    from mindspeed_mm.arguments.data_config import DataConfig

_PREFETCHED_PER_WORKER = 4
_PADDING = -1  # stands for a sample that only keeps this rank in step with the others


@dataclasses.dataclass(frozen=True)
class _Failure:
    """A mistake in the data, on its way from a worker process; raised there, it would arrive with a traceback."""

    message: str


class _MicroBatches(torch.utils.data.Dataset):
    """Indices of a micro-batch in, packed Batch out. Runs in the worker processes."""

    def __init__(self, dataset: ChatDataset, geometry: Qwen3VLGeometry) -> None:
        self._dataset = dataset
        self._geometry = geometry

    def __getitem__(self, indices: Sequence[int]) -> Batch | _Failure:
        try:
            return collate([self._sample(index) for index in indices], self._geometry)
        except UserError as error:
            return _Failure(str(error))

    def _sample(self, index: int) -> Sample:
        if index != _PADDING:
            return self._dataset[index]
        first = self._dataset[0]
        return dataclasses.replace(first, supervised=np.zeros_like(first.supervised))


def _as_is(value: Batch | _Failure) -> Batch | _Failure:
    return value


def _worker_count(num_workers: int) -> dict[str, object]:
    if not num_workers:
        return {}
    return {"num_workers": num_workers, "persistent_workers": True, "prefetch_factor": _PREFETCHED_PER_WORKER}


def _stop_workers(loader: DataLoader) -> None:
    iterator = getattr(loader, "_iterator", None)  # where DataLoader keeps persistent workers
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


class BatchLoader:
    """Iterates over micro-batches.

    Attributes:
        dataset: the samples.
        samples_per_epoch: samples that one pass over them trains on.
        close: call it to stop the worker processes; also happens by itself when the loader or the program ends.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        sampler: Iterable[list[int]],
        *,
        geometry: Qwen3VLGeometry,
        samples_per_epoch: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        """Prepare to load; worker processes start with the iteration.

        Args:
            dataset: the samples.
            sampler: indices of each micro-batch, in order.
            geometry: the model's, for packing.
            samples_per_epoch: samples of one pass.
            num_workers: processes that decode; 0 decodes in this process.
            pin_memory: put batches into page-locked memory, where there is an accelerator.
        """
        self.dataset = dataset
        self.samples_per_epoch = samples_per_epoch
        self._loader = DataLoader(
            _MicroBatches(dataset, geometry),
            sampler=sampler,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_as_is,
            generator=torch.Generator(),  # or each iteration would advance the global one, and with it the model's
            pin_memory=pin_memory and torch.accelerator.is_available(),
            **_worker_count(num_workers),  # type: ignore[arg-type]
        )
        # Left to the garbage collector or the interpreter's exit, each worker process holds them up for 5 seconds.
        self.close = weakref.finalize(self, _stop_workers, self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches in order.

        Raises:
            UserError: naming the sample and picture that cannot be used.
        """
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch


class TrainLoader(BatchLoader):
    """An endless BatchLoader: ``next(loader)`` gives one micro-batch after the other."""

    _iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        """The next micro-batch; the first call starts the worker processes."""
        if self._iterator is None:
            self._iterator = super().__iter__()
        return next(self._iterator)

    def __iter__(self) -> Iterator[Batch]:
        """Itself: there is one position in the stream."""
        return self


def build_train_loader(
    config: DataConfig,
    *,
    geometry: Qwen3VLGeometry,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
    dataset: ChatDataset | None = None,
) -> TrainLoader:
    """This rank's endless training micro-batches.

    Each optimizer step takes ``global_batch_size / (micro_batch_size * dp_size)`` of them.

    Args:
        config: the data file.
        geometry: the model's.
        seq_length: most tokens of a sample.
        micro_batch_size: samples packed into a micro-batch.
        global_batch_size: samples of a step, over all ranks.
        dp_rank: this rank among the ``dp_size`` that hold different data.
        dp_size: number of these ranks.
        seed: decides the order of samples.
        consumed_samples: where to go on in the stream.
        num_workers: processes that decode.
        dataset: the training part of ``build_datasets``, if it was built before.

    Raises:
        UserError: for data that cannot be trained on, and sizes that do not divide.
    """
    if dataset is None:
        dataset, _ = build_datasets(config, geometry=geometry, seq_length=seq_length, seed=seed)
    options = config.dataloader_param
    stream = SampleStream(len(dataset), global_batch_size, seed, options.shuffle, options.drop_last)
    sampler = RankSampler(stream, micro_batch_size, dp_rank, dp_size, consumed_samples)
    return TrainLoader(
        dataset,
        sampler,
        geometry=geometry,
        samples_per_epoch=stream.samples_per_epoch,
        num_workers=num_workers,
        pin_memory=options.pin_memory,
    )


def build_eval_loader(
    config: DataConfig,
    *,
    geometry: Qwen3VLGeometry,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    num_workers: int = 0,
    dataset: ChatDataset | None = None,
) -> BatchLoader | None:
    """This rank's micro-batches of the evaluation data, or None where the data file names none.

    Finite, in the data set's order, and of the same number on every rank: a rank that runs out of samples gets one
    with nothing supervised. Arguments as in ``build_train_loader``.
    """
    if dataset is None:
        _, dataset = build_datasets(config, geometry=geometry, seq_length=seq_length, seed=seed)
    if dataset is None:
        return None
    return BatchLoader(
        dataset,
        _eval_indices(len(dataset), micro_batch_size, dp_rank, dp_size),
        geometry=geometry,
        samples_per_epoch=len(dataset),
        num_workers=num_workers,
        pin_memory=config.dataloader_param.pin_memory,
    )


def _eval_indices(size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    rounds = math.ceil(size / (micro_batch_size * dp_size))
    starts = [(place * dp_size + dp_rank) * micro_batch_size for place in range(rounds)]
    batches = [list(range(start, min(start + micro_batch_size, size))) for start in starts]
    return [batch or [_PADDING] for batch in batches]
