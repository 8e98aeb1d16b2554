"""How images and videos become patches: the data file's limits joined with those of the checkpoint's processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, is_present, read_json, shown
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from mindspeed_mm.models.layers.config import Field, check_fields, check_section
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig

_HALF = [0.5, 0.5, 0.5]
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
# what is computed here, as the processors do by default; 3: bicubic
_FIXED = {**dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True), "resample": 3}
_OLDER_NAMES = {"min_pixels": "size.shortest_edge", "max_pixels": "size.longest_edge"}
_AREA, _AREA_OR_NONE = Field(int, high=1 << 40), Field(int, low=0, high=1 << 40)
_TRAINED = dict.fromkeys(("min_pixels", "max_pixels", "patch_size", "merge_size"), _AREA)
_TRAINED_VIDEOS = {
    **dict.fromkeys(("max_pixels", "min_volume", "max_volume", "min_frames", "max_frames"), _AREA),
    "min_pixels": _AREA_OR_NONE,
    "fps": Field(float, low=1e-9, high=1e6),
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
    settings = _effective(content)
    least, most = settings["size.shortest_edge"], settings["size.longest_edge"]
    if not least or not most:
        raise UserError(f"{path} lacks size.shortest_edge or size.longest_edge; {_REMEDY}")
    _check_patches(path, content, (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size))
    low, high = max(min_pixels, least), min(max_pixels, most)
    if low > high:
        raise UserError(
            f"image_min_pixels {min_pixels} .. image_max_pixels {max_pixels} of the data file and {least} .. {most} of "
            f"{path} have nothing in common; choose image_max_pixels of at least {least} and image_min_pixels of at "
            f"most {most}"
        )
    for name in ("image_mean", "image_std"):
        if not content.get(name):  # transformers takes those of another model family
            raise UserError(f"{path} lacks {name}; {_REMEDY}")
    norm = PixelNorm(
        mean=tuple(content["image_mean"]),
        std=tuple(content["image_std"]),
        rescale_factor=settings["rescale_factor"],
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
    _check_patches(path, content, (images.patch_size, images.temporal_patch_size, images.merge_size))
    norm = images.norm
    for name, ours, default in (("image_mean", norm.mean, _HALF), ("image_std", norm.std, _HALF),
                                ("rescale_factor", norm.rescale_factor, 1 / 255)):
        theirs = content.get(name) or default
        if theirs != (list(ours) if isinstance(ours, tuple) else ours):
            raise UserError(f"{path}: {name} is {shown(theirs)}, but {shown(ours)} for images; both must be the same")
    most_frames = min(max_frames, content.get("max_frames") or max_frames)
    least_frames = min(content.get("min_frames") or 4, most_frames)
    return VideoSettings(min_pixels, max_pixels, least, most, fps, least_frames, most_frames)


def _effective(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor reads from its file, with transformers' defaults where they do not depend on the model."""
    size = content.get("size") or {}
    names = ("image_mean", "image_std", "patch_size", "min_frames", "max_frames")
    return {
        # an older name wins, as in transformers
        "size.shortest_edge": content.get("min_pixels") or size.get("shortest_edge"),
        "size.longest_edge": content.get("max_pixels") or size.get("longest_edge"),
        "rescale_factor": content.get("rescale_factor") or 1 / 255,
        "temporal_patch_size": content.get("temporal_patch_size") or 2,
        "merge_size": content.get("merge_size") or 2,
        **{name: content.get(name) for name in names},
    }


