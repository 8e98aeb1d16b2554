"""Collectives that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames both, and warns of the names that torch 2.7 has
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.splits
        returned = grad.new_empty(sum(send), *grad.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), send, receive, group=ctx.group)
        return returned, None, None, None


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0 of ``group``, the next ``send[1]`` to rank 1, and so on.

    Args:
        rows: [sum(send), ...].
        send: number of rows for each rank.
        receive: number of rows from each rank.
        group: the ranks that take part.

    Returns:
        [sum(receive), ...], in the order of the senders.
    """
    return _AllToAll.apply(rows, send, receive, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
        _gather(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        _reduce_scatter(own, grad.contiguous(), group=ctx.group)
        return own, None


def all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, ...], R equal on all ranks -> [R * size, ...] in the order of the ranks."""
    return _AllGather.apply(rows, group)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values; gradients that flow back are multiplied by ``factor``."""
    return _ScaleGradient.apply(tensor, factor)
