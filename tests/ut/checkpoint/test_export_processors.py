"""An export's processors have the limits of the training, as the installed transformers reads them."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import MANIFEST, MEDIA_KEY
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.data.images import resized_size
from mindspeed_mm.data.videos import clip_size
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

ROOT = Path(__file__).parents[3]
COMMON = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGES: dict[str, Any] = {
    **COMMON, "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
}
VIDEOS: dict[str, Any] = {
    **COMMON, "size": {"shortest_edge": 4096, "longest_edge": 25165824}, "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}
SETTINGS = MediaSettings(
    65536, 262144, 16, 2, 2, PixelNorm((0.5,) * 3, (0.5,) * 3, 1 / 255),
    VideoSettings(0, 16384, 4096, 25165824, fps=1.0, min_frames=4, max_frames=64),
)
TRAINED = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))  # as in a manifest
FILES = {
    "own files": {"preprocessor_config.json": IMAGES, "video_preprocessor_config.json": VIDEOS},
    "one file": {"processor_config.json": {"image_processor": IMAGES, "video_processor": VIDEOS,
                                           "processor_class": "Qwen3VLProcessor"}},
    "older names": {"preprocessor_config.json": {**IMAGES, "min_pixels": 3136, "max_pixels": 12845056},
                    "video_preprocessor_config.json": VIDEOS},
}
READ = """
import json, sys, tempfile
from pathlib import Path
from tests.helpers.video_processor import _import_torchvision
with tempfile.TemporaryDirectory() as place:
    _import_torchvision(Path(place))
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(sys.argv[1])
images, videos = processor.image_processor, processor.video_processor
sizes = json.loads(sys.stdin.read())
fields = ("fps", "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens")
edges = lambda size: [size["shortest_edge"], size["longest_edge"]]
print(json.dumps({
    "images": edges(images.size), "videos": edges(videos.size),
    **{name: getattr(videos, name, None) for name in fields},
    "knows the cap": hasattr(type(videos), "cap_pixels_per_frame"),
    "image patches": [images.get_number_of_image_patches(*size) for _, *size in sizes],
    "clip patches": [videos.get_num_of_video_patches(*size) for size in sizes],
}))
"""


def convert(root: Path, files: dict[str, Any], trained: Any) -> Path:
    """A model with these processor files, and its checkpoint, whose manifest records ``trained``."""
    hf = root / "hf"
    write_hf_directory(hf, random_config(random.Random(3), moe=False))
    write_tiny_tokenizer(hf)
    for name, content in files.items():
        (hf / name).write_text(json.dumps(content))
    release = hf_to_dcp(hf, root / "dcp")
    manifest = json.loads((release / MANIFEST).read_text())
    manifest["metadata"][MEDIA_KEY] = trained
    (release / MANIFEST).write_text(json.dumps(manifest))
    return hf


@pytest.mark.parametrize("kind", FILES)
def test_transformers_reads_the_limits_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    hf = convert(tmp_path, FILES[kind], TRAINED)
    out = dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "processor settings" in line]
    assert "size.longest_edge 16777216 -> 262144" in line and "size.longest_edge 25165824 -> 1048576" in line
    rng = random.Random(5)
    sizes = [(2 * rng.randint(1, 32), rng.randint(40, 1500), rng.randint(40, 1500)) for _ in range(200)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(out)], input=json.dumps(sizes), cwd=ROOT, capture_output=True,
        text=True, check=True,
    )
    read = json.loads(result.stdout.splitlines()[-1])
    assert read["images"] == [65536, 262144] and read["videos"] == [4096, 1048576]
    assert [read[name] for name in ("fps", "min_frames", "max_frames", "max_video_tokens")] == [1.0, 4, 64, 16]
    for (frames, *size), image, clip in zip(sizes, read["image patches"], read["clip patches"], strict=True):
        height, width = resized_size(*size, SETTINGS)
        assert image == height * width // 256
        height, width = clip_size(frames, *size, SETTINGS.videos, SETTINGS)
        assert clip == frames // 2 * height * width // 256 or not read["knows the cap"]

    # an export of it, and so a file that has these limits, is not changed
    again = dcp_to_hf(tmp_path / "dcp", tmp_path / "again", out)
    assert "processor settings" not in capsys.readouterr().out
    assert all((again / name).read_bytes() == (out / name).read_bytes() for name in FILES[kind])


@pytest.mark.parametrize("trained", [None, {**TRAINED, "videos": None}])
def test_what_is_not_recorded_is_not_changed(tmp_path: Path, trained: Any) -> None:
    hf = convert(tmp_path, FILES["own files"], trained)
    out = dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    name = "video_preprocessor_config.json"
    assert (out / name).read_bytes() == (hf / name).read_bytes()
    name = "preprocessor_config.json"
    assert ((out / name).read_bytes() == (hf / name).read_bytes()) == (trained is None)


@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        ([], "media: the record is"),
        ({}, "min_pixels is null"),
        ({**TRAINED, "max_pixels": "262144"}, 'max_pixels is "262144"'),
        ({**TRAINED, "videos": 3}, "videos is 3"),
        ({**TRAINED, "videos": {**TRAINED["videos"], "fps": 0}}, "videos.fps is 0"),
    ],
)
def test_a_damaged_record_is_refused_before_anything_is_written(tmp_path: Path, trained: Any, reason: str) -> None:
    hf = convert(tmp_path, FILES["own files"], trained)
    with pytest.raises(UserError, match=reason) as caught:
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    assert str(tmp_path / "dcp/release" / MANIFEST) in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", FILES)
def test_the_normalisation_is_the_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    norm = {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "rescale_factor": 1 / 255}
    hf = convert(tmp_path, FILES[kind], {**TRAINED, "norm": norm})
    out = dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    line = capsys.readouterr().out
    assert line.count("image_mean [0.5, 0.5, 0.5] -> [0.1, 0.2, 0.3]") == 2
    assert "image_std" not in line and "rescale_factor" not in line  # which the files leave to the default
    for name in FILES[kind]:
        content = json.loads((out / name).read_text())
        for part in (content.get("image_processor", content), content.get("video_processor", content)):
            assert part["image_mean"] == norm["mean"]


@pytest.mark.parametrize("norm", [3, {"mean": "x"}, {"mean": [0.5]}, {"std": [0, 1, 1]}, {"rescale_factor": -1}])
def test_a_damaged_normalisation(tmp_path: Path, norm: Any) -> None:
    hf = convert(tmp_path, FILES["own files"], {**TRAINED, "norm": norm})
    with pytest.raises(UserError, match="manifest.json: media"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
