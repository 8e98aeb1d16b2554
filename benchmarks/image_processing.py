"""CPU time per image: this project's image processing against transformers' PIL processor, in the same run.

    python benchmarks/image_processing.py [--rounds 15] [--min-pixels 65536] [--max-pixels 262144] [--pillow] [--json F]

Real photographs (scikit-learn's two samples) in several sizes, as JPEG. Two comparisons: "process" starts from a
decoded image, "decode + process" from the file, as training does. This project returns uint8 patches, transformers
float32 ones; our normalisation runs on the device, and the table lists its time on the CPU separately. Both alternate
within a round, on one thread; the figures are medians of CPU time, which other programs hardly affect. Before timing,
the pixels are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from mindspeed_mm.data import images
from mindspeed_mm.data.images import image_patches, load_pixels
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm

SIZES = ((640, 480), (480, 640), (500, 375), (1920, 1080))
HALF = (0.5, 0.5, 0.5)


def reference_processor(least: int, most: int) -> Any:
    """transformers' processor with the published settings of Qwen3-VL and the given limits."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # its name in transformers 4
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    return Processor(
        size={"shortest_edge": least, "longest_edge": most}, patch_size=16, merge_size=2, temporal_patch_size=2,
        image_mean=list(HALF), image_std=list(HALF),
    )


def photographs(directory: Path) -> list[Path]:
    """The sample photographs, cropped and scaled to ``SIZES``."""
    from PIL import ImageOps
    from sklearn.datasets import load_sample_images

    paths = []
    for index, photo in enumerate(load_sample_images().images):
        for width, height in SIZES:
            path = directory / f"{width}x{height}-{index}.jpg"
            ImageOps.fit(Image.fromarray(photo), (width, height)).save(path, quality=90)
            paths.append(path)
    return paths


def on_device(patches: np.ndarray) -> torch.Tensor:
    """Normalise our patches, as the device does."""
    return (torch.from_numpy(patches).float() / 255 - 0.5) / 0.5


def measure(path: Path, settings: MediaSettings, processor: Any, rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time for each step on one image, after checking that the results are equal."""
    from transformers.image_utils import load_image as load_reference

    pixels, decoded = load_pixels(str(path)), load_reference(str(path))
    ours, theirs = image_patches(pixels, settings)[0], processor([decoded], return_tensors="pt")["pixel_values"]
    if not torch.equal(on_device(ours), theirs):
        raise SystemExit(f"error: {path.name}: our pixels differ from transformers'; timing makes no sense")
    steps: dict[str, Callable[[], Any]] = {
        "ours, process": lambda: image_patches(pixels, settings),
        "transformers, process": lambda: processor([decoded], return_tensors="pt"),
        "ours, decode + process": lambda: image_patches(load_pixels(str(path)), settings),
        "transformers, decode + process": lambda: processor([load_reference(str(path))], return_tensors="pt"),
        "normalisation of ours": lambda: on_device(ours),
        "decode of ours": lambda: load_pixels(str(path)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-pixels", type=int, default=65536, help="the recipe's, after both files' limits")
    parser.add_argument("--max-pixels", type=int, default=262144)
    parser.add_argument("--pillow", action="store_true", help="as on a machine without numba and simplejpeg")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.pillow:
        images.compiled_resampling = images.jpeg_decoder = lambda: None  # type: ignore[assignment]
    torch.set_num_threads(1)
    norm = PixelNorm(mean=HALF, std=HALF, rescale_factor=1 / 255)
    settings = MediaSettings(options.min_pixels, options.max_pixels, 16, 2, 2, norm)
    processor = reference_processor(options.min_pixels, options.max_pixels)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = photographs(Path(directory))
        for size in SIZES:
            label = f"{size[0]}x{size[1]}"
            each = [measure(path, settings, processor, options.rounds) for path in paths if path.name.startswith(label)]
            results[label] = {name: statistics.mean(one[name] for one in each) for name in each[0]}

    print(f"{'ms of CPU time per image':32s}" + "".join(f"{label:>12s}" for label in results))
    for name in next(iter(results.values())):
        print(f"{name:32s}" + "".join(f"{times[name]:12.2f}" for times in results.values()))
    for part in ("process", "decode + process"):
        for times in results.values():
            times[f"ratio, {part}"] = times[f"transformers, {part}"] / times[f"ours, {part}"]
        print(f"{'ratio, ' + part:32s}" + "".join(f"{times[f'ratio, {part}']:11.1f}x" for times in results.values()))
    if options.json:
        import transformers

        about = {
            "rounds": options.rounds, "limits": [options.min_pixels, options.max_pixels],
            "resizing": "compiled" if images.compiled_resampling() else "Pillow",
            "decoding": "simplejpeg" if images.jpeg_decoder() else "Pillow", "machine": platform.processor(),
            "python": platform.python_version(), "pillow": PIL.__version__, "transformers": transformers.__version__,
        }
        options.json.write_text(json.dumps({"about": about, "milliseconds": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
