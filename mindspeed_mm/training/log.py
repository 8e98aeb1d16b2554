"""The training log: one line per interval, in the spelling that launchers and their users search for."""

from __future__ import annotations

import dataclasses
import datetime


@dataclasses.dataclass
class IntervalStats:
    """Sums over the iterations since the last line."""

    iterations: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    router_loss_sum: float | None = None
    tokens: int = 0
    samples: int = 0  # conversations; with packing more than --global-batch-size counts
    skipped: int = 0
    nan: int = 0
    waited: float = 0.0
    target_tokens: int = 0
    teraflop: float = 0.0

    def add(
        self,
        *,
        seconds: float,
        loss: float,
        tokens: int,
        samples: int,
        skipped: bool,
        nan: bool,
        router_loss: float | None = None,
        waited: float = 0.0,
        target_tokens: int = 0,
        teraflop: float = 0.0,
    ) -> None:
        """Count one iteration; a loss that is not finite stays visible as the next line's loss.

        ``waited`` is the part of ``seconds`` that it waited for data, the last field of the line, as a share.
        """
        self.iterations += 1
        self.seconds += seconds
        self.tokens += tokens
        self.samples += samples
        self.skipped += skipped
        self.nan += nan
        self.waited += waited
        self.target_tokens += target_tokens
        self.teraflop += teraflop
        self.loss_sum += loss
        if router_loss is not None:
            self.router_loss_sum = (self.router_loss_sum or 0.0) + router_loss

    @property
    def loss(self) -> float:
        """Mean loss of the interval, NaN if any was."""
        return self.loss_sum / max(1, self.iterations)


@dataclasses.dataclass(frozen=True)
class DeviceSpeed:
    """What the speed of a run is divided by and compared with.

    Attributes:
        devices: number of them.
        peak_tflops: 10^12 operations per second that one could do; None where nothing is compared.
        peak_memory_bytes: most that this process's has allocated so far; None to leave it out.
    """

    devices: int
    peak_tflops: float | None = None
    peak_memory_bytes: int | None = None

    def fields(self, stats: IntervalStats) -> list[str]:
        """Fields of the log line; each number is for one device."""
        by_time = 1.0 / (max(1e-9, stats.seconds) * self.devices)
        fields = [
            f"tokens/s per device: {stats.tokens * by_time:.1f}",
            f"supervised tokens/s per device: {stats.target_tokens * by_time:.1f}",
            f"TFLOP/s per device: {stats.teraflop * by_time:.4g}",
        ]
        if self.peak_tflops:
            fields.append(f"MFU: {100.0 * stats.teraflop * by_time / self.peak_tflops:.1f}%")
        if self.peak_memory_bytes is not None:
            fields.append(f"peak memory (GiB): {self.peak_memory_bytes / 2**30:.2f}")
        return fields


def format_line(
    stats: IntervalStats,
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    learning_rate: float,
    global_batch_size: int,
    grad_norm: float | None,
    log_tokens: bool,
    log_samples: bool = False,
    speed: DeviceSpeed | None = None,
    now: datetime.datetime | None = None,
) -> str:
    """The log line of an interval.

    Args:
        stats: the interval.
        iteration: last iteration of the interval, from 1.
        train_iters: number of iterations of the whole run.
        consumed_samples: samples consumed since the run began, over restarts; with packing, sequences.
        learning_rate: that the last iteration used.
        global_batch_size: samples per iteration; with packing, sequences.
        grad_norm: of the last iteration, None where it was not computed.
        log_tokens: whether to add the mean number of tokens, text and vision, of a sample (``--log-tps``).
        log_samples: whether to add the mean number of samples of an iteration, which packing makes vary.
        speed: adds the fields of :class:`DeviceSpeed` at the end.
        now: time stamp, the present by default.
    """
    now = now or datetime.datetime.now()
    per_iteration_ms = 1000.0 * stats.seconds / max(1, stats.iterations)
    fields = [
        f" [{now:%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{train_iters:8d}",
        f"consumed samples: {consumed_samples:12d}",
        f"elapsed time per iteration (ms): {per_iteration_ms:.1f}",
        f"learning rate: {learning_rate:.6E}",
        f"global batch size: {global_batch_size:5d}",
    ]
    if log_samples:
        fields.append(f"samples per iteration: {stats.samples / max(1, stats.iterations):.1f}")
    if log_tokens:
        fields.append(f"tokens per sample: {stats.tokens / max(1, stats.samples):.6E}")
    fields.append(f"loss: {stats.loss:.6E}")
    if stats.router_loss_sum is not None:
        fields.append(f"router aux loss: {stats.router_loss_sum / max(1, stats.iterations):.6E}")
    fields.append("loss scale: 1.0")
    if grad_norm is not None:
        fields.append(f"grad norm: {grad_norm:.3f}")
    fields += [
        f"number of skipped iterations: {stats.skipped:3d}",
        f"number of nan iterations: {stats.nan:3d}",
        f"data wait: {100.0 * stats.waited / max(1e-9, stats.seconds):.1f}%",
    ]
    if speed is not None:
        fields += speed.fields(stats)
    return " | ".join(fields) + " |"
