"""Random initial weights that depend on the seed and the parameters' names only: equal to the bit in every layout and
on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mindspeed_mm.checkpoint.shards import local_shard

BLOCK_ELEMENTS = 1 << 22
"""Numbers drawn at a time, 16 MiB in fp32. Every block has a generator of its own, so that a rank draws only the blocks
that its shard overlaps."""
Distribution = Callable[[str, tuple[int, ...]], tuple[float, float]]
"""(name, shape) of a parameter -> mean and standard deviation of its initial values."""


@torch.no_grad()
def initialize(model: nn.Module, distribution: Distribution, *, seed: int) -> None:
    """Fill all parameters, in place.

    Args:
        model: sharded or not, with storage.
        distribution: normal, or constant where the standard deviation is 0.
        seed: of the run.
    """
    for name, parameter in model.named_parameters():
        mean, std = distribution(name, tuple(parameter.shape))
        if std == 0.0:
            parameter.fill_(mean)
        else:
            _fill_normal(parameter, mean, std, seed=f"{seed}/{name}")


def _fill_normal(parameter: nn.Parameter, mean: float, std: float, *, seed: str) -> None:
    local, ((begin, end), *inner) = local_shard(parameter)
    rows, row = parameter.shape[0], tuple(parameter.shape[1:])
    step = max(1, BLOCK_ELEMENTS // math.prod(row))
    for first in range(begin // step * step, end, step):
        block = _draw((min(step, rows - first), *row), seed=f"{seed}/{first}").mul_(std).add_(mean)
        low, high = max(begin, first), min(end, first + step)
        index = (slice(low - first, high - first), *(slice(start, stop) for start, stop in inner))
        local[low - begin : high - begin].copy_(block[index])


def _draw(shape: tuple[int, ...], *, seed: str) -> Tensor:
    """Standard normal numbers in fp32, drawn on the CPU."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
