"""Bicubic resizing and cutting into patches, compiled: Pillow's pixels, bit for bit, in a third of its time.

Pillow resizes one axis after the other and rounds to bytes in between; each weight is an integer of 22 fractional
bits. The kernels here compute the same sums in an order that suits SIMD units. Needs numba; ``images.py`` works without
it.

Shapes: H, W rows and columns of the image; h, w of the resized one. An image comes as [H, W, 3]; after its columns are
resized it is three planes, [3, H, w], from which patches are cut in whole words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numba
import numpy as np
from PIL import Image

_PRECISION = 22  # fractional bits of a weight: 255 times the sum of all weights then fits 32 bits
_HALF = np.int32(1 << (_PRECISION - 1))
_REACH = 2.0  # the cubic is zero beyond two pixels
_ROWS = 64  # rows handled together when columns are resized: enough lanes for vector units, few enough for a cache

compiled = numba.njit(nogil=True, cache=True)
_PIXELS = numba.types.Array(numba.uint8, 3, "C", readonly=True)  # one signature, so that each is compiled once
_OUT = numba.uint8[:, :, ::1]
RowsFirst = Callable[[int, int, int, int], bool]


@compiled
def _cubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < _REACH:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@compiled
def _weights(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First source index [target], number of sources [target] and weights int32 [target, most] along one axis."""
    scale = size / target
    widening = max(scale, 1.0)  # when shrinking, the cubic is stretched over all pixels that it has to average
    support = _REACH * widening
    most = int(math.ceil(support)) * 2 + 1
    starts, counts = np.empty(target, np.int64), np.empty(target, np.int64)
    weights, raw = np.zeros((target, most), np.int32), np.empty(most, np.float64)
    for place in range(target):
        center = (place + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), size) - start
        total = 0.0
        for tap in range(count):
            raw[tap] = _cubic((tap + start - center + 0.5) * (1.0 / widening))
            total += raw[tap]
        for tap in range(count):
            value = raw[tap] / total if total != 0.0 else raw[tap]
            weights[place, tap] = int(value * (1 << _PRECISION) + (0.5 if value >= 0 else -0.5))
        starts[place], counts[place] = start, count
    return starts, counts, weights


@compiled
def _clip(value: int) -> int:
    return min(max(value >> _PRECISION, 0), 255)


