"""Micro-batches for one rank: worker processes decode and pack while the device computes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mindspeed_mm.backend.worker_signals import ignore_group_signals
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.data.dataset import ChatDataset, SkippedSample
from mindspeed_mm.data.encoder import Outcome
from mindspeed_mm.data.packing import PackedSampler, pack_epochs
from mindspeed_mm.data.sampler import RankSampler, SampleStream
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import reason, shorten
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.spec import ModelSpec

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import DataConfig

_PREFETCHED_PER_WORKER = 4
_REMEDY_SHM = "enlarge /dev/shm (docker run --shm-size=64g), or lower --num-workers"
_PADDING = -1  # index of a sample that only gives this rank as many micro-batches as the rest


@dataclasses.dataclass(frozen=True)
class SkipReport:
    """Skipped samples, by reason; a stand-in without target tokens takes their place in the batch.

    Attributes:
        unusable: file, sample and reason of each that could not be used.
        too_long: number whose first turn is too long, found while training (``preprocess_on_fly``, ``streaming``).
        no_target: number without a target token, found likewise.
    """

    unusable: tuple[str, ...] = ()
    too_long: int = 0
    no_target: int = 0

    def __add__(self, other: SkipReport) -> SkipReport:
        """The skipped samples of both."""
        return SkipReport(
            self.unusable + other.unusable, self.too_long + other.too_long, self.no_target + other.no_target
        )


@dataclasses.dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one optimizer step.

    Attributes:
        batches: micro-batches, of the same number on every rank.
        skipped: samples that take no part.
        tokens: of all micro-batches, before they are split within a context-parallel group.
        samples: conversations in all micro-batches.
        failure: why the data could not be loaded; the micro-batches are then stand-ins, in this step and in all later
            ones.
    """

    batches: list[Batch]
    skipped: SkipReport = SkipReport()
    tokens: int = -1
    samples: int = -1
    failure: str = ""

    def __post_init__(self) -> None:
        """Count tokens and samples while the micro-batches are whole."""
        if self.tokens < 0:
            object.__setattr__(self, "tokens", sum(batch.num_tokens for batch in self.batches))
        if self.samples < 0:
            object.__setattr__(self, "samples", sum(len(batch.sample_ids) for batch in self.batches))


def _stand_in(index: int) -> Sample:
    """One token and no target: takes the place of a skipped sample without taking part in the loss."""
    return Sample(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), (), index)


class _MicroBatches(torch.utils.data.Dataset):
    """Indices of a micro-batch in, its Batch out. Runs in the worker processes.

    An unusable sample never raises here: the other ranks would wait for this one in a collective. The reason travels
    with the batch, and all ranks decide together.
    """

    def __init__(self, dataset: ChatDataset, spec: ModelSpec, model_config: Any) -> None:
        self._dataset = dataset
        self._spec = spec
        self._model_config = model_config

    def __getitem__(self, indices: Sequence[int]) -> _MicroBatch:
        skipped = SkipReport()
        samples: list[Sample] = []
        for index in indices:
            sample = _stand_in(index)
            if index != _PADDING:
                try:
                    sample = self._dataset[index]
                except SkippedSample as skip:
                    too_long = skip.outcome == Outcome.TOO_LONG
                    skipped += SkipReport(too_long=int(too_long), no_target=int(not too_long))
                except UserError as error:
                    skipped += SkipReport((str(error),))
            samples.append(sample)
        return self._in_shared_memory(self._collate_usable(samples, skipped))

    def stand_in(self) -> Batch:
        """A micro-batch without a target token."""
        return self._collate([_stand_in(_PADDING)])

    def _in_shared_memory(self, part: _MicroBatch) -> _MicroBatch:
        """Move a worker's tensors to shared memory; without enough of it, return the reason instead.

        DataLoader would move them in the queue's feeder thread, where a failure loses the batch, and the rank waits for
        it forever.
        """
        if torch.utils.data.get_worker_info() is not None:
            try:
                part.batch.share_memory_()
            except (RuntimeError, OSError) as error:
                return _MicroBatch(failure=f"a data worker cannot hand over a batch: {shorten(error)}; {_REMEDY_SHM}")
        return part

    def _collate_usable(self, samples: list[Sample], skipped: SkipReport) -> _MicroBatch:
        """Collate, with stand-ins for samples that do not fit their placeholders."""
        try:
            return _MicroBatch(self._collate(samples), skipped)
        except UserError:  # one of them does not fit its placeholders: find out which
            for place, sample in enumerate(samples):
                try:
                    self._collate([sample])
                except UserError as error:
                    skipped += SkipReport((f"{self._dataset.describe(sample.index)}: {error}",))
                    samples[place] = _stand_in(sample.index)
            return _MicroBatch(self._collate(samples), skipped)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self._spec, self._model_config)


