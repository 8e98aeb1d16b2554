"""How images and videos become patches: settings that the data reads and the model applies."""

from __future__ import annotations

import dataclasses

import numpy as np

GridTHW = tuple[int, int, int]
"""Temporal slices, rows and columns of patches of an image (one slice) or a video."""


@dataclasses.dataclass(frozen=True)
class MediaPatches:
    """One image or video, cut into patches.

    Attributes:
        patches: uint8 [t * h * w, patch_dim], each merge block contiguous, not normalised.
        grid_thw: temporal slices, rows and columns of patches; t is 1 for an image.
    """

    patches: np.ndarray
    grid_thw: GridTHW


@dataclasses.dataclass(frozen=True)
class PixelNorm:
    """How uint8 pixel values become the model's input, per channel: ``(x * rescale_factor - mean) / std``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float

    def table(self) -> np.ndarray:
        """The normalised value of each possible pixel value: float32 [3, 256].

        The reference multiplies by the factor in float64 and rounds to float32 before it goes on. For the factor
        1/255 a float32 division by 255 gives the same values; a float32 product with 1/255 does not.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """What decides a video's frames and their size. Areas are in pixels.

    Attributes:
        min_pixels: smallest area of a frame, by the data file.
        max_pixels: largest area of a frame, by the data file.
        min_volume: smallest area of all frames together, by the checkpoint's processor.
        max_volume: largest area of all frames together, by the checkpoint's processor.
        fps: frames to take per second.
        min_frames: fewest frames to take of a video that has as many.
        max_frames: most frames to take.
    """

    min_pixels: int
    max_pixels: int
    min_volume: int
    max_volume: int
    fps: float
    min_frames: int
    max_frames: int


@dataclasses.dataclass(frozen=True)
class MediaSettings:
    """Sizes and normalisation of images and videos.

    Attributes:
        min_pixels: smallest area of a resized image, in pixels; at least 1.
        max_pixels: largest area of a resized image, in pixels.
        patch_size: side of a patch, in pixels.
        temporal_patch_size: frames in a patch; an image fills them with copies of itself.
        merge_size: patches per side of a merge block.
        norm: normalisation that the device applies.
        videos: what decides a video's frames; None if the data has no videos.
        transparent_background: colour behind transparent pixels of images; None for their hidden colour.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    norm: PixelNorm
    videos: VideoSettings | None = None
    transparent_background: str | None = None

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of this number of pixels."""
        return self.patch_size * self.merge_size