@numba.njit(_OUT(_PIXELS, numba.int64), nogil=True, cache=True)
def _resize_columns(source: np.ndarray, width: int) -> np.ndarray:
    """[H, W, 3] -> [3, H, at least w]. Rows go in groups, turned so that one weight meets neighbouring numbers.

    Lines are padded to an odd number of cache lines: at powers of two the lines of a group would evict each other.
    """
    height, columns, _ = source.shape
    starts, counts, weights = _weights(columns, width)
    out = np.empty((3, height, ((width + 63) // 64 | 1) * 64), np.uint8)
    turned = np.zeros((columns, _ROWS * 3), np.uint8)
    total, rounded = np.empty(_ROWS * 3, np.int32), np.empty(_ROWS * 3, np.uint8)
    for first in range(0, height, _ROWS):
        rows = min(_ROWS, height - first)
        for row in range(rows):
            for column in range(columns):
                for channel in range(3):
                    turned[column, row * 3 + channel] = source[first + row, column, channel]
        for column in range(width):
            for lane in range(_ROWS * 3):
                total[lane] = _HALF
            for tap in range(counts[column]):
                weight, pixels = weights[column, tap], turned[starts[column] + tap]
                for lane in range(_ROWS * 3):
                    total[lane] += np.int32(pixels[lane]) * weight
            for lane in range(_ROWS * 3):
                rounded[lane] = _clip(total[lane])
            for row in range(rows):
                for channel in range(3):
                    out[channel, first + row, column] = rounded[row * 3 + channel]
    return out


@numba.njit(_OUT(_PIXELS), nogil=True, cache=True)
def _planes(source: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [3, H, W]."""
    height, width, _ = source.shape
    out = np.empty((3, height, width), np.uint8)
    for row in range(height):
        for channel in range(3):
            for column in range(width):
                out[channel, row, column] = source[row, column, channel]
    return out


@numba.njit(_OUT(_PIXELS, numba.int64, numba.int64), nogil=True, cache=True)
def _resize_rows(planes: np.ndarray, height: int, lanes: int) -> np.ndarray:
    """[planes, H, at least lanes] -> [planes, h, lanes]."""
    count, size, _ = planes.shape
    starts, counts, weights = _weights(size, height)
    out, total = np.empty((count, height, lanes), np.uint8), np.empty(lanes, np.int32)
    for plane in range(count):
        for row in range(height):
            for lane in range(lanes):
                total[lane] = _HALF
            for tap in range(counts[row]):
                weight, pixels = weights[row, tap], planes[plane, starts[row] + tap]
                for lane in range(lanes):
                    total[lane] += np.int32(pixels[lane]) * weight
            for lane in range(lanes):
                out[plane, row, lane] = _clip(total[lane])
    return out


_CUTS = [word[:, :, :, :, ::1](word[:, :, ::1], *[numba.int64] * 4) for word in (numba.uint64, numba.uint8)]


@numba.njit(_CUTS, nogil=True, cache=True)
def _cut(planes: np.ndarray, patch: int, merge: int, frames: int, words: int) -> np.ndarray:
    """[3, h, w / word] -> [patches, 3, frames, patch, words]; ``words`` of a patch's line."""
    rows, columns = planes.shape[1] // patch, planes.shape[2] // words
    out = np.empty((rows * columns, 3, frames, patch, words), planes.dtype)
    for row in range(rows):
        for column in range(columns):
            block = row // merge * (columns // merge) + column // merge
            place = (block * merge + row % merge) * merge + column % merge
            for channel in range(3):
                for line in range(patch):
                    for word in range(words):
                        value = planes[channel, row * patch + line, column * words + word]
                        for frame in range(frames):
                            out[place, channel, frame, line, word] = value
    return out


def cut_patches(planes: np.ndarray, patch: int, merge: int, frames: int) -> np.ndarray:
    """Cut a resized image, uint8 [3, h, w], into patches of ``frames`` copies of it.

    Returns:
        uint8 [patches, 3 * frames * patch * patch], each merge block contiguous, within a patch ordered channel,
        frame, row, column.
    """
    size = 8 if patch % 8 == 0 else 1  # bytes of a word
    cut = _cut(planes.view(np.uint64) if size == 8 else planes, patch, merge, frames, patch // size)
    return cut.view(np.uint8).reshape(len(cut), -1)


# Which axis Pillow resizes first, by the sizes (H, W, h, w). It matters, since values are rounded to bytes in between.
# Pillow has changed the rule twice, so the installed version is probed with images on which the rules differ.
_RULES: tuple[RowsFirst, ...] = (
    lambda rows, columns, height, width: height < rows and rows - height > 2 * (columns - width),  # 13
    lambda rows, columns, height, width: height < rows and rows > 100 * columns,  # 12.2
    lambda rows, columns, height, width: False,
)
_PROBES = ((41, 13, 32, 45), (40, 30, 21, 20), (40, 30, 19, 20), (30, 40, 17, 9), (303, 3, 32, 9), (299, 3, 32, 5),
           (12, 40, 30, 20), (12, 10, 30, 20), (40, 12, 50, 9))


@cache
def pillow_order() -> RowsFirst | None:
    """The installed Pillow's rule, or None if no known rule gives its pixels."""
    noise = np.random.default_rng(0)
    cases = []
    for rows, columns, height, width in _PROBES:
        image = noise.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        cases.append((image, np.asarray(resized)))
    for rule in _RULES:
        if all(np.array_equal(resize(image, *expected.shape[:2], rule), expected) for image, expected in cases):
            return rule
    return None


def resize_planes(pixels: np.ndarray, height: int, width: int, rows_first: RowsFirst) -> np.ndarray:
    """Resize uint8 [H, W, 3] to uint8 [3, h, w], in the order that ``rows_first`` (``pillow_order``) gives."""
    columns = pixels.shape[1]
    if rows_first(*pixels.shape[:2], height, width):
        lines = pixels.reshape(1, len(pixels), columns * 3)
        pixels = _resize_rows(lines, height, columns * 3).reshape(height, columns, 3)
    planes = _planes(pixels) if columns == width else _resize_columns(pixels, width)
    if planes.shape[1] != height:
        return _resize_rows(planes, height, width)
    return np.ascontiguousarray(planes[:, :, :width])


def resize(pixels: np.ndarray, height: int, width: int, rows_first: RowsFirst) -> np.ndarray:
    """The same as uint8 [h, w, 3]."""
    return resize_planes(pixels, height, width, rows_first).transpose(1, 2, 0)
