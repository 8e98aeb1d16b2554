"""Videos: which frames, what size, at which seconds, and cutting into patches.

Frames, sizes, seconds and pixels equal those of the video processor in transformers, reading with PyAV. A video is a
file, or a list of image files that are its frames, taken ``video_fps`` times a second.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mindspeed_mm.data.images import MAX_ASPECT_RATIO, cut_patches, load_pixels, upright_size, warn_once
from mindspeed_mm.data.media_files import require_video_reader
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import DATA_BYTES, open_regular, shorten
from mindspeed_mm.inputs import reason as reason_of
from mindspeed_mm.interfaces.media import GridTHW, MediaSettings, VideoSettings

VideoSource = str | Sequence[str]
"""A video file, or the image files that are its frames."""

# FFmpeg's playlists and lists of files can name anything on the machine or the network; these are containers only
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif", "apng",
               "mpegvideo", "m4v", "h264", "hevc", "av1", "ivf", "mxf")
_CONTAINERS_SHOWN = "MP4, MOV, MKV, WebM, AVI, MPEG, TS, FLV, OGG, WMV, MXF, GIF"
_OPTIONS = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "file"}


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """A video by its header: frames, frames per second, height and width in pixels."""

    frames: int
    fps: float
    height: int
    width: int


def frame_indices(frames: int, fps: float, settings: VideoSettings) -> np.ndarray:
    """Indices of the sampled frames, evenly spread from the first to the last: int64 [n].

    Args:
        frames: of the video.
        fps: of the video.
        settings: frames per second to sample, and limits.
    """
    target = int(frames / fps * settings.fps)
    count = min(max(target, settings.min_frames), settings.max_frames, frames)
    return np.linspace(0, frames - 1, count).round().astype(np.int64)


def slice_seconds(indices: np.ndarray, fps: float, depth: int) -> tuple[float, ...]:
    """Timestamp of each temporal slice, in seconds: the mean of its first and last frame's."""
    padded = np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % depth)])
    return tuple(
        (first / fps + last / fps) / 2
        for first, last in zip(padded[::depth].tolist(), padded[depth - 1 :: depth].tolist(), strict=True)
    )


