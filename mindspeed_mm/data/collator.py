"""Packs samples into a Batch: no padding, every index and position computed here, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed.

    Attributes:
        input_ids: int64 [L], placeholders included: one per merged patch.
        loss_mask: bool [L], tokens that the loss counts. The first token has no predecessor and never counts.
        media: images and videos together, in the order of their placeholders.
        index: place of the sample in the dataset.
        channel: number of its data set in a mixture, whose loss is logged by itself; None without a mixture.
        record_channel: what its record names, whose evaluation is reported by itself; empty for none.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    media: tuple[MediaPatches, ...]
    index: int
    channel: int | None = None
    record_channel: str = ""


def collate(samples: Sequence[Sample], spec: ModelSpec, model_config: Any) -> Batch:
    """Pack ``samples`` in the given order into one sequence.

    Args:
        samples: at least one.
        spec: the model family; gives placeholders, positions and the vision part.
        model_config: the family's.

    Returns:
        A Batch on the CPU.

    Raises:
        UserError: if a sample's placeholders do not match its images and videos; the caller knows its name.
    """
    placeholder_ids = spec.placeholder_token_ids(model_config)
    placeholders, positions = [], []
    for sample in samples:
        is_placeholder = np.isin(sample.input_ids, placeholder_ids)
        try:
            grids = [one.grid_thw for one in sample.media]
            positions.append(spec.token_positions(is_placeholder, grids, model_config))
        except ValueError as error:
            raise UserError(f"{error}; rebuild the cache with overwrite_cache") from error
        placeholders.append(is_placeholder)

    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64, copy=False)
    boundaries = np.cumsum([0] + [len(sample.input_ids) for sample in samples]).tolist()
    targets = [np.flatnonzero(sample.loss_mask[1:]) for sample in samples]
    starts = boundaries[:-1]
    label_index = np.concatenate([target + start for target, start in zip(targets, starts, strict=True)])
    label_index = label_index.astype(np.int64, copy=False)
    counts = [len(target) for target in targets]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        cu_seqlens_host=boundaries,
        max_seqlen=max(len(sample.input_ids) for sample in samples),
        label_index=torch.from_numpy(label_index),
        labels=torch.from_numpy(input_ids[label_index + 1]),
        label_sample=torch.from_numpy(np.repeat(np.arange(len(samples), dtype=np.int64), counts)),
        target_tokens_per_sample=counts,
        sample_ids=[sample.index for sample in samples],
        vision=spec.collate_vision(
            [one for sample in samples for one in sample.media],
            np.flatnonzero(np.concatenate(placeholders)).astype(np.int64),
            model_config,
        ),
        sample_channel=_channels(samples),
        record_channels=[sample.record_channel for sample in samples] if any(s.record_channel for s in samples) else [],
    )


def _channels(samples: Sequence[Sample]) -> torch.Tensor | None:
    """``Batch.sample_channel``; stand-ins, which have no target token, count as of the first channel."""
    if all(sample.channel is None for sample in samples):
        return None
    return torch.tensor([sample.channel or 0 for sample in samples])
