"""Who has which matrices whole: rows of each rank, and how matrices are dealt out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from mindspeed_mm.parallel.matrix_exchange import Exchange, Item, RowSharding, cut, rounds_of, row_sharding


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_rows_of_each_rank_are_those_of_fsdp(fake_process_group, size, rows):
    fake_process_group(size)
    mesh = init_device_mesh("cpu", (size,))
    linear = nn.Linear(3, rows, bias=False)
    fully_shard(linear, mesh=mesh)
    sharding = row_sharding(linear.weight)
    chunks = [len(chunk) for chunk in torch.empty(rows).chunk(size)]
    assert list(sharding.rows) == chunks + [0] * (size - len(chunks))
    assert linear.weight.to_local().shape[0] == sharding.rows[0] and sharding.group is mesh.get_group()


def test_which_ranks_share_rows(fake_process_group):
    fake_process_group(8)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "expert"))

    def sharding(shape: tuple[int, ...], *placements):
        return row_sharding(nn.Parameter(DTensor.from_local(torch.empty(shape), mesh, placements, run_check=False)))

    both = sharding((2, 4, 6), Replicate(), Shard(1), Shard(0))  # EP with FSDP, replicated
    assert both.group is mesh.get_group("shard") and both.rows == (4, 4)
    assert sharding((4, 6), Replicate(), Shard(0), Replicate()).rows == (4, 4)
    experts = sharding((2, 4, 6), Replicate(), Replicate(), Shard(0))
    for whole in (experts, row_sharding(nn.Parameter(torch.ones(4, 6)))):
        assert whole.group is None and whole.rows == (4,)


def test_matrices_are_dealt_out_evenly():
    """48 layers' projections over 16 ranks: each rank has a sixteenth of the work, in rounds of bounded size."""
    sharding, limit = RowSharding(object(), 0, (128,) * 16), 1 << 24
    shapes = [(2048, 5120), (2048, 4096), (2048, 128)] * 48
    items = [
        item for index, (rows, columns) in enumerate(shapes)
        for item in cut(index, leading=1, columns=columns, cost=columns, sharding=sharding, limit=limit)
    ]
    rounds = rounds_of(items, size=16, limit=limit)
    given = [[item for of_round in rounds for item in of_round[rank]] for rank in range(16)]
    assert sorted(item.parameter for own in given for item in own) == list(range(len(shapes)))
    costs = [sum(item.cost for item in own) for own in given]
    assert max(costs) <= 1.01 * min(costs)
    for of_round in rounds:
        assert all(len(own) == 1 or sum(item.elements for item in own) <= limit for own in of_round)
    assert len(rounds) == 5  # of 1, 1, 1, 2 and 4 matrices of a rank


@pytest.mark.parametrize(
    ("leading", "size", "expected"), [(8, 2, [4, 4]), (8, 16, [1] * 8), (5, 2, [3, 2]), (0, 2, [])]
)
def test_experts_are_cut_for_the_ranks(leading, size, expected):
    sharding = RowSharding(object(), 0, (4,) * size)
    items = cut(0, leading=leading, columns=3, cost=1.0, sharding=sharding, limit=1 << 20)
    assert [item.shape[0] for item in items] == expected == [int(item.cost) for item in items]


def test_an_exchange_without_items_has_no_rounds():
    assert rounds_of([], size=1, limit=1) == []
    item = Item(0, 0, (1, 2, 2), (2,), 1.0)
    exchange = Exchange(None, 0, rounds_of([item], size=1, limit=1))
    pieces = [torch.ones(1, 2, 2)]
    assert exchange.on_whole(pieces, exchange.rounds[0], lambda items, wholes: [2 * wholes[0]])[0].sum() == 8
