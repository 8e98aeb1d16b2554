"""Measured peak FLOP/s of a device, for the model FLOPs utilisation."""

from __future__ import annotations

import statistics
import time

import torch

from mindspeed_mm.backend.device import Backend


def measure_peak_tflops(
    backend: Backend, dtype: torch.dtype, *, size: int | None = None, seconds: float = 1.0
) -> float:
    """TFLOP/s of a matrix product [size, size] x [size, size]: the median of several.

    Args:
        backend: the device.
        dtype: of the factors.
        size: default 8192 on an accelerator, 1024 on a CPU.
        seconds: duration of the measurement; the first product is warm-up.
    """
    size = size or (8192 if backend.is_accelerator else 1024)
    first, second = (torch.randn(size, size, device=backend.device).to(dtype) for _ in range(2))
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while len(rates) < 4 or time.perf_counter() < until:
        backend.synchronize()
        started = time.perf_counter()
        first @ second
        backend.synchronize()
        rates.append(2.0 * size**3 / (time.perf_counter() - started) / 1e12)
    return statistics.median(rates[1:])
