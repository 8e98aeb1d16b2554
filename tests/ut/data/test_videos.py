"""Videos against transformers' video processor: the same frames, sizes, seconds and pixels."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.data import collate, media_files, validate_data
from mindspeed_mm.data.media import Medium, load_media, measure_media
from mindspeed_mm.data.videos import clip_layout, clip_patches, clip_shape, clip_size, frame_indices
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from mindspeed_mm.models.qwen3_vl.processor import read_video_settings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, checkpoint_config, make_config, write_checkpoint
from tests.helpers.video_processor import PROCESSOR, SAMPLED

HALF = (0.5, 0.5, 0.5)
IMAGES = MediaSettings(1024, 1 << 20, 16, 2, 2, PixelNorm(mean=HALF, std=HALF, rescale_factor=1 / 255))
UNLIMITED = 1 << 40


def limits(*, frame: tuple[int, int] = (0, UNLIMITED), volume: tuple[int, int] = (4096, 25165824), fps: float = 2.0,
           frames: tuple[int, int] = (4, 768)) -> VideoSettings:
    return VideoSettings(*frame, *volume, fps, *frames)


def write_video(path: Path, *, frames: int, fps: int = 10, size: tuple[int, int] = (96, 64)) -> Path:
    """A square that wanders over noise."""
    av = pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(0, 128, (size[1], size[0], 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            frame = noise.copy()
            frame[10:30, number % 50 : number % 50 + 20] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def module() -> Any:
    return pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")


def test_sizes_equal_the_reference() -> None:
    generator = np.random.default_rng(1)
    for _ in range(2000):
        frames = int(generator.integers(2, 70))
        height, width = (int(value) for value in 2 ** generator.uniform(0, 12, 2))
        least = int(2 ** generator.uniform(10, 16))
        most = least + int(2 ** generator.uniform(16, 25))
        call = {"num_frames": frames, "height": height, "width": width, "factor": 32, "temporal_factor": 2}
        try:
            expected = module().smart_resize(**call, min_pixels=least, max_pixels=most)
        except ValueError:
            with pytest.raises(ValueError, match="200"):
                clip_size(frames, height, width, limits(volume=(least, most)), IMAGES)
            continue
        assert clip_size(frames, height, width, limits(volume=(least, most)), IMAGES) == expected


def test_limits_of_a_frame_hold_for_any_number_of_frames() -> None:
    for frames in range(1, 40):
        height, width = clip_size(frames, 480, 640, limits(frame=(0, 16384)), IMAGES)
        assert height * width <= 16384
        height, width = clip_size(frames, 40, 60, limits(frame=(30000, UNLIMITED)), IMAGES)
        assert height * width >= 30000
    with pytest.raises(ValueError, match="raise video_max_pixels"):
        clip_size(2, 480, 640, limits(frame=(0, 1024)), IMAGES)


@pytest.mark.parametrize(("frames", "size"), [(30, (96, 64)), (33, (70, 131)), (2, (64, 64)), (1, (40, 40))])
def test_pixels_equal_the_reference_arithmetic(tmp_path: Path, frames: int, size: tuple[int, int]) -> None:
    """Decoded with PyAV's own loop, all frames resized at once by torch, cut as transformers writes it."""
    av = pytest.importorskip("av")
    path = str(write_video(tmp_path / "clip.mp4", frames=frames, size=size))
    patches, grid = clip_patches(path, limits(), IMAGES)
    assert clip_layout(path, limits(), IMAGES)[0] == grid
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = frame_indices(len(decoded), 10.0, limits())
    clip = torch.from_numpy(np.stack([decoded[index] for index in chosen])).permute(0, 3, 1, 2)
    slices, rows, cols = grid
    clip = torch.nn.functional.interpolate(clip, (rows * 16, cols * 16), mode="bicubic", antialias=True)
    clip = torch.cat([clip, clip[-1:].expand(slices * 2 - len(clip), -1, -1, -1)])
    pieces = clip.reshape(slices, 2, 3, rows // 2, 2, 16, cols // 2, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    assert torch.equal(torch.from_numpy(patches), pieces.reshape(slices * rows * cols, -1))


# frames, width and height, frames per second
CLIPS = ((30, (96, 64), 10), (33, (70, 131), 10), (400, (64, 48), 25), (9, (640, 360), 24), (5, (40, 200), 3),
         (2, (64, 64), 1))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, np.ndarray]]:
    """CLIPS, and what transformers' processor makes of them."""
    root = tmp_path_factory.mktemp("clips")
    paths = [str(write_video(root / f"{place}.mp4", frames=frames, size=size, fps=fps))
             for place, (frames, size, fps) in enumerate(CLIPS)]
    command = [sys.executable, "-m", "tests.helpers.video_processor", str(root / "reference.npz"), *paths]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with np.load(root / "reference.npz") as content:
        return paths, dict(content)


