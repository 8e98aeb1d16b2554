"""Weights straight from a Hugging Face directory: each process reads the rows that it holds, and nothing is converted
on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mindspeed_mm.models.weight_map import WeightRule
from mindspeed_mm.training.checkpoint.hf_source import HFSource
from mindspeed_mm.training.checkpoint.pieces import split_rows
from mindspeed_mm.training.checkpoint.shards import Region, held


@torch.no_grad()
def load_hf_weights(model: nn.Module, directory: str | Path) -> None:
    """Fill the model's parameters, in place, from a Hugging Face directory.

    Host memory stays near one tensor, or one piece of a large one. Rows of experts, embeddings and most others are
    read as they are held; the few that are put together from several tensors are read whole, one at a time.

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
        local, region = held(parameter)
        if local.numel():
            _fill(local, region, rule, source)
    if parameters:
        raise AssertionError(f"the weight map does not know {sorted(parameters)[:3]}")


def _fill(local: Tensor, region: Region, rule: WeightRule, source: HFSource) -> None:
    (first, last), *inner = region
    cut = tuple(slice(start, end) for start, end in inner)
    if not rule.row_wise:
        whole = rule.to_mcore([source.read(name)[0] for name, _ in rule.sources])
        local.copy_(whole[(slice(first, last), *cut)])
        return
    ((name, shape),) = rule.sources
    row_bytes = source.tensors[name].nbytes // shape[0]
    for start, end in split_rows(last - first, row_bytes):
        piece, _ = source.read(name, (first + start, first + end))
        local[start:end].copy_(rule.to_mcore([piece])[(slice(None), *cut)])
