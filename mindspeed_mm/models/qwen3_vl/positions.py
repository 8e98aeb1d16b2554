"""Positions of tokens and of vision patches, computed on the host so that the device never waits for them.

Patch order is the image processor's: the patches of one spatial merge block are contiguous, blocks follow in raster
order. Cached arrays are shared between callers and therefore read-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mindspeed_mm.interfaces.media import GridTHW

_CACHED_GRIDS = 512  # a 512x512 image's entry takes about 80 KB


def _frozen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


@lru_cache(maxsize=_CACHED_GRIDS)
def patch_rows_cols(height: int, width: int, merge: int) -> np.ndarray:
    """Row and column of every patch of one frame, in patch order.

    Args:
        height: rows of patches, a multiple of ``merge``.
        width: columns of patches, a multiple of ``merge``.
        merge: patches per side of a merge block.

    Returns:
        int64 [2, height * width], read-only.
    """
    blocks = (height // merge, merge, width // merge, merge)
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    positions = np.stack([plane.reshape(blocks).transpose(0, 2, 1, 3).ravel() for plane in (rows, cols)])
    return _frozen(positions.astype(np.int64))[0]


def _axis_taps(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two neighbouring table rows and their weights for target positions ``index`` on an axis of ``size``.

    Both ends of the axis coincide with the ends of the table (align_corners). float32 throughout, as the model's
    reference computes it, so that weights agree to the bit.

    Returns:
        taps int64 [2, n] and weights float32 [2, n].
    """
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    taps = floor.astype(np.int64) + np.arange(2)[:, None]
    weights = np.float32(1) - np.abs((source - floor) - np.arange(2, dtype=np.float32)[:, None])
    return np.minimum(taps, side - 1), np.maximum(weights, np.float32(0))


@lru_cache(maxsize=_CACHED_GRIDS)
def interpolation_taps(height: int, width: int, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear gather from the learned ``side`` x ``side`` position table to one frame's patches, in patch order.

    Returns:
        index int64 [4, height * width] into the flattened table and weight float32 [4, height * width], read-only.
        The four corners come in the order (row, col), (row, col+1), (row+1, col), (row+1, col+1).
    """
    rows, cols = patch_rows_cols(height, width, merge)
    row_taps, row_weights = _axis_taps(rows, height, side)
    col_taps, col_weights = _axis_taps(cols, width, side)
    index = (row_taps[:, None] * side + col_taps[None]).reshape(4, -1)
    weight = (row_weights[:, None] * col_weights[None]).reshape(4, -1)
    return _frozen(index, weight)  # type: ignore[return-value]


@lru_cache(maxsize=_CACHED_GRIDS)
def _merged_offsets(rows: int, cols: int) -> np.ndarray:
    """(time, height, width) offsets of the merged patches of one frame: int64 [3, rows * cols], read-only."""
    grid = np.indices((1, rows, cols)).reshape(3, -1)
    return _frozen(grid.astype(np.int64))[0]


def frame_grids(grids: Sequence[GridTHW]) -> list[tuple[int, int]]:
    """Rows and columns of every frame: a video of t temporal slices is t frames, each with its own placeholders."""
    return [(rows, cols) for time, rows, cols in grids for _ in range(time)]


def token_positions(is_placeholder: np.ndarray, grids: Sequence[GridTHW], merge: int) -> np.ndarray:
    """3-D positions of one sample's tokens.

    Text advances the three axes together. A run of placeholders (one frame) starts where the text stopped and spreads
    over height and width; text goes on after the largest of them.

    Args:
        is_placeholder: bool [L], whether a token is the placeholder of a merged vision patch.
        grids: the sample's images and videos in order; timestamp text separates a video's temporal slices, so each
            slice is a run of its own.
        merge: patches per side of a merge block.

    Returns:
        int64 [3, L].

    Raises:
        ValueError: if the runs of placeholders do not match the grids.
    """
    frames = frame_grids(grids)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_placeholder, [False])).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    sizes = [(rows // merge, cols // merge) for rows, cols in frames]
    if [rows * cols for rows, cols in sizes] != (ends - starts).tolist():
        raise ValueError(
            f"placeholder runs of {(ends - starts).tolist()} tokens do not match "
            f"images or frames of {[rows * cols for rows, cols in sizes]} merged patches"
        )
    # Outside the runs a position is the token's index minus what the runs before it did not use up.
    positions = np.broadcast_to(np.arange(len(is_placeholder), dtype=np.int64), (3, len(is_placeholder))).copy()
    surplus = 0
    for start, end, (rows, cols) in zip(starts.tolist(), ends.tolist(), sizes, strict=True):
        positions[:, start:end] = _merged_offsets(rows, cols) + (start - surplus)
        surplus += rows * cols - max(rows, cols)
        positions[:, end:] = np.arange(end, len(is_placeholder)) - surplus
    return positions
