"""How images and videos become patches: the data file's limits joined with those of the checkpoint's processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, is_present, read_json, shorten, shown
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from mindspeed_mm.models.layers.config import Field, check_fields, check_section, unknown_fields
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig

_HALF = [0.5, 0.5, 0.5]
_REMEDY = "take the file of the checkpoint again"
_COUNT, _COUNT_OR_NONE = (Field(int, high=1 << 40, nullable=nullable) for nullable in (False, True))
_EDGES = {"shortest_edge": _COUNT_OR_NONE, "longest_edge": _COUNT_OR_NONE}
_FIELDS = {
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size", "min_frames", "max_frames",
                     "max_video_tokens"), _COUNT),
    **dict.fromkeys(("min_pixels", "max_pixels"), _COUNT_OR_NONE),
    "image_mean": Field(list, low=-1e6, high=1e6, of=float, most=3),
    "image_std": Field(list, low=1e-6, high=1e6, of=float, most=3),
    "rescale_factor": Field(float, low=1e-9, high=1e6),
    "cap_pixels_per_frame": Field(bool, nullable=True),
    "fps": Field(float, low=1e-9, high=1e6, nullable=True),
}
# Fields with the values that mean what is computed here, the usual one first; null switches a step off in transformers.
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), (True,)),
    "resample": (3,),  # bicubic
    "do_center_crop": (False, None),
}
_IMAGES, _VIDEOS = "image_processor", "video_processor"  # keys of processor_config.json
_FIXED_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    _IMAGES: {**_FIXED,
              "image_processor_type": (*(f"Qwen2VLImageProcessor{end}" for end in ("", "Fast", "Pil")), None)},
    _VIDEOS: {**_FIXED, "video_processor_type": ("Qwen3VLVideoProcessor", None), "do_sample_frames": (True,),
              "num_frames": (None,)},
}
_PATCHES = ("patch_size", "temporal_patch_size", "merge_size")
# transformers' defaults, but None where they are those of another model family
_DEFAULTS: dict[str, dict[str, Any]] = {
    _IMAGES: {"patch_size": None, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255,
              "image_mean": None, "image_std": None},
    _VIDEOS: {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255,
              "image_mean": _HALF, "image_std": _HALF, "min_frames": 4, "max_frames": 768,
              "max_video_tokens": 768},
}
_WITHOUT_EFFECT = frozenset("""
    size processor_class feature_extractor_type crop_size do_pad pad_size default_to_square data_format
    input_data_format device return_tensors disable_grouping image_seq_length return_metadata video_metadata
    image_processor_type video_processor_type _valid_processor_keys _valid_kwargs_names
