"""Norm and clipping of gradients that are sharded over different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Group tensors by the mesh they are sharded over; operations on lists of DTensors cannot mix meshes."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return list(groups.values())


class GradientNorm(NamedTuple):
    """Norms of a step's gradients, on the gradients' device: with ``offload_to_cpu`` the host.

    Attributes:
        total: fp32 scalar, of all gradients together, the same on all ranks.
        parts: n parameters, and [n] norms of this rank's shards of their gradients.
    """

    total: Tensor
    parts: list[tuple[list[nn.Parameter], Tensor]]


def total_norm(parameters: Sequence[nn.Parameter]) -> GradientNorm:
    """Euclidean norm of all gradients together.

    Each rank sums the squares of its shards, divided by the number of ranks that hold the same shard; one reduction
    over all ranks gives the total, whatever meshes the parameters are on.
    """
    groups: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[_holders(parameter.grad)].append(parameter)
    parts = [
        (group, torch.stack(torch._foreach_norm([local(p.grad) for p in group], dtype=torch.float32)))
        for group in groups.values()
    ]
    squares = [norms.square().sum() / holders for holders, (_, norms) in zip(groups, parts, strict=True)]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return GradientNorm(total.sqrt(), parts)


def clip_factor(max_norm: float, norm: Tensor) -> Tensor:
    """What to multiply all gradients by, fp32 scalar: ``max_norm / norm`` where ``norm``, their total, is larger."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _holders(tensor: Tensor) -> int:
    """Number of ranks that hold the same shard of a tensor: all of them where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    holders = 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            holders *= tensor.device_mesh.size(axis)
    return holders