def test_frames_equal_the_processors(reference: tuple) -> None:
    for place, (frames, fps) in enumerate(SAMPLED):
        assert frame_indices(frames, fps, limits()).tolist() == reference[1][f"sampled{place}"].tolist()
    assert frame_indices(9, 24.0, limits(fps=30.0)).tolist() != frame_indices(9, 24.0, limits()).tolist()


@pytest.mark.parametrize("place", range(len(CLIPS)))
def test_the_whole_processor(reference: tuple, place: int) -> None:
    """Frames, seconds, grid and patches of transformers' own processor; see tests/helpers/video_processor.py."""
    paths, theirs = reference
    shape = clip_shape(paths[place], limits())
    assert frame_indices(shape.frames, shape.fps, limits()).tolist() == theirs[f"frames{place}"].tolist()
    patches, grid = clip_patches(paths[place], limits(), IMAGES)
    layout, seconds = clip_layout(paths[place], limits(), IMAGES)
    assert grid == layout == tuple(theirs[f"grid{place}"].tolist())
    assert seconds == tuple(theirs[f"seconds{place}"].tolist())
    # transformers folds rescaling and normalisation into one step, which rounds once less; a byte is 0.008
    ours, pixels = (patches.astype(np.float32) / 255 - 0.5) / 0.5, theirs[f"pixels{place}"]
    np.testing.assert_allclose(ours, pixels, rtol=0, atol=2e-7)
    assert np.array_equal(np.rint((pixels * 0.5 + 0.5) * 255).astype(np.uint8), patches)


def test_a_list_of_frames_is_a_video(tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (64, 32), (40 * number, 0, 0)).save(paths[-1])
    video = Medium(paths, is_video=True)
    images = MediaSettings(*(1024, 1 << 20, 16, 2, 2), IMAGES.norm, limits(fps=1.0))
    grid, clip = measure_media(video, images)
    patches, found = load_media(video, images)
    assert grid == found == (3, 2, 4) and patches.shape == (24, 1536)
    assert clip.seconds == (0.5, 2.5, 4.0) and clip.total == 6
    red = patches.reshape(3, 8, 3, 2, 256)[:, 0, 0, :, 0]
    assert red.tolist() == [[0, 40], [80, 120], [160, 160]]
    Image.new("RGB", (32, 32)).save(paths[2])
    with pytest.raises(UserError, match="differ in size"):
        load_media(video, images)


def test_unusable_videos_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    for path in (broken, tmp_path / "absent.mp4"):
        with pytest.raises(UserError, match=path.name) as raised:
            clip_layout(str(path), limits(), IMAGES)
        assert "\n" not in str(raised.value)
    cut = write_video(tmp_path / "cut.mkv", frames=200)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    shape = types.SimpleNamespace(frames=200, fps=10.0, height=64, width=96)
    monkeypatch.setattr("mindspeed_mm.data.videos.clip_shape", lambda *_: shape)
    with pytest.raises(UserError, match="frames can be decoded"):
        clip_patches(str(cut), limits(), IMAGES)


def test_settings_are_read(tmp_path: Path) -> None:
    call = {"min_pixels": 0, "max_pixels": 16384, "fps": 2.0, "max_frames": 64, "images": IMAGES}
    with pytest.raises(UserError, match="video_preprocessor_config.json does not exist"):
        read_video_settings(tmp_path, **call)
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": PROCESSOR}))
    assert read_video_settings(tmp_path, **call) == VideoSettings(0, 16384, 4096, 25165824, 2.0, 4, 64)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_mean": [0.4] * 3}))
    with pytest.raises(UserError, match="image_mean"):
        read_video_settings(tmp_path, **call)