""".split())
_OLDER_NAMES = {"min_pixels": "size.shortest_edge", "max_pixels": "size.longest_edge"}
_AREA, _AREA_OR_NONE = Field(int, high=1 << 40), Field(int, low=0, high=1 << 40)
_TRAINED = dict.fromkeys(("min_pixels", "max_pixels", "patch_size", "merge_size"), _AREA)
_TRAINED_NORM = ("image_mean", "image_std", "rescale_factor")
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
    path, settings = _read_processor_config(Path(directory), name="preprocessor_config.json", part=_IMAGES, why="")
    least, most = settings["size.shortest_edge"], settings["size.longest_edge"]
    for name in ("patch_size", "image_mean", "image_std"):
        if settings[name] is None:
            raise UserError(f"{path} lacks {name}; {_REMEDY}")
    _check_patches(path, settings, (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size))
    low, high = max(min_pixels, least), min(max_pixels, most)
    if low > high:
        raise UserError(
            f"image_min_pixels {min_pixels} .. image_max_pixels {max_pixels} of the data file and {least} .. {most} of "
            f"{path} have nothing in common; choose image_max_pixels of at least {least} and image_min_pixels of at "
            f"most {most}"
        )
    norm = PixelNorm(
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
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
    path, settings = _read_processor_config(
        Path(directory),
        name="video_preprocessor_config.json",
        part=_VIDEOS,
        why=", and attr.videos names a column of videos",
    )
    least, most = settings["size.shortest_edge"], settings["size.longest_edge"]
    _check_patches(path, settings, (images.patch_size, images.temporal_patch_size, images.merge_size))
    norm = images.norm
    for name, ours in (
        ("image_mean", list(norm.mean)), ("image_std", list(norm.std)), ("rescale_factor", norm.rescale_factor)
    ):
        if settings[name] != ours:
            raise UserError(f"{path}: {name} is {shown(settings[name])}, but {shown(ours)} for images; both must be "
                            "the same")
    if settings["cap_pixels_per_frame"]:
        # as transformers: a frame has at least 1.05 times the fewest pixels of a video
        cap = max(settings["max_video_tokens"] * images.factor**2, int(least * 1.05))
        if cap < min_pixels:
            raise UserError(f"{path}: cap_pixels_per_frame allows {cap} pixels of a frame, fewer than video_min_pixels "
                            f"{min_pixels} of the data file; lower video_min_pixels, or raise max_video_tokens")
        max_pixels = min(max_pixels, cap)
    most_frames = min(max_frames, settings["max_frames"])
    least_frames = min(settings["min_frames"], most_frames)
    return VideoSettings(min_pixels, max_pixels, least, most, fps, least_frames, most_frames)


def _effective(content: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a processor does by its file and transformers' defaults."""
    size = content.get("size") or {}
    older = content if part == _IMAGES else {}  # where an older name wins, as in transformers
    return {
        **{name: content.get(name, default) for name, default in _DEFAULTS[part].items()},
        "size.shortest_edge": older.get("min_pixels") or size.get("shortest_edge"),
        "size.longest_edge": older.get("max_pixels") or size.get("longest_edge"),
        "cap_pixels_per_frame": bool(content.get("cap_pixels_per_frame")),
    }


def ignored_fields(directory: str | Path, *, fps: float | None) -> list[str]:
    """Lines that name fields of the processors' files from which a user may expect an effect that they do not have.

    Args:
        directory: Hugging Face directory.
        fps: ``video_fps`` of the data file; None if there are no videos.

    Raises:
        UserError: if a file cannot be read.
    """
    files = [("preprocessor_config.json", _IMAGES), *([("video_preprocessor_config.json", _VIDEOS)] if fps else [])]
    lines = []
    for name, part in files:
        for path, content in _processor_files(Path(directory), name=name, part=part):
            known = {*_FIELDS, *_FIXED_OF[part], *_WITHOUT_EFFECT} - set(_OLDER_NAMES if part == _VIDEOS else ())
            unknown = unknown_fields(content, known)
            if unknown := [*unknown, *unknown_fields(content.get("size") or {}, _EDGES, name="size")]:
                lines.append(f"{path}: these fields have no effect: {shorten(', '.join(unknown), 400)}")
            if part == _VIDEOS and content.get("fps", 2) not in (2, fps):
                lines.append(f"{path}: fps {shown(content['fps'])} has no effect; the data file's video_fps is {fps}")
    return lines


def _check_patches(path: Path, settings: Mapping[str, Any], wanted: tuple[int, int, int]) -> None:
    """Check that a processor cuts patches as the model takes them: patch size, frames of a patch, merged per side.

    Raises:
        UserError: naming ``path``, the field and its value.
    """
    for name, ours in zip(_PATCHES, wanted, strict=True):
        if settings[name] != ours:
            raise UserError(f"{path}: {name} is {shown(settings[name])}, but {ours} in config.json; take both files of "
                            "one checkpoint")


