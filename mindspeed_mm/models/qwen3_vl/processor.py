"""How images and videos become patches: the data file's limits joined with those of the checkpoint's processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, shown
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from mindspeed_mm.models.layers.config import Field, check_fields, check_section
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig

_REMEDY = "take the file of the checkpoint again"
_COUNT = Field(int, high=1 << 40, nullable=True)
_EDGES = {"shortest_edge": _COUNT, "longest_edge": _COUNT}
_FIELDS = {
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "min_frames",
                     "max_frames"), _COUNT),
    "image_mean": Field(list, low=-1e6, high=1e6, nullable=True, of=float, most=3),
    "image_std": Field(list, low=1e-6, high=1e6, nullable=True, of=float, most=3),
    "rescale_factor": Field(float, low=1e-9, high=1e6, nullable=True),
}


def read_image_settings(
    directory: str | Path, *, min_pixels: int, max_pixels: int, vision: Qwen3VLVisionConfig
) -> MediaSettings:
    """Join the data file's pixel limits with those of the checkpoint's image processor.

    An image is resized once, to the intersection of both ranges, so that training sees the same pixels as inference
    with the checkpoint's own processor.

    Args:
        directory: Hugging Face directory with ``preprocessor_config.json`` (or a ``processor_config.json`` that holds
            it, as transformers 5 writes).
        min_pixels: ``image_min_pixels`` of the data file.
        max_pixels: ``image_max_pixels`` of the data file.
        vision: the model's patch sizes, which the processor must share.

    Raises:
        UserError: if the file is missing or unreadable, contradicts the model, or leaves no common range.
    """
    path, content = _read_processor_config(
        Path(directory), name="preprocessor_config.json", part="image_processor", why=""
    )
    size = content.get("size") or {}
    least = size.get("shortest_edge") or content.get("min_pixels")
    most = size.get("longest_edge") or content.get("max_pixels")
    if not least or not most:
        raise UserError(f"{path} lacks size.shortest_edge or size.longest_edge; {_REMEDY}")
    for name, ours, default in (
        ("patch_size", vision.patch_size, vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size, 2),
        ("merge_size", vision.spatial_merge_size, 2),
    ):
        theirs = content.get(name, default)
        if theirs != ours:
            raise UserError(
                f"{path}: {name} is {shown(theirs)}, but {ours} in config.json; take both files of one checkpoint"
            )
    low, high = max(min_pixels, least), min(max_pixels, most)
    if low > high:
        raise UserError(
            f"image_min_pixels {min_pixels} .. image_max_pixels {max_pixels} of the data file and {least} .. {most} of "
            f"{path} have nothing in common; choose image_max_pixels of at least {least} and image_min_pixels of at "
            f"most {most}"
        )
    norm = PixelNorm(
        mean=tuple(content.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(content.get("image_std") or (0.5, 0.5, 0.5)),
        rescale_factor=content.get("rescale_factor") or 1 / 255,
    )
    return MediaSettings(low, high, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, norm)


def read_video_settings(
    directory: str | Path, *, min_pixels: int, max_pixels: int, fps: float, max_frames: int, images: MediaSettings
) -> VideoSettings:
    """Join the data file's limits with those of the checkpoint's video processor.

    Args:
        directory: Hugging Face directory with ``video_preprocessor_config.json`` (or a ``processor_config.json`` that
            holds it, as transformers 5 writes).
        min_pixels: ``video_min_pixels`` of the data file.
        max_pixels: ``video_max_pixels`` of the data file.
        fps: ``video_fps`` of the data file.
        max_frames: ``video_maxlen`` of the data file.
        images: the image processor's settings, which must normalise in the same way.

    Raises:
        UserError: if the file is missing or unreadable, or normalises pixels in another way than images.
    """
    path, content = _read_processor_config(
        Path(directory),
        name="video_preprocessor_config.json",
        part="video_processor",
        why=", and attr.videos names a column of videos",
    )
    size = content.get("size") or {}
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if not least or not most:
        raise UserError(f"{path} lacks size.shortest_edge or size.longest_edge; {_REMEDY}")
    for name, ours in (("image_mean", images.norm.mean), ("image_std", images.norm.std)):
        theirs = tuple(content.get(name) or ours)
        if theirs != ours:
            raise UserError(f"{path}: {name} is {list(theirs)}, but {list(ours)} for images; both must be the same")
    most_frames = min(max_frames, content.get("max_frames") or max_frames)
    least_frames = min(content.get("min_frames") or 4, most_frames)
    return VideoSettings(min_pixels, max_pixels, least, most, fps, least_frames, most_frames)


def _check_types(content: Mapping[str, Any], source: str) -> None:
    """Check the fields that are read.

    Raises:
        UserError: naming ``source``, the field and its value.
    """
    if (size := content.get("size")) is not None:
        check_section(size, source=source, name="size")
        check_fields(size, _EDGES, source=source, name="size")
    check_fields(content, _FIELDS, source=source)
    for name in ("image_mean", "image_std"):
        values = content.get(name)
        if values is not None and len(values) != 3:
            raise UserError(f"{source}: {name} is {shown(values)}; it must be a list of three numbers")
    ranges = (("shortest_edge", "longest_edge", size or {}), ("min_frames", "max_frames", content))
    for low, high, section in ranges:
        if (section.get(low) or 0) > (section.get(high) or _COUNT.high):
            raise UserError(f"{source}: {low} {section[low]} exceeds {high} {section[high]}; {_REMEDY}")


def _read_processor_config(directory: Path, *, name: str, part: str, why: str) -> tuple[Path, Mapping[str, Any]]:
    """A processor's file and its content.

    Args:
        directory: Hugging Face directory.
        name: the processor's own file, as published.
        part: its key in ``processor_config.json``, in which transformers 5 keeps all processors together.
        why: appended to the path in the message if neither file exists.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    for path, key in ((directory / name, None), (directory / "processor_config.json", part)):
        if not is_present(path):
            continue
        content = read_json(path, remedy=_REMEDY)
        content = content.get(key) if key else content
        if not isinstance(content, dict):
            raise UserError(f"{path} has no object {key}, but {shown(content)}; {_REMEDY}")
        _check_types(content, str(path))
        return path, content
    raise UserError(
        f"{directory / name} does not exist{why}; model_name_or_path must be the downloaded checkpoint with all its "
        "small files (step 2 of the guide)"
    )
