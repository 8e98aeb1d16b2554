"""Weights straight from a Hugging Face directory: each process reads the rows that it holds, and nothing is converted
on disk."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from mindspeed_mm.checkpoint.hf_source import HFSource
from mindspeed_mm.checkpoint.pieces import split_rows
from mindspeed_mm.checkpoint.safetensors_io import StoredTensor, read_tensor
from mindspeed_mm.checkpoint.shards import ShardSlice, local_shard
from mindspeed_mm.models.state_dict import WeightRule


@torch.no_grad()
def load_hf_weights(model: nn.Module, directory: str | Path) -> None:
    """Fill the model's parameters, in place, from a Hugging Face directory.

    Nothing is read that this process does not hold, except that experts of the ``v5`` layout are read whole where they
    are cut within. Host memory grows by a piece of ``PIECE_BYTES``.

    Args:
        model: sharded or not, with storage.
        directory: with ``config.json`` and safetensors files.

    Raises:
        UserError: naming tensors that are missing, unexpected, damaged or of another shape.
    """
    source = HFSource(directory)
    parameters = dict(model.named_parameters())
    for rule in source.rules:
        parameter = parameters.pop(rule.target)
        local, region = local_shard(parameter)
        if local.numel():
            _fill(local, region, rule, source)
    if parameters:
        raise AssertionError(f"the weight map does not know {sorted(parameters)[:3]}")


def _fill(local: Tensor, region: ShardSlice, rule: WeightRule, source: HFSource) -> None:
    """Copy into ``local`` what lies at ``region`` of the rule's parameter, piece by piece."""
    (first, last), *inner = region
    cut = tuple(slice(start, end) for start, end in inner)
    if rule.is_copy and inner and inner[0] != (0, rule.target_shape[1]):
        # experts that are cut within: a part of each, which lies together
        stored = source.tensors[rule.sources[0][0]]
        for row in range(first, last):
            local[row - first].copy_(_read(stored, *inner[0], within=row))
        return
    for at, index, start, end in _runs(rule, first, last):
        stored = source.tensors[rule.sources[index][0]]
        for begin, stop in split_rows(end - start, stored.nbytes // stored.shape[0]):
            piece = _read(stored, start + begin, start + stop)
            values = rule.to_mcore([piece]) if rule.row_wise else piece
            local[at + begin : at + stop].copy_(values[(slice(None), *cut)])


def _runs(rule: WeightRule, first: int, last: int) -> list[tuple[int, int, int, int]]:
    """Where rows [first, last) of a rule's parameter come from.

    Returns:
        (row, counted from ``first``; number of the source; its first row; its last row, exclusive) of each run of rows
        that lie together on both sides.
    """
    if rule.row_wise:
        return [(0, 0, first, last)]
    lengths = [shape[0] for _, shape in rule.sources]
    # The rule itself says where rows go, shown their numbers; between sources one is left out, so that no run goes on.
    starts = [sum(lengths[:index]) + index for index in range(len(lengths))]
    numbers = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    order = rule.transform.to_mcore(numbers)[first:last]
    begins = [0, *((order.diff() != 1).nonzero().flatten() + 1).tolist()]
    runs = []
    for begin, end in zip(begins, [*begins[1:], last - first], strict=True):
        row = int(order[begin])
        index = max(i for i, start in enumerate(starts) if start <= row)
        runs.append((begin, index, row - starts[index], row - starts[index] + end - begin))
    return runs


def _read(stored: StoredTensor, start: int, end: int, *, within: int | None = None) -> Tensor:
    """Rows [start, end) of a stored tensor, or of its row ``within``."""
    skipped, tail = (0, stored.shape[1:]) if within is None else (within * stored.shape[1], stored.shape[2:])
    row_bytes = math.prod(tail) * stored.dtype.itemsize
    return read_tensor(stored.file, stored.start + (skipped + start) * row_bytes, stored.dtype, (end - start, *tail))