def _check_types(content: Mapping[str, Any], source: str, part: str) -> None:
    """Check the fields that are read, and those that could switch on or off what is not computed here.

    Raises:
        UserError: naming ``source``, the field and its value.
    """
    if (size := content.get("size")) is not None:
        check_section(size, source=source, name="size")
        check_fields(size, _EDGES, source=source, name="size")
    check_fields(content, _FIELDS, source=source)
    for name in ("image_mean", "image_std"):
        if len(content.get(name, _HALF)) != 3:
            raise UserError(f"{source}: {name} is {shown(content[name])}; it must be a list of three numbers")
    for name, values in _FIXED_OF[part].items():
        value = content.get(name, values[0])
        if value not in values:
            raise UserError(f"{source}: {name} is {shown(value)}; only {shown(values[0])} is computed here: {_REMEDY}")
    settings = _effective(content, part)
    for low, high in (("size.shortest_edge", "size.longest_edge"), ("min_frames", "max_frames")):
        least, most = settings.get(low, 0), settings.get(high, 0)
        if least is None or most is None:
            raise UserError(f"{source} lacks {low} or {high}; {_REMEDY}")
        if least > most:
            raise UserError(f"{source}: {low} {least} exceeds {high} {most}; {_REMEDY}")


def _processor_files(directory: Path, *, name: str, part: str) -> Iterator[tuple[Path, Any]]:
    """A processor's own file and its part of ``processor_config.json``, those that there are, with their content.

    From version 5 on transformers takes the part in ``processor_config.json``, before it the own file.
    """
    own, joint = directory / name, directory / "processor_config.json"
    if has_own := is_present(own):
        yield own, read_json(own, remedy=_REMEDY)
    if is_present(joint):
        content = read_json(joint, remedy=_REMEDY)
        if part in content or not has_own:  # before version 5 it holds other settings
            yield joint, content.get(part)


def _read_processor_config(directory: Path, *, name: str, part: str, why: str) -> tuple[Path, dict[str, Any]]:
    """A processor's file and what it does, see :func:`_effective`.

    Args:
        directory: Hugging Face directory.
        name: the processor's own file, as published.
        part: its key in ``processor_config.json``, in which transformers 5 keeps all processors together.
        why: appended to the path in the message if neither file exists.

    Raises:
        UserError: if there is none, it cannot be read, or both exist and differ, of which versions of transformers
            take the one or the other.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for path, content in _processor_files(directory, name=name, part=part):
        if not isinstance(content, dict):
            raise UserError(f"{path} has no object {part}, but {shown(content)}; {_REMEDY}")
        _check_types(content, str(path), part)
        found.append((path, _effective(content, part)))
    for field, value in found[0][1].items() if len(found) == 2 else ():
        (path, _), (joint, other) = found
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
    norm = _trained_norm(trained, source)
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("preprocessor_config.json", _IMAGES,
         {"size.shortest_edge": trained["min_pixels"], "size.longest_edge": trained["max_pixels"], **norm})
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
            **norm,
        }
        wanted.append(("video_preprocessor_config.json", _VIDEOS, fields))
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
            defaults = {field: value for field, value in _DEFAULTS[part].items() if field in _TRAINED_NORM}
            if found := _set_fields(section, fields, defaults):
                files[file] = content
                changes += [f"{file}: {change}" for change in found]
    return files, changes


def _trained_norm(trained: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of the training's normalisation; none if it is not recorded."""
    if (norm := trained.get("norm")) is None:
        return {}
    check_section(norm, source=source, name="norm")
    fields = {name: norm.get(name.removeprefix("image_")) for name in _TRAINED_NORM}
    check_fields(fields, {name: _FIELDS[name] for name in _TRAINED_NORM}, source=source, name="norm")
    return {name: value for name, value in fields.items() if value is not None}


def _set_fields(section: dict[str, Any], fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Set dotted fields of a processor; returns ``field old -> new`` for each that was another.

    ``defaults``: what a field that is not there means.
    """
    # older names, which transformers prefers where a file has them
    older = {name: fields[path] for name, path in _OLDER_NAMES.items() if section.get(name) is not None}
    changes = []
    for path, value in {**fields, **older}.items():
        parent, _, name = path.rpartition(".")
        if parent and not isinstance(section.get(parent), dict):
            section[parent] = {}
        holder = section[parent] if parent else section
        if holder.get(name, defaults.get(name)) != value:
            changes.append(f"{path} {shown(holder.get(name))} -> {shown(value)}")
            holder[name] = value
    return changes
