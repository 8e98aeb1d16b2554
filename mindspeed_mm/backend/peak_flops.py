"""How fast a device multiplies matrices: what a model's speed is compared with."""

from __future__ import annotations

import statistics
import time

import torch

from mindspeed_mm.backend.device import Backend


def measure_peak_tflops(
    backend: Backend, dtype: torch.dtype, *, size: int | None = None, seconds: float = 1.0
) -> float:
    """10^12 operations per second of one large product [size, size] x [size, size], the median of several.

    Args:
        backend: the device.
        dtype: of the factors.
        size: 8192 on an accelerator, 1024 on a CPU by default.
        seconds: about which to measure, after a first product that does not count.
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
