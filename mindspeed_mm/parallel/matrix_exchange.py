"""Whole matrices of sharded parameters, each on one rank: by all-to-all there and back.

The ranks of a group hold rows of the same matrices. Each matrix is given to one of them, so that none repeats
another's work, and a round moves no more than about ``LIMIT`` elements per rank, so that memory is bounded.

Legend: N leading axis of a shard (experts; 1 for a parameter of two axes), R x C a whole matrix, r rows of one rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mindspeed_mm.parallel.collectives import all_to_all

LIMIT = 1 << 24
"""Elements of the matrices that a rank has whole at a time, unless one alone has more."""


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """How the ranks of a group share the rows of a parameter's matrices.

    Attributes:
        group: the ranks; None where each has whole matrices.
        rank: of this process in the group.
        rows: of each rank.
    """

    group: Any
    rank: int
    rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks that share the rows."""
        return len(self.rows)

    @property
    def first_row(self) -> int:
        """Of this rank."""
        return sum(self.rows[: self.rank])


def row_sharding(parameter: nn.Parameter) -> RowSharding:
    """How a parameter [R, C] or [N, R, C] is sharded. Shards of the leading axis N are whole matrices."""
    rows, row_axis = parameter.shape[-2], parameter.dim() - 2
    whole = RowSharding(None, 0, (rows,))
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    assert not any(placement.is_shard(parameter.dim() - 1) for placement in parameter.placements), "columns are whole"
    axes = [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(row_axis)]
    if not axes or mesh.size(axes[0]) == 1:
        return whole
    (axis,) = axes
    assert type(parameter.placements[axis]) is Shard, "shards are in the order of the ranks"
    size = mesh.size(axis)
    step = -(-rows // size)  # as torch.chunk: the last ranks may have fewer rows, or none
    lengths = tuple(max(0, min(rows, (rank + 1) * step) - rank * step) for rank in range(size))
    return RowSharding(mesh.get_group(axis), mesh.get_local_rank(axis), lengths)


@dataclasses.dataclass(frozen=True)
class Item:
    """Matrices that one rank takes together: a range of a parameter's leading axis.

    Attributes:
        parameter: its index among the parameters of the plan.
        first: of the leading axis of the local shard.
        shape: (N, R, C) of the whole matrices.
        rows: of each rank.
        cost: in any unit; what the ranks have to do is balanced by it.
    """

    parameter: int
    first: int
    shape: tuple[int, int, int]
    rows: tuple[int, ...]
    cost: float

    @property
    def last(self) -> int:
        """End of the range, exclusive."""
        return self.first + self.shape[0]

    @property
    def elements(self) -> int:
        """Of the whole matrices."""
        return math.prod(self.shape)

    def elements_of(self, rank: int) -> int:
        """Of the rows of one rank."""
        return self.shape[0] * self.rows[rank] * self.shape[2]

    def view(self, local: Tensor) -> Tensor:
        """[r, C] or [N, r, C], this rank's shard of the parameter -> its part of the item, without a copy."""
        return (local if local.dim() == 3 else local[None])[self.first : self.last]


def cut(parameter: int, *, leading: int, columns: int, cost: float, sharding: RowSharding, limit: int) -> list[Item]:
    """The matrices of a parameter as items: at least one for each rank, if there are as many matrices.

    Args:
        parameter: index.
        leading: N of the local shard, which is equal on all ranks that share the rows.
        columns: C.
        cost: of each matrix.
        sharding: of the rows.
        limit: elements.
    """
    rows = sum(sharding.rows)
    most = max(1, min(limit // (rows * columns), -(-leading // sharding.size)))
    starts = range(0, leading, most)
    lengths = [min(most, leading - first) for first in starts]
    return [
        Item(parameter, first, (length, rows, columns), sharding.rows, cost * length)
        for first, length in zip(starts, lengths, strict=True)
    ]


def rounds_of(items: Sequence[Item], *, size: int, limit: int) -> list[list[list[Item]]]:
    """Rounds -> ranks -> items. A rank's items of a round have at most ``limit`` elements, or are one.

    The largest items are given out first, each to the rank with the least to do, and taken in that order, so that the
    ranks have about equally much to do in each round.
    """
    queues: list[list[Item]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for item in sorted(items, key=lambda item: -item.cost):  # stable: the same on all ranks
        owner = loads.index(min(loads))
        queues[owner].append(item)
        loads[owner] += item.cost
    by_rank = [_parts(queue, limit) for queue in queues]
    count = max(map(len, by_rank))
    return [[parts[index] if index < len(parts) else [] for parts in by_rank] for index in range(count)]


def _parts(queue: Sequence[Item], limit: int) -> list[list[Item]]:
    parts: list[list[Item]] = []
    held = 0
    for item in queue:
        if not parts or held + item.elements > limit:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += item.elements
    return parts


WholeFunction = Callable[[list[Item], list[Tensor]], list[Tensor]]
"""Items of a rank and their whole matrices [N, R, C] -> matrices of the same shapes and type."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The ranks among which items are exchanged, and their rounds.

    Attributes:
        group: the ranks; None where each has whole matrices.
        rank: of this process in the group.
        rounds: rounds -> ranks -> items.
    """

    group: Any
    rank: int
    rounds: list[list[list[Item]]]

    def on_whole(
        self, pieces: Sequence[Tensor], by_rank: list[list[Item]], function: WholeFunction
    ) -> list[Tensor]:
        """Apply a function to the whole matrices of a round, each on the rank that owns it. Called by all ranks.

        Args:
            pieces: this rank's rows [N, r, C] of all items of the round, in the order of the owners.
            by_rank: the round.
            function: of the rank's own items.

        Returns:
            This rank's rows of the results, in the order of ``pieces``.
        """
        own = by_rank[self.rank]
        if self.group is None:
            return function(own, list(pieces))
        sent = [sum(item.elements_of(self.rank) for item in items) for items in by_rank]
        received = [sum(item.elements_of(rank) for item in own) for rank in range(len(by_rank))]
        arrived = all_to_all(torch.cat([piece.flatten() for piece in pieces]), sent, received, self.group)
        by_sender = [
            _unflat(part, [(item.shape[0], item.rows[sender], item.shape[2]) for item in own])
            for sender, part in enumerate(arrived.split(received))
        ]
        wholes = [torch.cat(parts, dim=1) for parts in zip(*by_sender, strict=True)]
        results = [
            whole.split(list(item.rows), dim=1) for item, whole in zip(own, function(own, wholes), strict=True)
        ]
        back = [parts[rank].flatten() for rank in range(len(by_rank)) for parts in results]
        # a rank without items of its own in this round takes part too
        flat = torch.cat(back) if back else arrived[:0]
        returned = all_to_all(flat, received, sent, self.group)
        items = [item for items in by_rank for item in items]
        return _unflat(returned, [(item.shape[0], item.rows[self.rank], item.shape[2]) for item in items])


def _unflat(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """[elements] -> tensors of these shapes, one after another."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