def clip_size(frames: int, height: int, width: int, settings: VideoSettings, images: MediaSettings) -> tuple[int, int]:
    """Height and width of the resized frames: multiples of the factor, aspect kept, within the limits.

    The limits of a frame count once per frame and the checkpoint's for all frames together; the narrower holds.

    Raises:
        ValueError: if the video is too thin, or no size is within both limits.
    """
    factor, depth = images.factor, images.temporal_patch_size
    frames = max(frames, depth)  # a single frame is shown twice; the reference refuses it
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
    counted = round(frames / depth) * depth  # the reference's way to count, to even
    least = max(settings.min_volume, settings.min_pixels * max(frames, counted))
    most = min(settings.max_volume, settings.max_pixels * min(frames, counted))
    if least > most:
        raise ValueError(
            f"its {frames} frames need at least {least} and may have at most {most} pixels together; raise "
            "video_max_pixels or lower video_min_pixels or video_maxlen"
        )
    sides = (height, width)
    rounded = [round(side / factor) * factor for side in sides]
    volume = counted * rounded[0] * rounded[1]
    if volume > most:
        shrink = math.sqrt(frames * height * width / most)
        rounded = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif volume < least:
        grow = math.sqrt(least / (frames * height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in sides]
    return rounded[0], rounded[1]


def clip_shape(video: VideoSource, settings: VideoSettings) -> ClipShape:
    """Read a video's header.

    Raises:
        UserError: naming the file, if it is missing or no video.
    """
    if not isinstance(video, str):
        height, width = upright_size(video[0])
        return ClipShape(len(video), settings.fps, height, width)
    with _opened(video) as container:
        stream = container.streams.video[0]
        fps, frames = stream.average_rate, stream.frames
        if not frames:  # some containers do not say how many they hold
            frames = _counted(video, container, stream)
        if not fps or not frames:
            raise _unusable(video, "it has no frames or no frame rate")
        if stream.codec_context is None:
            raise _unusable(video, "its codec is unknown")
        if stream.height < 1 or stream.width < 1:
            raise _unusable(video, "it gives no size")
        if stream.height * stream.width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise _unusable(video, f"{stream.width}x{stream.height} pixels are more than a frame may have")
        return ClipShape(frames, float(fps), stream.height, stream.width)


def _counted(video: str, container: Any, stream: Any) -> int:
    """Number of frames by the packets; a file that ends long before its header says is warned of, once."""
    frames, end = 0, 0
    for packet in container.demux(stream):
        if packet.size:
            frames += 1
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
    # in microseconds; with sound it may be that of the sound
    declared = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    played = float(end * stream.time_base)
    if declared > 1.1 * played + 0.5:
        warn_once("duration", f"video {shorten(video)} ends after {played:.1f} of {declared:.1f} seconds: it seems to "
                  "be cut off; the frames that it has are used")
    return frames


def clip_layout(
    video: VideoSource, settings: VideoSettings, images: MediaSettings
) -> tuple[GridTHW, tuple[float, ...]]:
    """Grid (slices, rows, columns) of patches that the video will have, and the second of each slice.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    shape = clip_shape(video, settings)
    indices = frame_indices(shape.frames, shape.fps, settings)
    try:
        height, width = clip_size(len(indices), shape.height, shape.width, settings, images)
    except ValueError as error:
        raise _unusable(_name(video), error) from error
    seconds = slice_seconds(indices, shape.fps, images.temporal_patch_size)
    return (len(seconds), height // images.patch_size, width // images.patch_size), seconds


def clip_patches(
    video: VideoSource, settings: VideoSettings, images: MediaSettings
) -> tuple[np.ndarray, GridTHW]:
    """Decode, resize and cut a video; returns patches uint8 [t * rows * cols, patch_dim] and the grid.

    Frames are resized one by one as they are decoded, so that memory never holds the whole video.

    Raises:
        UserError: naming the file, if it cannot be used.
    """
    import torch

    shape = clip_shape(video, settings)
    indices = frame_indices(shape.frames, shape.fps, settings)
    (slices, rows, cols), _ = clip_layout(video, settings, images)
    size = (rows * images.patch_size, cols * images.patch_size)
    resized = np.empty((slices * images.temporal_patch_size, *size, 3), np.uint8)
    count = 0
    for frame in _decoded(video, indices, images.transparent_background):
        if frame.shape[:2] != (shape.height, shape.width):
            raise _unusable(_name(video), "its frames differ in size")
        # torch's kernel for bytes, as in the reference; Pillow's rounds differently
        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
        if frame.shape[:2] != size:
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        resized[count] = pixels[0].permute(1, 2, 0).numpy()
        count += 1
    if len(indices) - count > max(1, math.ceil(settings.fps)):
        raise _unusable(_name(video), f"only {count} of {len(indices)} frames can be decoded")
    if not count:
        raise _unusable(_name(video), "no frame can be decoded")
    resized[count:] = resized[count - 1]  # an uneven number, or a header that promises a frame too many
    return cut_patches(resized, images), (slices, rows, cols)


def _decoded(video: VideoSource, indices: np.ndarray, background: str | None) -> Iterator[np.ndarray]:
    """The frames with these indices, uint8 [height, width, 3]; ``background`` of those that are image files."""
    if not isinstance(video, str):
        yield from (load_pixels(video[index], background=background) for index in indices.tolist())
        return
    chosen = set(indices.tolist())
    with _opened(video) as container:
        container.streams.video[0].codec_context.thread_count = 1  # workers are processes, one per core
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                yield frame.to_ndarray(format="rgb24")
            if index >= indices[-1]:
                return


class _opened:
    """A video file opened for reading; errors become a UserError that names it."""

    def __init__(self, path: str) -> None:
        require_video_reader()
        self._path = path

    def __enter__(self) -> Any:
        import av

        try:
            os.close(open_regular(self._path, limit=DATA_BYTES))  # a FIFO would hang
            self._container = av.open(f"file:{self._path}", container_options=_OPTIONS)
        except OSError as error:
            raise _unusable(self._path, error) from error
        except Exception as error:  # PyAV raises many types for damaged files
            why = f"it is damaged, or in no container that is read ({_CONTAINERS_SHOWN})"
            raise _unusable(self._path, why) from error
        if not self._container.streams.video:
            self._container.close()
            raise _unusable(self._path, "it has no video stream")
        return self._container

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._container.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise _unusable(self._path, error) from error


def _name(video: VideoSource) -> str:
    return video if isinstance(video, str) else f"of {len(video)} frames from {shorten(video[0])}"


def _unusable(path: str, why: Exception | str) -> UserError:
    if isinstance(why, FileNotFoundError):
        why = "it is missing"
    elif isinstance(why, Exception):
        why = reason_of(why)
    return UserError(f"video {shorten(path)} cannot be used: {why}; restore or replace it, or remove its record")
