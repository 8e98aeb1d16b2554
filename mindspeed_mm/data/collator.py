"""Packs samples into a Batch: no padding, every index and position made here, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch, VisionBatch
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLVisionConfig
from mindspeed_mm.models.qwen3_vl.positions import (
    frame_grids,
    interpolation_taps,
    patch_rows_cols,
    token_positions,
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, ready to be packed.

    Attributes:
        input_ids: int64 [L], placeholders included: one per merged patch.
        loss_mask: bool [L], tokens that the loss counts. The first token has no predecessor and never counts.
        media: images and videos together, in the order of their placeholders.
        index: place of the sample in the dataset.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    media: tuple[MediaPatches, ...]
    index: int


def collate(samples: Sequence[Sample], model_config: Qwen3VLConfig) -> Batch:
    """Pack ``samples`` in the given order into one sequence.

    Args:
        samples: at least one.
        geometry: token ids and the vision tower's patch, merge and position table sizes.

    Returns:
        A Batch on the CPU. Its vision part is a dummy block if no sample has a picture.

    Raises:
        UserError: naming the sample whose placeholders do not match its pictures.
    """
    merge = model_config.vision.spatial_merge_size
    media_tokens = (model_config.image_token_id, model_config.video_token_id)
    placeholders, positions = [], []
    for sample in samples:
        is_placeholder = np.isin(sample.input_ids, media_tokens)
        try:
            grids = [picture.grid_thw for picture in sample.media]
            positions.append(token_positions(is_placeholder, grids, merge))
        except ValueError as error:
            raise UserError(f"sample {sample.index}: {error}; rebuild the cache with overwrite_cache") from error
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
        vision=_collate_vision(
            [picture for sample in samples for picture in sample.media],
            np.flatnonzero(np.concatenate(placeholders)).astype(np.int64),
            model_config.vision,
        ),
    )


def _collate_vision(
    pictures: list[MediaPatches], placeholder_index: np.ndarray, vision: Qwen3VLVisionConfig
) -> VisionBatch:
    """Concatenate the pictures' patches with their position data.

    Every rank must run the vision tower in every micro-batch, or sharded collectives hang; so where there is no
    picture, one merge block of zeros takes its place, and ``is_dummy`` tells the model to leave its output unused.
    """
    merge, is_dummy = vision.spatial_merge_size, not pictures
    if is_dummy:
        pictures = [MediaPatches(np.zeros((vision.merge_unit, vision.patch_dim), np.uint8), (1, merge, merge))]
    grids = [picture.grid_thw for picture in pictures]
    frames = frame_grids(grids)
    lengths = [rows * cols for rows, cols in frames]
    boundaries = np.cumsum([0] + lengths).tolist()
    taps = [interpolation_taps(rows, cols, merge, vision.grid_per_side) for rows, cols in frames]
    rows_cols = [patch_rows_cols(rows, cols, merge) for rows, cols in frames]
    return VisionBatch(
        pixels=torch.from_numpy(np.concatenate([picture.patches for picture in pictures])),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        cu_seqlens_host=boundaries,
        max_seqlen=max(lengths),
        position_ids=torch.from_numpy(np.concatenate(rows_cols, axis=1)),
        interp_index=torch.from_numpy(np.concatenate([index for index, _ in taps], axis=1)),
        interp_weight=torch.from_numpy(np.concatenate([weight for _, weight in taps], axis=1)),
        placeholder_index=torch.from_numpy(placeholder_index),
        grid_thw=grids,
        is_dummy=is_dummy,
    )
