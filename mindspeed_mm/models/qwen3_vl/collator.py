"""The vision part of a packed micro-batch: patches with the position data that the vision tower needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mindspeed_mm.interfaces.batch import VisionBatch
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig
from mindspeed_mm.models.qwen3_vl.positions import frame_grids, interpolation_taps, patch_rows_cols


def collate_vision(
    media: Sequence[MediaPatches], placeholder_index: np.ndarray, vision: Qwen3VLVisionConfig
) -> VisionBatch:
    """Concatenate the patches of all images and videos with their position data.

    Every rank must run the vision tower in every micro-batch, or sharded collectives hang. A micro-batch without media
    therefore gets one merge block of zeros, and ``is_dummy`` tells the model to leave its output unused.
    """
    merge, is_dummy = vision.spatial_merge_size, not media
    if is_dummy:
        media = [MediaPatches(np.zeros((vision.merge_unit, vision.patch_dim), np.uint8), (1, merge, merge))]
    grids = [one.grid_thw for one in media]
    frames = frame_grids(grids)
    lengths = [rows * cols for rows, cols in frames]
    boundaries = np.cumsum([0] + lengths).tolist()
    taps = [interpolation_taps(rows, cols, merge, vision.grid_per_side) for rows, cols in frames]
    rows_cols = [patch_rows_cols(rows, cols, merge) for rows, cols in frames]
    return VisionBatch(
        pixels=torch.from_numpy(np.concatenate([one.patches for one in media])),
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
