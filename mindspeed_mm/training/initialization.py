"""Random initial weights that depend on the seed and the parameters' names only: equal to the bit in every layout and
on every device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from mindspeed_mm.checkpoint.shards import local_shard
from mindspeed_mm.models.lora import Adapter

BLOCK_ELEMENTS = 1 << 22
"""Numbers drawn at a time, 16 MiB in fp32. Every block has a generator of its own, so that a rank draws only the blocks
that its shard overlaps."""
Distribution = Callable[[str, tuple[int, ...]], tuple[float, float]]
"""(name, shape) of a parameter -> mean and standard deviation of its initial values."""


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""(shape, generator) -> random numbers in fp32."""


@torch.no_grad()
def initialize(
    model: nn.Module, distribution: Distribution, *, seed: int, names: Collection[str] | None = None
) -> None:
    """Fill parameters, in place.

    Args:
        model: sharded or not, with storage.
        distribution: normal, or constant where the standard deviation is 0.
        seed: of the run.
        names: of the parameters; None for all.
    """
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        mean, std = distribution(name, tuple(parameter.shape))
        if std == 0.0:
            parameter.fill_(mean)
        else:
            _fill(parameter, seed=f"{seed}/{name}", draw=functools.partial(_draw_normal, mean=mean, std=std))


@torch.no_grad()
def initialize_adapters(model: nn.Module, adapters: Sequence[Adapter], *, seed: int) -> None:
    """Fill adapters, in place, so that they change nothing yet: B is 0, and A uniform within 1 / sqrt(in).

    This is PEFT's initialization: Kaiming's with a = sqrt(5), over the inputs of one expert.
    """
    parameters = dict(model.named_parameters())
    for adapter in adapters:
        name, second = adapter.names
        draw = functools.partial(_draw_uniform, bound=1 / math.sqrt(adapter.inputs))
        _fill(parameters[name], seed=f"{seed}/{name}", draw=draw)
        parameters[second].zero_()


@torch.no_grad()
def copy_adapters(model: nn.Module, adapters: Sequence[Adapter], read: Callable[[str], Tensor]) -> None:
    """Fill adapters, in place, from whole tensors that ``read`` gives by name, one at a time."""
    parameters = dict(model.named_parameters())
    for name in (name for adapter in adapters for name in adapter.names):
        local, shard = local_shard(parameters[name])
        local.copy_(read(name)[tuple(slice(*rows) for rows in shard)])


def _fill(parameter: nn.Parameter, *, seed: str, draw: Draw) -> None:
    local, ((begin, end), *inner) = local_shard(parameter)
    rows, row = parameter.shape[0], tuple(parameter.shape[1:])
    step = max(1, BLOCK_ELEMENTS // math.prod(row))
    for first in range(begin // step * step, end, step):
        block = draw((min(step, rows - first), *row), _generator(f"{seed}/{first}"))
        low, high = max(begin, first), min(end, first + step)
        index = (slice(low - first, high - first), *(slice(start, stop) for start, stop in inner))
        local[low - begin : high - begin].copy_(block[index])


def _generator(seed: str) -> torch.Generator:
    """On the CPU."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw_normal(shape: tuple[int, ...], generator: torch.Generator, *, mean: float, std: float) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std).add_(mean)


def _draw_uniform(shape: tuple[int, ...], generator: torch.Generator, *, bound: float) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
