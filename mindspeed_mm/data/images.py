"""Images: size after resizing, decoding, and cutting into patches.

The result, normalised, equals transformers' ``Qwen2VLImageProcessorPil`` after its ``load_image``. Pixels stay uint8
until they are on the device, which moves a quarter of the bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import BinaryIO

import numpy as np
from PIL import Image

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import MEDIA_BYTES, open_regular, reason, shorten
from mindspeed_mm.interfaces.media import GridTHW, MediaSettings

logger = logging.getLogger(__name__)
# Pillow warns of half the size that it refuses, and names no file
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_warned: set[str] = set()  # kinds of warnings that this process has given
MAX_ASPECT_RATIO = 200
DATA_URI = "data:"
_STRIP = 4 << 20  # pixels that are converted at a time
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow knows some forty formats, and runs Ghostscript for one of them
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_JPEG_TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # Huffman, quantisation, restarts, JFIF, comment


def resized_size(height: int, width: int, settings: MediaSettings) -> tuple[int, int]:
    """Height and width after resizing: multiples of the factor, area within the limits, aspect kept.

    Where the limits and the multiples cannot all hold (a very thin image), the multiples win.

    Raises:
        ValueError: if one side is more than 200 times the other; the reference refuses such an image, too.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
    factor = settings.factor
    sides = (height, width)
    rounded = [round(side / factor) * factor for side in sides]
    area = rounded[0] * rounded[1]
    if area > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        rounded = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif area < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in sides]
    return rounded[0], rounded[1]


@contextlib.contextmanager
def open_image(source: str | BinaryIO) -> Iterator[Image.Image]:
    """An image file or a base64 data URI, opened by one of the decoders that are meant for photos and drawings.

    Raises:
        UserError: naming the file, for whatever the decoder raises, inside the ``with`` block too.
    """
    name = source if isinstance(source, str) else "from memory"
    with _named(name), _binary(source) as file, Image.open(file, formats=_formats()) as image:
        yield image


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise almost anything for damaged files
        raise _unusable(path, error) from error