def _check_patches(path: Path, content: Mapping[str, Any], wanted: tuple[int, int, int]) -> None:
    """Check that a processor cuts patches as the model takes them: patch size, frames of a patch, merged per side.

    Raises:
        UserError: naming ``path``, the field and its value.
    """
    for name, ours in zip(("patch_size", "temporal_patch_size", "merge_size"), wanted, strict=True):
        theirs = content.get(name)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"{path}: {name} is {shown(theirs)}, but {ours} in config.json; take both files of one checkpoint"
            )


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
    for name, fixed in _FIXED.items():
        value = content.get(name)
        if value not in (None, fixed):
            raise UserError(f"{source}: {name} is {shown(value)}; only {shown(fixed)} is computed here: {_REMEDY}")
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
        UserError: if there is none, it cannot be read, or both exist and differ, of which versions of transformers
            take the one or the other.
    """
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for path, key in ((directory / name, None), (directory / "processor_config.json", part)):
        if not is_present(path):
            continue
        content = read_json(path, remedy=_REMEDY)
        if key and key not in content and found:  # before version 5 it holds other settings
            continue
        content = content.get(key) if key else content
        if not isinstance(content, dict):
            raise UserError(f"{path} has no object {key}, but {shown(content)}; {_REMEDY}")
        _check_types(content, str(path))
        found.append((path, content))
    if len(found) == 2:
        (path, _), (joint, _) = found
        one, other = (_effective(content) for _, content in found)
        for field, value in one.items():
            if value != other[field]:
                raise UserError(f"{path}: {field} is {shown(value)}, but {shown(other[field])} in {joint}; make both "
                                "the same, or remove one of the files")
    if found:
        return found[0]
    raise UserError(
        f"{directory / name} does not exist{why}; model_name_or_path must be the downloaded checkpoint with all its "
        "small files (step 2 of the guide)"
    )


def with_trained_limits(
    directory: Path, trained: Mapping[str, Any], *, source: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Processor files of a model with the limits of its training's images and videos.

    Images are then resized as in training. A video's frames are chosen as in training; ``cap_pixels_per_frame`` makes
    them as large as in training if their number is even, where transformers knows it. Else only all frames together
    are limited. Processors have no lower limit of one frame, ``video_min_pixels``.

    Args:
        directory: Hugging Face directory with the processors' own files, or ``processor_config.json``, or both.
        trained: :class:`MediaSettings` of the training, as a manifest has them.
        source: names ``trained``, for messages.

    Returns:
        Name -> content of each file that has other limits, and each change as ``file: field old -> new``.

    Raises:
        UserError: if ``trained`` or a file holds values that such limits cannot have.
    """
    check_section(trained, source=source, name="the record")
    check_fields({**dict.fromkeys(_TRAINED), **trained}, _TRAINED, source=source)
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("preprocessor_config.json", "image_processor",
         {"size.shortest_edge": trained["min_pixels"], "size.longest_edge": trained["max_pixels"]})
    ]
    if (videos := trained.get("videos")) is not None:
        check_section(videos, source=source, name="videos")
        check_fields({**dict.fromkeys(_TRAINED_VIDEOS), **videos}, _TRAINED_VIDEOS, source=source, name="videos")
        tokens = videos["max_pixels"] // (trained["patch_size"] * trained["merge_size"]) ** 2
        fields = {
            "size.shortest_edge": videos["min_volume"],
            "size.longest_edge": min(videos["max_volume"], videos["max_pixels"] * videos["max_frames"]),
            **{name: videos[name] for name in ("fps", "min_frames", "max_frames")},
            "cap_pixels_per_frame": True,
            "max_video_tokens": max(1, tokens),
        }
        wanted.append(("video_preprocessor_config.json", "video_processor", fields))
    files: dict[str, dict[str, Any]] = {}
    changes: list[str] = []
    for name, part, fields in wanted:
        for file, key in ((name, None), ("processor_config.json", part)):
            path = directory / file
            content = files.get(file) or (read_json(path, remedy=_REMEDY) if is_file(path) else {})
            section = content if key is None else content.get(key)
            if not section:
                continue
            check_section(section, source=str(path), name=key or "the file")
            if found := _set_fields(section, fields):
                files[file] = content
                changes += [f"{file}: {change}" for change in found]
    return files, changes


def _set_fields(section: dict[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Set dotted fields of a processor; returns ``field old -> new`` for each that was another."""
    # older names, which transformers prefers where a file has them
    older = {name: fields[path] for name, path in _OLDER_NAMES.items() if section.get(name) is not None}
    changes = []
    for path, value in {**fields, **older}.items():
        parent, _, name = path.rpartition(".")
        if parent and not isinstance(section.get(parent), dict):
            section[parent] = {}
        holder = section[parent] if parent else section
        if holder.get(name) != value:
            changes.append(f"{path} {shown(holder.get(name))} -> {shown(value)}")
            holder[name] = value
    return changes
