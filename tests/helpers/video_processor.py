"""Results of transformers' own video processor for some videos.

    python -m tests.helpers.video_processor OUTPUT.npz VIDEO ...

runs ``Qwen3VLVideoProcessor`` and ``Qwen3VLProcessor``'s timestamps. Both need torchvision, of which many machines have
no build that loads. Three ways are tried, in this order:

1. the installed torchvision;
2. the one in the directory $TORCHVISION_DIR (``pip install --no-deps --target DIR torchvision``): its Python code, with
   its missing compiled operators declared and never called;
3. a stand-in with the few functions that the processor calls. torchvision's ``resize`` hands bytes on a CPU to
   ``torch.nn.functional.interpolate`` as they are, and so does the stand-in.

Run in its own process, since transformers checks once whether torchvision is available.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROCESSOR = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "patch_size": 16, "merge_size": 2,
             "temporal_patch_size": 2, "min_frames": 4, "max_frames": 768, "image_mean": [0.5] * 3,
             "image_std": [0.5] * 3}
FPS = 2.0
SAMPLED = [(frames, fps) for frames in (1, 2, 3, 4, 5, 7, 30, 61, 299, 1000, 2999)
           for fps in (1.0, 7.5, 24.0, 30000 / 1001, 60.0)]
_MODES = ("NEAREST", "NEAREST_EXACT", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
_FUNCTIONAL = """
import torch
from torchvision.transforms import InterpolationMode

def resize(image, size, interpolation, antialias=True):
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    flat = image.reshape(-1, *image.shape[-3:])
    assert flat.dtype == torch.uint8 and interpolation == InterpolationMode.BICUBIC and antialias
    flat = torch.nn.functional.interpolate(flat, size=list(size), mode="bicubic", align_corners=False, antialias=True)
    return flat.reshape(*image.shape[:-2], *size)

def grayscale_to_rgb(image):
    assert image.shape[-3] == 3  # colours stay as they are
    return image

def normalize(image, mean, std, inplace=False):
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return image.sub(mean).div_(std)
"""


def _write_stand_in(directory: Path) -> None:
    modes = "".join(f"    {mode} = {mode.lower()!r}\n" for mode in _MODES)
    files = {
        "torchvision/__init__.py": "__version__ = '0.20.0'\n",
        "torchvision/io.py": "",
        "torchvision/transforms/__init__.py": f"import enum\nclass InterpolationMode(enum.Enum):\n{modes}",
        "torchvision/transforms/functional.py": "def pil_to_tensor(image):\n    raise NotImplementedError\n",
        "torchvision/transforms/v2/__init__.py": "",
        "torchvision/transforms/v2/functional.py": _FUNCTIONAL,
        "torchvision-0.20.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n",
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def _import_torchvision(place: Path) -> str:
    """Make ``import torchvision`` work; returns which of the three ways works."""
    directory = os.environ.get("TORCHVISION_DIR")
    if directory:
        sys.path.insert(0, directory)
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(library)
    try:
        return f"torchvision {importlib.import_module('torchvision').__version__}"
    except (ImportError, RuntimeError):
        if directory:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _write_stand_in(place)
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    importlib.import_module("torchvision.transforms.v2.functional")
    return "stand-in"


_KEPT: list[torch.library.Library] = []


def process(paths: list[str]) -> dict[str, Any]:
    """Pixels, grid, frames and seconds of each video, and the sampled frames of other lengths and rates."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata, load_video

    processor = Qwen3VLVideoProcessor(**PROCESSOR, fps=FPS)
    content: dict[str, Any] = {}
    for place, path in enumerate(paths):
        video, metadata = load_video(
            path, backend="pyav", sample_indices_fn=lambda metadata, **_: processor.sample_frames(metadata, fps=FPS)
        )
        made = processor(videos=[video], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        indices = np.asarray(metadata.frames_indices)
        content[f"pixels{place}"] = made["pixel_values_videos"].numpy()
        content[f"grid{place}"] = made["video_grid_thw"][0].numpy()
        content[f"frames{place}"] = indices
        content[f"seconds{place}"] = np.array(
            Qwen3VLProcessor._calculate_timestamps(None, indices.tolist(), metadata.fps, 2))
    for place, (frames, fps) in enumerate(SAMPLED):
        metadata = VideoMetadata(total_num_frames=frames, fps=fps)
        content[f"sampled{place}"] = np.asarray(processor.sample_frames(metadata, fps=FPS))
    return content


def main(arguments: list[str]) -> None:
    """Write the results of ``process``."""
    with tempfile.TemporaryDirectory() as place:
        by = _import_torchvision(Path(place))
        content = process(arguments[1:])
    np.savez(arguments[0], by=by, **content)
    print(by)


if __name__ == "__main__":
    main(sys.argv[1:])
