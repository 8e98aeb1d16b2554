"""Drawings: an image or video as the model sees it, with its patches, and histograms over the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.images import frames_of
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import GridTHW, MediaSettings

_BLUE, _ORANGE, _GREY, _GREEN = "#2a6f97", "#d9622b", "#666666", "#00c853"
_SLICES_SHOWN = 12
_BINS = 60


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--out needs matplotlib: pip install matplotlib, or run without --out") from error
    matplotlib.use("Agg")  # files only: there may be no display
    from matplotlib import pyplot

    return pyplot


def draw_media(
    path: Path,
    patches: np.ndarray,
    grid: GridTHW,
    settings: MediaSettings,
    *,
    title: str,
    boxes: Sequence[Sequence[float]] = (),
) -> None:
    """One image, or the first frame of each slice of a video, with lines between patches and merge blocks.

    Args:
        path: PNG file.
        patches: uint8 [t * rows * cols, patch_dim].
        grid: slices, rows and columns of patches.
        settings: patch sizes.
        title: of the drawing.
        boxes: ``[x1, y1, x2, y2]`` or ``[x, y]`` in fractions of width and height.
    """
    pyplot = _pyplot()
    frames = frames_of(patches, grid, settings)[:: settings.temporal_patch_size]
    shown = frames[:_SLICES_SHOWN]
    height, width = shown.shape[1:3]
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    side = 9.0 if len(shown) == 1 else 3.4
    scale = side / max(height, width)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(columns * width * scale + 0.6, lines * (height * scale + 0.3) + 0.7), squeeze=False,
        layout="constrained",
    )
    for number, axis in enumerate(axes.flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if number >= len(shown):
            axis.axis("off")
            continue
        axis.imshow(shown[number], interpolation="nearest", extent=(0, width, height, 0))
        _lines(axis, height, width, settings.patch_size, colour="black", weight=1.2, strength=0.25)
        _lines(axis, height, width, settings.patch_size, colour="white", weight=0.5)
        _lines(axis, height, width, settings.factor, colour=_ORANGE, weight=0.9)
        for box in boxes:
            points = np.array(box).reshape(-1, 2) * (width, height)
            corners = points[[0, 0, -1, -1, 0], 0], points[[0, -1, -1, 0, 0], 1]
            axis.plot(*corners, color=_GREEN, linewidth=2.5, marker="o", markersize=5 if len(points) == 1 else 0)
        if len(frames) > 1:
            axis.set_title(f"slice {number + 1} of {len(frames)}", fontsize=9, color=_GREY)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(
    axis: Any, height: int, width: int, step: int, *, colour: str, weight: float, strength: float = 0.8
) -> None:
    look = {"colors": colour, "linewidth": weight, "alpha": strength}
    axis.hlines(np.arange(step, height, step), 0, width, **look)
    axis.vlines(np.arange(step, width, step), 0, height, **look)


def draw_costs(path: Path, columns: dict[str, np.ndarray], *, limit: int, title: str) -> None:
    """A histogram for each column, with its median and its 99th percentile.

    Args:
        path: PNG file.
        columns: values per sample, by the name of their axis.
        limit: ``--seq-length``, drawn where the axis is tokens of a sample.
        title: of the whole.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (name, values) in zip(axes.flat, columns.items(), strict=False):
        bins = _BINS if values.dtype.kind == "f" else min(_BINS, max(10, int(np.ptp(values)) + 1))
        axis.hist(values, bins=bins, color=_BLUE)
        median, high = np.percentile(values, (50, 99))
        digits = ".2f" if values.dtype.kind == "f" else ",.0f"
        for value, style, label in ((median, "-", "median"), (high, "--", "99%")):
            axis.axvline(value, color=_ORANGE, linestyle=style, linewidth=1.3, label=f"{label} {value:{digits}}")
        if name.startswith("length") and values.max() > 0.8 * limit:
            axis.axvline(limit, color=_GREY, linestyle=":", label=f"--seq-length {limit:,}")
        axis.set_ylabel("samples")
        axis.spines[["top", "right"]].set_visible(False)
        total = "" if values.dtype.kind == "f" else f", total {values.sum():,.0f}"
        axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))  # above the bars
        axis.set_xlabel(f"{name}{total}")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