@contextlib.contextmanager
def _binary(source: str | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(source, str):
        yield source
    elif is_data_uri(source):
        head, _, content = source.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("a data URI must be base64 (data:image/png;base64,...); percent-encoding is not read")
        yield io.BytesIO(decode_base64(content))
    else:
        with os.fdopen(open_regular(source, limit=MEDIA_BYTES), "rb") as file:
            yield file


def is_data_uri(source: str) -> bool:
    """Whether an image's path is its content."""
    return source[: len(DATA_URI)].lower() == DATA_URI


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 text, which may be broken into lines.

    Raises:
        ValueError: if it is not base64.
    """
    return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; upright where a damaged EXIF does not tell."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow parses EXIF without checks; the pixels may be fine
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSED else 1


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are fractions, which would turn black; convert it to 8 bits")


def upright_size(path: str) -> tuple[int, int]:
    """Height and width of an image, turned upright by its EXIF orientation, from the file's header.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    with open_image(path) as image:
        _check_mode(image)
        width, height = image.size
        return (width, height) if _orientation(image) in _QUARTER_TURNS else (height, width)


def image_grid(path: str, settings: MediaSettings) -> GridTHW:
    """Grid (1, rows, columns) of patches that the image at ``path`` will have, from the file's header.

    Raises:
        UserError: naming the file, if it is missing, no image, or too thin.
    """
    with _named(path):
        rows, cols = resized_size(*upright_size(path), settings)
    return 1, rows // settings.patch_size, cols // settings.patch_size


def load_pixels(path: str, *, background: str | None = None) -> np.ndarray:
    """Decode an image, turned upright by its EXIF orientation: uint8 [height, width, 3], RGB.

    Args:
        path: the file.
        background: name of the colour behind transparent pixels; None for their hidden colour, as in transformers.

    Raises:
        UserError: naming the file, if it is missing, no image, or damaged.
    """
    with _named(path):
        with _binary(path) as file:
            content = file.read()
        decode = jpeg_decoder()
        if decode is not None and (is_plain_jpeg(content) or _is_upright_jpeg(content)):
            try:
                return decode(content)
            except ValueError:
                pass  # damaged or unusual: Pillow's pixels and errors are the reference
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_mode(image)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # whose second picture is a preview
                warn_once("frames", f"image {shorten(path)} has several frames, of which the first is used; a list of "
                          "image files is a video")
            # not ImageOps.exif_transpose: it writes the EXIF anew, and fails where a tag has an unusual type
            turn = _TRANSPOSED.get(_orientation(image))
            return _rgb(image if turn is None else image.transpose(turn), path, background)


def _rgb(image: Image.Image, path: str, background: str | None) -> np.ndarray:
    """The pixels as RGB, uint8 [height, width, 3]; a large image by strips, of which Pillow makes several copies."""

    def converted(strip: Image.Image) -> np.ndarray:
        flat = _without_transparency(strip, background)
        _warn_of_lost_content(strip, path, flattened=flat is not strip)
        return np.asarray(flat if flat.mode == "RGB" else flat.convert("RGB"))

    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return converted(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        pixels[top : top + rows] = converted(image.crop((0, top, image.width, min(top + rows, image.height))))
    return pixels


def _without_transparency(image: Image.Image, background: str | None) -> Image.Image:
    """The image in front of a background; as it is without one, or if no pixel can be transparent."""
    if background is None or not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    flat = Image.new("RGB", layer.size, background)
    flat.paste(layer, mask=layer)
    return flat


def _is_upright_jpeg(content: bytes) -> bool:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        return image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1


def _warn_of_lost_content(image: Image.Image, path: str, *, flattened: bool) -> None:
    """Say once what converting to RGB loses; transformers converts in the same way."""
    if image.mode.startswith("I"):
        warn_once("16-bit", f"image {shorten(path)} has more than 8 bits per pixel: values above 255 become white, as "
                   "in transformers; convert such images to 8 bits")
    elif (not flattened and "transparency" not in _warned and image.has_transparency_data
          and image.convert("RGBA").getextrema()[3][0] < 255):
        warn_once("transparency", f"image {shorten(path)} has transparent pixels, which get their hidden colour, "
                   "often black, as in transformers; for a white background set "
                   'preprocess_parameters.transparent_background to "white"')


def warn_once(kind: str, message: str) -> None:
    """Log a warning, the first of its kind in this process."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (logged once per process)", message)


def is_plain_jpeg(content: bytes) -> bool:
    """Whether a file's header is that of a colour JPEG in which Pillow would act on nothing but the pixels.

    EXIF and XMP (orientation), Adobe's segment (other colours), a second image, and a size that Pillow refuses make it
    not plain; Pillow decodes those.
    """
    place = 2 if content.startswith(b"\xff\xd8") else len(content)
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in _JPEG_FRAMES:
            height, width = (int.from_bytes(content[at : at + 2], "big") for at in (place + 5, place + 7))
            depth, channels = content[place + 4], content[place + 9]
            return (depth, channels) == (8, 3) and 0 < height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        is_profile = marker == 0xE2 and content.startswith(b"ICC_PROFILE\0", place + 4)
        if marker not in _JPEG_TABLES and not is_profile:
            return False
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return False


@cache
def jpeg_decoder() -> Callable[[bytes], np.ndarray] | None:
    """A decoder that gives Pillow's pixels in two thirds of its time, or None if there is none.

    Both are built on libjpeg-turbo; a trial shows whether the two builds agree.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=80, subsampling=subsampling)
        if not np.array_equal(simplejpeg.decode_jpeg(file.getvalue(), "RGB"), np.asarray(Image.open(file))):
            logger.info("images are decoded by Pillow: simplejpeg gives other pixels")
            return None
    return lambda content: simplejpeg.decode_jpeg(content, "RGB")


def _unusable(path: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        why = "it is missing"
    elif isinstance(error, Image.UnidentifiedImageError):
        why = f"it is not an image in a supported format ({', '.join(_formats())})"
    else:
        why = reason(error)
    return UserError(
        f"image {shorten(path)} cannot be used: {why}; restore or replace the file, or remove its record"
    )


@cache
def compiled_resampling() -> ModuleType | None:
    """The compiled resizing of ``resample.py``, or None where only Pillow's own gives Pillow's pixels.

    Call it once before worker processes start: loading takes seconds, and they inherit the result.
    """
    try:
        from mindspeed_mm.data import resample
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba finds no directory for compiled code
        logger.info("images are resized by Pillow, with the same result in three times the time: %s", error)
        return None
    if resample.pillow_order() is None:
        logger.info("images are resized by Pillow: this version resizes in an unknown order")
        return None
    return resample


def image_patches(pixels: np.ndarray, settings: MediaSettings) -> tuple[np.ndarray, GridTHW]:
    """Resize an image, uint8 [height, width, 3], and cut it into patches.

    Returns:
        Patches uint8 [rows * cols, 3 * temporal_patch_size * patch_size**2], each merge block contiguous, within a
        patch ordered channel, frame, row, column; and the grid (1, rows, cols).

    Raises:
        ValueError: if the image is too thin.
    """
    height, width = resized_size(*pixels.shape[:2], settings)
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    grid = (1, height // patch, width // patch)
    resample = compiled_resampling()
    if resample is not None:
        planes = resample.resize_planes(pixels, height, width, resample.pillow_order())
        return resample.cut_patches(planes, patch, merge, frames), grid
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), resample=Image.Resampling.BICUBIC))
    return cut_patches(np.broadcast_to(pixels, (frames, height, width, 3)), settings), grid


def cut_patches(frames: np.ndarray, settings: MediaSettings) -> np.ndarray:
    """Cut resized frames into patches.

    Args:
        frames: uint8 [number, height, width, 3]; the number a multiple of ``temporal_patch_size``, the sides of
            ``factor``.
        settings: patch sizes.

    Returns:
        uint8 [number / temporal_patch_size * rows * cols, 3 * temporal_patch_size * patch_size**2]: slices in order,
        within a slice each merge block contiguous, within a patch ordered channel, frame, row, column.
    """
    number, height, width, _ = frames.shape
    patch, merge, depth = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    rows, cols = height // patch // merge, width // patch // merge
    pieces = frames.reshape(number // depth, depth, rows, merge, patch, cols, merge, patch, 3)
    patches = np.ascontiguousarray(pieces.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7))
    return patches.reshape(-1, 3 * depth * patch * patch)


def frames_of(patches: np.ndarray, grid: GridTHW, settings: MediaSettings) -> np.ndarray:
    """Undo :func:`cut_patches`: uint8 [t * rows * cols, patch_dim] -> frames uint8 [frames, height, width, 3]."""
    slices, rows, cols = grid
    merge, patch, depth = settings.merge_size, settings.patch_size, settings.temporal_patch_size
    blocks = patches.reshape(slices, rows // merge, cols // merge, merge, merge, 3, depth, patch, patch)
    return blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(slices * depth, rows * patch, cols * patch, 3)
