"""``HostReads`` finds every kind of host-device synchronisation."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.host_reads import HostReads

NUMBERS = torch.tensor([3, 0, 2])
MASK = NUMBERS > 0


@pytest.mark.parametrize(
    "read",
    [
        lambda: NUMBERS.tolist(),
        lambda: NUMBERS[0].item(),
        lambda: int(NUMBERS[0]),
        lambda: float(NUMBERS[0]),
        lambda: bool(MASK[0]),
        lambda: NUMBERS.numpy(),
        lambda: NUMBERS.cpu(),
        lambda: NUMBERS.nonzero(),
        lambda: NUMBERS[MASK],
        lambda: NUMBERS.masked_select(MASK),
        lambda: NUMBERS.clone().index_put_((MASK,), torch.tensor(0)),
        lambda: NUMBERS.unique(),
        lambda: torch.equal(NUMBERS, MASK.long()),
        lambda: NUMBERS.repeat_interleave(NUMBERS),
        lambda: [0, 1, 2][NUMBERS[2]],
    ],
)
def test_read_is_found(read):
    with HostReads() as reads:
        read()
    assert reads.found
    assert all(place.startswith("tests/ut/test_host_reads.py") for _, place in reads.found)


def test_read_in_backward_is_found():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    value = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        Reading.apply(value).sum().backward()
    assert reads.found


def test_other_operations_are_none():
    values = torch.rand(3, 4, requires_grad=True)
    with HostReads() as reads:
        chosen = values.softmax(-1).topk(2).values[NUMBERS.clamp(max=1)]
        (chosen.sum() + values.index_select(0, NUMBERS.clamp(max=2)).sum()).backward()
        NUMBERS.repeat_interleave(NUMBERS, output_size=5)
        torch.where(MASK, NUMBERS, 0)
    assert reads.found == []
