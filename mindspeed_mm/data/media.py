"""Images and videos behind one interface: measured for the placeholders, and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from mindspeed_mm.data.images import image_grid, image_patches, load_pixels
from mindspeed_mm.data.parsing import Video
from mindspeed_mm.data.videos import clip_layout, clip_patches
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import Clip
from mindspeed_mm.interfaces.media import GridTHW, MediaSettings, VideoSettings


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image file, or a video: a file, or the image files that are its frames."""

    source: str | Sequence[str]
    is_video: bool

    def __str__(self) -> str:
        """What it is and its file, for messages."""
        path = self.source if isinstance(self.source, str) else self.source[0]
        return f"{'video' if self.is_video else 'image'} {path}"


def in_order(are_videos: Iterable[bool], images: Iterable[str], videos: Iterable[Video]) -> list[Medium]:
    """A conversation's images and videos in the order of their tags; ``are_videos`` has one flag per tag."""
    remaining_images, remaining_videos = iter(images), iter(videos)
    media = []
    for is_video in are_videos:
        if is_video:
            video = next(remaining_videos)
            media.append(Medium(video["frames"] or () if video["path"] is None else video["path"], True))
        else:
            media.append(Medium(next(remaining_images), False))
    return media


def measure_media(medium: Medium, settings: MediaSettings | None) -> tuple[GridTHW, int | Clip]:
    """Grid of patches, and the placeholders that the chat template writes; from the file's header.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    settings = _required(settings)
    if not medium.is_video:
        assert isinstance(medium.source, str)
        grid = image_grid(medium.source, settings)
        return grid, grid[1] * grid[2] // settings.merge_size**2
    grid, seconds = clip_layout(medium.source, _video_settings(settings), settings)
    return grid, Clip(seconds, grid[1] * grid[2] // settings.merge_size**2)


def load_media(medium: Medium, settings: MediaSettings | None) -> tuple[np.ndarray, GridTHW]:
    """Patches uint8 [t * rows * cols, patch_dim] and their grid.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    settings = _required(settings)
    if not medium.is_video:
        assert isinstance(medium.source, str)
        return image_patches(load_pixels(medium.source, background=settings.transparent_background), settings)
    return clip_patches(medium.source, _video_settings(settings), settings)


def _required(settings: MediaSettings | None) -> MediaSettings:
    if settings is None:
        raise UserError("a record has images or videos, and this model takes text only; remove such records")
    return settings


def _video_settings(settings: MediaSettings) -> VideoSettings:
    if settings.videos is None:
        raise UserError("a record has a video, but attr.videos names no column; name it in the data file")
    return settings.videos
