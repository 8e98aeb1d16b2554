"""Metrics of optimizer steps: named scalars that stay on the device, are reduced together and read one step late."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.backend.transfer import DeferredHostRead, DeviceEvent, copy_to_device


class StepMetrics:
    """The metrics of one optimizer step, by name.

    ``add`` sums over micro-batches and, in the one reduction of ``reduce``, over ranks. ``set`` takes what is the same
    on every rank already. Every rank must add and set the same names.
    """

    def __init__(self, device: torch.device) -> None:
        """``device`` holds the scalars."""
        self._device = device
        self._local: dict[str, Tensor | float] = {}
        self._sums: dict[str, Tensor] = {}
        self._common: dict[str, Tensor] = {}
        self._host: DeferredHostRead | None = None
        self._names: list[str] = []
        self._values: dict[str, float] | None = None

    def add(self, name: str, value: Tensor | float) -> None:
        """Add this rank's part of a sum: a tensor on the device, or a number that the host knows.

        A tensor that is no scalar is reduced like one, but not read.
        """
        assert not self._sums, "add() before reduce()"
        if isinstance(value, Tensor):
            value = value.detach()
        self._local[name] = self._local[name] + value if name in self._local else value

    def reduce(self) -> None:
        """Sum over ranks what was added, in fp32 and in one reduction; the host's numbers travel in the same tensor."""
        on_device = {name: value for name, value in self._local.items() if isinstance(value, Tensor)}
        on_host = {name: value for name, value in self._local.items() if name not in on_device}
        parts = [value.float().flatten() for value in on_device.values()]
        sums = torch.cat([*parts, copy_to_device(list(on_host.values()), self._device)])
        dist.all_reduce(sums)
        shapes = [value.shape for value in on_device.values()] + [torch.Size()] * len(on_host)
        split = sums.split([shape.numel() for shape in shapes])
        of_name = zip([*on_device, *on_host], split, shapes, strict=True)
        self._sums = {name: part.view(shape) for name, part, shape in of_name}

    def set(self, name: str, value: Tensor) -> None:
        """Add a scalar that is the same on every rank, on any device."""
        assert self._host is None, "set() before send()"
        self._common[name] = value.detach()

    def __contains__(self, name: str) -> bool:
        """Whether it was added."""
        return name in self._local

    def __getitem__(self, name: str) -> Tensor:
        """fp32 on the device, summed over ranks."""
        return self._sums[name]

    def send(self) -> None:
        """Queue the copy to the host, without waiting for it."""
        common = {name: value.to(self._device, torch.float32) for name, value in self._common.items()}
        scalars = {name: value for name, value in self._sums.items() if value.dim() == 0} | common
        self._names = list(scalars)
        self._host = DeferredHostRead(torch.stack(list(scalars.values())))

    @property
    def ready(self) -> DeviceEvent:
        """When the device has finished the step."""
        assert self._host is not None, "send() first"
        return self._host.ready

    def read(self) -> dict[str, float]:
        """Name -> value, the same on every rank. Synchronises with the device the first time."""
        if self._values is None:
            assert self._host is not None, "send() first"
            self._values = dict(zip(self._names, self._host.tolist(), strict=True))
        return self._values


class SampleLosses(NamedTuple):
    """Token losses of a micro-batch on this rank, on the device.

    Attributes:
        sample_ids: dataset index of each sample.
        label_sample: int64 [S], the sample of each target token.
        token_losses: fp32 [S].
    """

    sample_ids: list[int]
    label_sample: Tensor
    token_losses: Tensor


class StepDetails(NamedTuple):
    """This rank's part of a step, kept for reports. Reading a tensor synchronises with the device.

    Attributes:
        samples: of each micro-batch.
        gradient_norms: parameters and the norms of this rank's shards of their gradients, see ``GradientNorm``.
        skipped_messages: file, sample and reason of each skipped sample.
        failure: why this rank's data could not be loaded.
    """

    samples: tuple[SampleLosses, ...] = ()
    gradient_norms: tuple[tuple[list[nn.Parameter], Tensor], ...] = ()
    skipped_messages: tuple[str, ...] = ()
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class QueuedStep:
    """A step that the device may still be working on.

    Attributes:
        iteration: from 1.
        known: metrics that the host knows without the device.
        metrics: the others, on their way to the host.
        details: this rank's part of the step.
    """

    iteration: int
    known: Mapping[str, float]
    metrics: StepMetrics
    details: StepDetails


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step whose metrics have been read.

    Attributes:
        iteration: from 1.
        metrics: by name. Equal on all ranks, but for ``seconds``, ``data_wait_seconds``, the rates made of them and
            ``peak_memory_gib``, which are this rank's.
        details: this rank's part of the step.
    """

    iteration: int
    metrics: dict[str, float]
    details: StepDetails = StepDetails()


class StepReader:
    """Turns queued steps into records, in order and at most ``lag`` steps late.

    An accelerator's step is read when the next one is queued already, so that the device never waits for the host. Its
    seconds are the device's own, from the end of one step to the end of the next, whenever the host reads them.
    """

    def __init__(self, *, lag: int, mark: Callable[[], DeviceEvent]) -> None:
        """``lag``: steps that may be in flight when another is read; 0 reads each at once. ``mark`` makes an event."""
        self._lag = lag
        self._mark = mark
        self._queued: collections.deque[QueuedStep] = collections.deque()
        self._previous = mark()

    def add(self, step: QueuedStep) -> Iterator[StepRecord]:
        """Take a step that was queued; yields the records that are due."""
        self._queued.append(step)
        return self._read(keep=self._lag)

    def flush(self) -> Iterator[StepRecord]:
        """Yields all records that are left; synchronises with the device."""
        return self._read(keep=0)

    def restart_clock(self) -> None:
        """Start the next step's time now, when all are read: the time since the last one belongs to no step."""
        self._previous = self._mark()

    def _read(self, *, keep: int) -> Iterator[StepRecord]:
        while len(self._queued) > keep:
            step = self._queued.popleft()
            metrics = {**step.known, **step.metrics.read()}
            ready, previous = step.metrics.ready, self._previous
            self._previous = ready
            yield StepRecord(step.iteration, {**metrics, "seconds": ready.seconds_since(previous)}, step.details)


def gather_messages(own: Sequence[str]) -> list[str]:
    """The messages of all ranks, each once: those of a context-parallel group meet the same samples. A collective."""
    gathered: list[Sequence[str]] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, list(own))
    return list(dict.fromkeys(message for messages in gathered for message in messages))


def rates_per_device(metrics: Mapping[str, float], *, devices: int, peak_tflops: float | None) -> dict[str, float]:
    """Speed of a step, or of a sum over steps, for one device.

    Args:
        metrics: with ``seconds``, ``tokens``, ``target_tokens`` and ``tflop``.
        devices: number of ranks.
        peak_tflops: 10^12 operations per second that a device could do, for ``mfu``; None to leave that out.
    """
    by_time = 1.0 / (max(1e-9, metrics["seconds"]) * devices)
    rates = {
        "tokens_per_second_per_device": metrics["tokens"] * by_time,
        "target_tokens_per_second_per_device": metrics["target_tokens"] * by_time,
        "tflop_per_second_per_device": metrics["tflop"] * by_time,
    }
    if peak_tflops:
        rates["mfu"] = rates["tflop_per_second_per_device"] / peak_tflops
    return rates
