"""Images and videos under one roof: measured for the placeholders, and loaded.

They come as the entries that ``records.resolve_media`` makes.
"""

from __future__ import annotations

import numpy as np

from mindspeed_mm.data.images import image_grid, image_patches, load_pixels
from mindspeed_mm.data.records import as_video
from mindspeed_mm.data.videos import clip_layout, clip_patches
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import Clip
from mindspeed_mm.interfaces.media import GridTHW, ImageSettings, VideoSettings


def describe_media(entry: str) -> str:
    """What an entry names, for messages."""
    video = as_video(entry)
    return f"image {entry}" if video is None else f"video {video if isinstance(video, str) else video[0]}"


def measure_media(entry: str, settings: ImageSettings | None) -> tuple[GridTHW, int | Clip]:
    """Grid of patches, and the placeholders that the template writes; from the file's header.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    video, settings = as_video(entry), _required(settings)
    if video is None:
        grid = image_grid(entry, settings)
        return grid, grid[1] * grid[2] // settings.merge_size**2
    grid, seconds = clip_layout(video, _videos(settings), settings)
    return grid, Clip(seconds, grid[1] * grid[2] // settings.merge_size**2)


def load_media(entry: str, settings: ImageSettings | None) -> tuple[np.ndarray, GridTHW]:
    """Patches uint8 [t * rows * cols, patch_dim] and their grid.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    video, settings = as_video(entry), _required(settings)
    if video is None:
        return image_patches(load_pixels(entry), settings)
    return clip_patches(video, _videos(settings), settings)


def _required(settings: ImageSettings | None) -> ImageSettings:
    if settings is None:
        raise UserError("a record has images or videos, and this model takes text only; remove such records")
    return settings


def _videos(settings: ImageSettings) -> VideoSettings:
    if settings.videos is None:
        raise UserError("a record has a video, but attr.videos names no column; name it in the data file")
    return settings.videos
