"""What an optimizer step leaves behind: numbers that stay on the device until somebody wants to read them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.backend.transfer import DeferredHostRead, DeviceEvent, copy_to_device
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.qwen3_vl.model import ModelOutput
from mindspeed_mm.training.gradients import GradientNorm


class StepSums(NamedTuple):
    """Summed over micro-batches and processes in one reduction, in fp32.

    Attributes:
        loss: cross-entropy.
        router_loss: what the auxiliary loss adds to it, coefficient included.
        tokens: text and vision tokens.
        supervised: tokens that the loss counts.
        samples: conversations.
        bad: samples that could not be used.
        stop: processes that were asked to stop.
        teraflop: 10^12 floating-point operations of forward and backward.
    """

    loss: float = 0.0
    router_loss: float = 0.0
    tokens: float = 0.0
    target_tokens: float = 0.0
    samples: float = 0.0
    bad: float = 0.0
    stop: float = 0.0
    teraflop: float = 0.0


class SampleLosses(NamedTuple):
    """The losses of a micro-batch's tokens on this process, on the device.

    Attributes:
        sample_ids: dataset index of each sample.
        label_sample: int64 [S], the sample of each supervised token.
        token_losses: fp32 [S].
    """

    sample_ids: list[int]
    label_sample: Tensor
    token_losses: Tensor


class StepTotals:
    """Collects a step's sums on the device; counts that the host knows travel there with the first."""

    def __init__(self, counts: StepSums, device: torch.device) -> None:
        """``counts``: this process's part of each sum; losses begin at 0."""
        self._sums = copy_to_device(counts, device)
        self._samples: list[SampleLosses] = []

    def add(self, batch: Batch, output: ModelOutput, router_loss: Tensor | None) -> None:
        """Count one micro-batch."""
        self._sums[0] += output.loss.detach()
        if router_loss is not None:
            self._sums[1] += router_loss.detach()
        self._samples.append(SampleLosses(batch.sample_ids, batch.label_sample, output.token_losses))

    def reduce(self, *, stop: bool) -> None:
        """Sum over all processes; ``stop``: whether this one has been asked to, up to now."""
        if stop:
            self._sums[StepSums._fields.index("stop")] += 1.0
        dist.all_reduce(self._sums)

    def is_finite(self, norm: Tensor) -> Tensor:
        """Bool scalar, the same on all processes: whether the parameters may take the step. Where ``norm`` is, so that
        the host waits for the loss if it is what steps.
        """
        return torch.isfinite(self._sums[0]).to(norm.device) & torch.isfinite(norm)

    def result(self, norm: GradientNorm, *, has_router_loss: bool, bad_messages: Sequence[str]) -> StepResult:
        """Send the sums to the host, without waiting for them."""
        numbers = DeferredHostRead(torch.cat((self._sums, norm.total.to(self._sums.device).view(1))))
        return StepResult(
            numbers, has_router_loss=has_router_loss, bad_messages=bad_messages, samples=tuple(self._samples),
            gradient_norms=norm.parts,
        )


@dataclasses.dataclass(frozen=True)
class _Values:
    sums: StepSums
    grad_norm: float


class StepResult:
    """Outcome of one optimizer step. Whoever reads a number waits until the device has made it.

    Numbers are the same on every rank; messages and samples are this rank's.
    """

    def __init__(
        self,
        numbers: DeferredHostRead,
        *,
        has_router_loss: bool,
        bad_messages: Sequence[str],
        samples: Sequence[SampleLosses] = (),
        gradient_norms: Sequence[tuple[list[nn.Parameter], Tensor]] = (),
    ) -> None:
        """``numbers``: :class:`StepSums`, then the norm of the gradients; ``samples``: of each micro-batch.

        ``gradient_norms``: of this process's parts, see :class:`GradientNorm`.
        """
        self._numbers = numbers
        self._has_router_loss = has_router_loss
        self.bad_messages = bad_messages
        self.samples = samples
        self.gradient_norms = gradient_norms

    @functools.cached_property
    def _values(self) -> _Values:
        *sums, norm = self._numbers.tolist()
        return _Values(StepSums(*sums), norm)

    @property
    def ready(self) -> DeviceEvent:
        """When the device has finished the step."""
        return self._numbers.ready

    @property
    def loss(self) -> float:
        """Cross-entropy of the step."""
        return self._values.sums.loss

    @property
    def router_loss(self) -> float | None:
        """What the auxiliary loss adds to it, coefficient included; None where there is none."""
        return self._values.sums.router_loss if self._has_router_loss else None

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self._values.grad_norm

    @property
    def tokens(self) -> int:
        """Text and vision tokens of the step."""
        return round(self._values.sums.tokens)

    @property
    def target_tokens(self) -> int:
        """Tokens that the loss counts."""
        return round(self._values.sums.target_tokens)

    @property
    def sample_count(self) -> int:
        """Conversations of the step."""
        return round(self._values.sums.samples)

    @property
    def bad(self) -> int:
        """Samples that could not be used."""
        return round(self._values.sums.bad)

    @property
    def stop(self) -> bool:
        """Whether any process was asked to stop before the end of this step."""
        return self._values.sums.stop > 0

    @property
    def teraflop(self) -> float:
        """10^12 floating-point operations of forward and backward, over all processes."""
        return self._values.sums.teraflop

    @property
    def skipped(self) -> bool:
        """Whether the parameters were left alone because the loss or a gradient was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    def sample_losses(self) -> dict[int, float]:
        """Dataset index -> sum of its token losses, of this rank's samples; for a step whose loss needs explaining."""
        sums: dict[int, float] = {}
        for sample_ids, label_sample, token_losses in self.samples:
            per_sample = torch.zeros(len(sample_ids), device=token_losses.device)
            per_sample.index_add_(0, label_sample, token_losses)
            for index, value in zip(sample_ids, per_sample.tolist(), strict=True):
                sums[index] = sums.get(index, 0.0) + value
        return sums