@pytest.fixture()
def recipe(tmp_path: Path) -> Path:
    """A data set of one record: a video, an image, a video of frames."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "video_preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_video(tmp_path / "clip.mp4", frames=40)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": "First <video>, then <image> and <video>. What?"},
                {"role": "assistant", "content": "A square."}]
    record = {"videos": ["clip.mp4", ["a.png", "a.png"]], "images": ["a.png"], "messages": messages}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    return tmp_path


def test_from_file_to_batch(recipe: Path) -> None:
    model_config = checkpoint_config(recipe / "checkpoint")
    config = make_config(recipe, dataset=str(recipe / "data.json"), attr={"videos": "videos"})
    validate_data(config, SPEC)
    dataset, _ = build_tiny(config)
    batch = collate([dataset[0]], SPEC, model_config)
    assert batch.vision.grid_thw == [(4, 4, 6), (1, 4, 4), (1, 4, 4)]
    assert batch.vision.cu_seqlens_host == [0, 24, 48, 72, 96, 112, 128]
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(str(recipe / "checkpoint")).decode(batch.input_ids)
    pads = ["<|video_pad|>" * 6] * 4 + ["<|image_pad|>" * 4, "<|video_pad|>" * 4]
    one, two, three, four, image, frames = ("<|vision_start|>" + pad + "<|vision_end|>" for pad in pads)
    assert f"user\nFirst <0.3 seconds>{one}<1.4 seconds>{two}<2.5 seconds>{three}<3.6 seconds>{four}, then" in text
    assert f"then {image} and <0.2 seconds>{frames}. What?<|im_end|>" in text
    assert (batch.input_ids == model_config.video_token_id).sum() == 28


def test_video_column_keeps_files_frames_and_order(recipe: Path) -> None:
    """A list of one frame is a video of one frame and no file; media shortened away leave both columns."""
    turns = [["<image><video>", "a"], ["<video><image><video>", "b"], ["<video>", "c" * 400]]
    messages = [{"role": role, "content": text} for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)]
    Image.new("RGB", (96, 64)).save(recipe / "b.png")
    record = {"images": ["a.png", "b.png"], "videos": [["a.png"], "clip.mp4", ["b.png", "b.png"], ["a.png"]],
              "messages": messages}
    text_only = {"images": [], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (recipe / "data.json").write_text(json.dumps([text_only, record]))
    grids = []
    for basic in ({}, {"preprocess_on_fly": True}, {"streaming": True}):
        config = make_config(recipe, dataset=str(recipe / "data.json"), attr={"videos": "videos"}, basic=basic)
        dataset, _ = build_tiny(config, seq_length=300)
        assert dataset[0].media == ()
        sample = dataset[1]
        assert len(sample.input_ids) <= 300
        grids.append([one.grid_thw for one in sample.media])
        row = dataset._rows[1]
        assert [Path(path).name for path in row["images"]] == ["a.png", "b.png"]
        frame, file, frames = row["videos"]
        assert frame["path"] is None and [Path(path).name for path in frame["frames"]] == ["a.png"]
        assert Path(file["path"]).name == "clip.mp4" and file["frames"] is None
        assert frames["path"] is None and [Path(path).name for path in frames["frames"]] == ["b.png", "b.png"]
        assert list(row["is_video"]) == [False, True, True, False, True]
    assert grids[0] == grids[1] == grids[2] == [(1, 4, 4), (1, 4, 4), (4, 4, 6), (1, 4, 6), (1, 4, 6)]


def test_mistakes_are_found_before_training(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = str(recipe / "data.json")
    with pytest.raises(UserError, match="2 <video> tags.*attr.videos is null; set it"):
        validate_data(make_config(recipe, dataset=dataset, attr={"tools": "tools"}), SPEC)
    config = make_config(recipe, dataset=dataset, attr={"videos": "videos"})
    monkeypatch.setattr(media_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install av"):
        validate_data(config, SPEC)
    monkeypatch.undo()
    (recipe / "clip.mp4").unlink()
    with pytest.raises(UserError, match=r"record 0: video clip.mp4 does not exist"):
        validate_data(config, SPEC)