@dataclasses.dataclass(frozen=True)
class _MicroBatch:
    """One micro-batch on its way from a worker process, or why there is none."""

    batch: Batch | None = None
    skipped: SkipReport = SkipReport()
    failure: str = ""

    def pin_memory(self) -> _MicroBatch:
        """Copy with the batch in pinned memory; called by the DataLoader."""
        return self if self.batch is None else dataclasses.replace(self, batch=self.batch.pin_memory())


def _as_is(value: _MicroBatch) -> _MicroBatch:
    return value


def _worker_options(num_workers: int) -> dict[str, object]:
    if not num_workers:
        return {}
    return {
        "num_workers": num_workers, "persistent_workers": True, "prefetch_factor": _PREFETCHED_PER_WORKER,
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    del worker
    ignore_group_signals()
    # a batch that the queue's thread cannot send is lost, and would be waited for: let the rank see a dead worker
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


def _why_lost(error: BaseException, workers: Sequence[Any]) -> str:
    """One line if a worker process died, which may be known a moment later than the rank sees it; else empty."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(5.0)  # a process closes its files a moment before its status can be read
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        lost = isinstance(error, (EOFError, ConnectionError)) or "DataLoader worker" in str(error)
        return f"a data worker was lost ({shorten(repr(error))}); lower --num-workers" if lost else ""
    if codes[0] == -signal.SIGBUS:
        return f"a data worker found no shared memory left; {_REMEDY_SHM}"
    how = f"was ended by {signal.Signals(-codes[0]).name}" if codes[0] < 0 else f"ended with status {codes[0]}"
    return f"a data worker {how}; it may have run out of memory or of open files: lower --num-workers"


def _stop_workers(loader: DataLoader) -> None:
    iterator = getattr(loader, "_iterator", None)  # where DataLoader keeps persistent workers
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


class BatchLoader:
    """Iterates over steps.

    Attributes:
        dataset: the samples.
        samples_per_epoch: samples that one pass over them trains on, as ``--global-batch-size`` counts them.
        summary: the data set's size, for the log.
        close: stops the worker processes; called automatically when the loader or the program ends.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        sampler: Iterable[list[int]],
        *,
        spec: ModelSpec,
        model_config: Any,
        micro_batches: int,
        samples_per_epoch: int,
        summary: str,
        num_workers: int,
        pin_memory: bool,
        stop_at_bad_sample: bool = False,
    ) -> None:
        """Prepare to load; worker processes start with the iteration.

        Args:
            dataset: the samples.
            sampler: indices of each micro-batch, in order.
            spec: the model family.
            model_config: the family's.
            micro_batches: of a step.
            samples_per_epoch: samples of one pass.
            summary: see above.
            num_workers: processes that decode; 0 decodes in this process.
            pin_memory: copy batches into pinned memory if there is an accelerator.
            stop_at_bad_sample: a step with an unusable sample cannot be loaded, and none after it.
        """
        self.dataset = dataset
        self.samples_per_epoch = samples_per_epoch
        self.summary = summary
        self._micro_batches = micro_batches
        self._steps_in_all = len(sampler) // micro_batches if isinstance(sampler, Sized) else None
        self._stop_at_bad_sample = stop_at_bad_sample
        self._source = _MicroBatches(dataset, spec, model_config)
        self._loader = DataLoader(
            self._source,
            sampler=sampler,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_as_is,
            generator=torch.Generator(),  # otherwise each iteration advances the global one, which the model uses
            pin_memory=pin_memory and torch.accelerator.is_available(),
            **_worker_options(num_workers),  # type: ignore[arg-type]
        )
        # Without it each worker process delays the garbage collector or the interpreter's exit by 5 seconds.
        self.close = weakref.finalize(self, _stop_workers, self._loader)

    def __iter__(self) -> Iterator[StepBatches]:
        """Steps in order.

        What cannot be loaded, because a worker process died or cannot hand its batch over, raises nothing here: the
        other ranks would wait for this one in a collective. See ``StepBatches.failure``.
        """
        # torch has the main thread raise when a worker dies, wherever it is; the loader notices that, too
        former = signal.getsignal(signal.SIGCHLD)
        try:
            loaded: Any = iter(self._loader)
        except OSError as error:
            return self._steps(iter(()), f"the data workers cannot be started: {reason(error)}; {_REMEDY_SHM}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, former)
        return self._steps(loaded)

    def _steps(self, loaded: Iterator[_MicroBatch], failure: str = "") -> Iterator[StepBatches]:
        for _ in itertools.count() if self._steps_in_all is None else range(self._steps_in_all):
            parts: list[_MicroBatch] = []
            if not failure:
                try:
                    parts = list(itertools.islice(loaded, self._micro_batches))
                except (RuntimeError, EOFError, OSError) as error:  # which one depends on what the worker was sending
                    failure = _why_lost(error, getattr(loaded, "_workers", ()))
                    if not failure:
                        raise
                failure = failure or next((part.failure for part in parts if part.failure), "")
                if self._stop_at_bad_sample and not failure:
                    failure = _first_of([message for part in parts for message in part.skipped.unusable])
            if failure:
                parts = [_MicroBatch(self._source.stand_in())] * self._micro_batches
            skipped = sum((part.skipped for part in parts), SkipReport())
            yield StepBatches([part.batch for part in parts if part.batch is not None], skipped, failure=failure)


def _first_of(messages: Sequence[str]) -> str:
    """The first of the messages about unusable samples, with the number of the others; empty if there is none."""
    if not messages:
        return ""
    more = f" (and {len(messages) - 1} more in this step)" if len(messages) > 1 else ""
    return f'{messages[0]}{more}; fix it, or skip such samples with dataloader_param.on_bad_sample "skip"'


class TrainLoader(BatchLoader):
    """An endless BatchLoader: ``next(loader)`` gives the next step."""

    _iterator: Iterator[StepBatches] | None = None

    def start(self) -> None:
        """Start the worker processes, if they are not running yet."""
        if self._iterator is None:
            self._iterator = super().__iter__()

    def __next__(self) -> StepBatches:
        """The next step's micro-batches; the first call starts the worker processes."""
        self.start()
        assert self._iterator is not None
        return next(self._iterator)

    def __iter__(self) -> Iterator[StepBatches]:
        """Itself: there is one position in the stream."""
        return self


def build_train_loader(
    dataset: ChatDataset,
    config: DataConfig,
    *,
    spec: ModelSpec,
    model_config: Any,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
) -> TrainLoader:
    """This rank's endless training steps.

    Without packing a step holds ``global_batch_size`` samples and a micro-batch ``micro_batch_size`` of them. With
    packing both count sequences of up to ``seq_length`` tokens: a micro-batch is one pack of at most
    ``micro_batch_size * seq_length`` tokens, the same limit as without packing, and a step holds
    ``global_batch_size / micro_batch_size`` packs.

    Args:
        dataset: the training part of ``build_datasets``.
        config: the data file.
        spec: the model family.
        model_config: the family's.
        seq_length: most tokens of a sample.
        micro_batch_size: samples packed into a micro-batch.
        global_batch_size: samples of a step, over all ranks.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
        seed: decides the order of samples.
        consumed_samples: position in the stream to continue from.
        num_workers: processes that decode.

    Raises:
        UserError: for data that cannot be trained on.
    """
    options = config.dataloader_param
    per_round = micro_batch_size * dp_size
    assert global_batch_size % per_round == 0, "config.checks refuses other sizes"
    if config.dataset_param.basic_parameters.packing:
        budget = micro_batch_size * seq_length
        costs = dataset.costs()
        packs, sizes = pack_epochs(costs, dataset.epoch_sizes, budget=budget, seed=seed)
        cycle = len(sizes)
        summary = (
            f"{len(dataset) // cycle} samples in {len(packs) // cycle} packs of up to {budget} tokens, "
            f"{packs.fill:.1%} full; {len(dataset) / len(packs):.2f} samples per pack"
        )
        unit = micro_batch_size
        stream = SampleStream(sizes, global_batch_size // unit, seed, options.shuffle, options.drop_last, "packs")
        sampler: Iterable[list[int]] = PackedSampler(stream, packs, costs, dp_rank, dp_size, consumed_samples // unit)
    else:
        unit = 1
        sizes = dataset.epoch_sizes
        stream = SampleStream(sizes, global_batch_size, seed, options.shuffle, options.drop_last)
        sampler = RankSampler(stream, micro_batch_size, dp_rank, dp_size, consumed_samples)
        summary = f"{len(dataset) // len(sizes)} samples, {stream.samples_per_epoch} per epoch"
    return TrainLoader(
        dataset,
        sampler,
        spec=spec,
        model_config=model_config,
        micro_batches=global_batch_size // per_round,
        samples_per_epoch=stream.samples_per_epoch * unit,
        summary=summary,
        num_workers=num_workers,
        pin_memory=options.pin_memory,
        stop_at_bad_sample=not options.bad_sample_limit,
    )


def build_eval_loader(
    dataset: ChatDataset,
    config: DataConfig,
    *,
    spec: ModelSpec,
    model_config: Any,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> BatchLoader:
    """This rank's micro-batches of the evaluation data, one per step.

    Finite, unpacked, in the data set's order, and of the same number on every rank: a rank that runs out of samples
    gets one without target tokens. Arguments as in ``build_train_loader``.
    """
    return BatchLoader(
        dataset,
        _eval_indices(len(dataset), micro_batch_size, dp_rank, dp_size),
        spec=spec,
        model_config=model_config,
        micro_batches=1,
        samples_per_epoch=len(dataset),
        summary=f"{len(dataset)} samples",
        num_workers=num_workers,
        pin_memory=config.dataloader_param.pin_memory,
    )


def _eval_indices(size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    rounds = math.ceil(size / (micro_batch_size * dp_size))
    starts = [(place * dp_size + dp_rank) * micro_batch_size for place in range(rounds)]
    batches = [list(range(start, min(start + micro_batch_size, size))) for start in starts]
    return [batch or [_PADDING] for batch in batches]
