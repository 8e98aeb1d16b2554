"""Images against transformers' own PIL processor: exactly equal, not close."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mindspeed_mm.data import images
from mindspeed_mm.data.images import image_grid, image_patches, is_plain_jpeg, load_pixels, resized_size
from mindspeed_mm.data.media import Medium, load_media
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm
from mindspeed_mm.models.qwen3_vl.processor import read_image_settings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.fuzz.data import VIDEOS
from tests.helpers.tiny_config import tiny_config
from tests.helpers.tiny_data import checkpoint_config, make_config, write_checkpoint

HALF = (0.5, 0.5, 0.5)
NORM = PixelNorm(mean=HALF, std=HALF, rescale_factor=1 / 255)


def settings(least: int, most: int) -> MediaSettings:
    return MediaSettings(least, most, patch_size=16, temporal_patch_size=2, merge_size=2, norm=NORM)


def reference(path: Path, least: int, most: int) -> tuple[torch.Tensor, list[int]]:
    """Patches and grid as transformers makes them from the same file."""
    from transformers.image_utils import load_image as reference_load

    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    processor = Processor(
        size={"shortest_edge": least, "longest_edge": most},
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=list(HALF), image_std=list(HALF),
    )
    features = processor([reference_load(str(path))], return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"][0].tolist()


def assert_equal_to_reference(path: Path, least: int, most: int) -> None:
    expected, grid = reference(path, least, most)
    image, limits = load_pixels(str(path)), settings(least, most)
    assert list(image_grid(str(path), limits)) == grid
    for patches, our_grid in (image_patches(image, limits), patches_by_pillow(image, limits)):
        assert list(our_grid) == grid
        on_device = (torch.from_numpy(patches).float() / 255 - 0.5) / 0.5
        assert torch.equal(on_device, expected)


def patches_by_pillow(image: np.ndarray, limits: MediaSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """As on a machine without numba."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "compiled_resampling", lambda: None)
        return image_patches(image, limits)


@pytest.mark.parametrize("options", [{}, {"quality": 30, "subsampling": 0}, {"progressive": True}, {"subsampling": 1}])
def test_jpeg_decoding_equals_pillow(tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(sample_photos()[0][:251, :333]).save(path, **options)
    ours = load_pixels(str(path))
    assert np.array_equal(ours, np.asarray(Image.open(path)))
    monkeypatch.setattr(images, "jpeg_decoder", lambda: None)
    assert np.array_equal(load_pixels(str(path)), ours)


def test_which_jpegs_pillow_has_to_look_at(tmp_path: Path) -> None:
    photo = Image.fromarray(sample_photos()[0][:40, :60])
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'

    def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    plain = [saved(photo), saved(photo, progressive=True), saved(photo, comment=b"hello"), saved(photo, dpi=(300, 300)),
             saved(photo, icc_profile=b"p" * 200), saved(photo, restart_marker_rows=1, subsampling=0)]
    upright = Image.Exif()
    upright[0x0131] = "camera"
    others = [saved(photo, exif=upright), saved(photo, exif=exif), saved(photo, xmp=xmp), saved(photo.convert("CMYK")),
              saved(photo.convert("L")), saved(photo, "PNG"), saved(photo, "MPO", save_all=True, append_images=[photo]),
              b"", b"\xff\xd8\xff\xe0", plain[0][:30], plain[0][:2] + plain[0][4:]]
    assert [is_plain_jpeg(content) for content in plain] == [True] * len(plain)
    assert [is_plain_jpeg(content) for content in others] == [False] * len(others)
    path = tmp_path / "photo"
    for content in plain + others[:7]:
        path.write_bytes(content)
        expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        assert np.array_equal(load_pixels(str(path)), np.asarray(expected))
    path.write_bytes(plain[0][:-300])  # cut off: as damaged as Pillow says it is
    with pytest.raises(UserError, match="(?i)truncated"):
        load_pixels(str(path))


def test_compiled_resizing_equals_pillow() -> None:
    """Noise and hard edges, all ratios, both orders of the axes."""
    resample = pytest.importorskip("mindspeed_mm.data.resample")
    rule = resample.pillow_order()
    if rule is None:
        pytest.skip("this Pillow resizes in an order of its own")
    generator = np.random.default_rng(2)
    wrong_order = 0
    for number in range(600):
        rows, columns, height, width = (int(value) for value in 2 ** generator.uniform(0, 8, 4))
        image = generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        if number % 3 == 0:
            image = (image > 127).astype(np.uint8) * 255
        expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        assert np.array_equal(resample.resize(image, height, width, rule), expected), (rows, columns, height, width)
        other = resample.resize(image, height, width, lambda *sizes: not rule(*sizes))
        wrong_order += not np.array_equal(other, expected)
    assert wrong_order > 100  # so the comparison would notice


def test_unknown_order_of_axes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    resample = pytest.importorskip("mindspeed_mm.data.resample")
    monkeypatch.setattr(resample, "_RULES", (lambda *sizes: True,))
    assert resample.pillow_order.__wrapped__() is None


def sample_photos() -> list[np.ndarray]:
    return list(pytest.importorskip("sklearn.datasets").load_sample_images().images)


@pytest.mark.parametrize("limits", [(65536, 262144), (1024, 16384), (600_000, 900_000)])
@pytest.mark.parametrize("photo", [0, 1])
def test_real_photos(tmp_path: Path, photo: int, limits: tuple[int, int]) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(sample_photos()[photo]).save(path, quality=90)
    assert_equal_to_reference(path, *limits)


@pytest.mark.parametrize("index", [0, 7, 1000])
def test_real_digits(tmp_path: Path, index: int) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    path = tmp_path / "digit.jpg"
    Image.fromarray((digits[index] * 15.9375).astype(np.uint8)).save(path)
    assert_equal_to_reference(path, 1024, 16384)


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("L", "png", {}), ("L", "jpg", {}), ("RGBA", "png", {}), ("P", "png", {}), ("1", "png", {}), ("LA", "png", {}),
        ("CMYK", "jpg", {}), ("RGB", "webp", {"quality": 80}), ("RGB", "bmp", {}), ("RGB", "gif", {}),
    ],
)
def test_modes_and_formats(tmp_path: Path, mode: str, suffix: str, options: dict) -> None:
    image = Image.fromarray(sample_photos()[1][100:310, 200:333])
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / f"image.{suffix}"
    image.convert(mode).save(path, **options)
    assert_equal_to_reference(path, 65536, 262144)


def flattened(layer: Image.Image, value: int) -> np.ndarray:
    """The image in front of a grey of this value, in float64: [height, width, 3]."""
    pixels = np.asarray(layer.convert("RGBA"), dtype=np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + value * (1 - alpha)


@pytest.mark.parametrize(
    ("mode", "options"), [("RGBA", {}), ("LA", {}), ("P", {"transparency": bytes(range(256))}), ("RGB", {})]
)
def test_transparent_pixels_get_a_background(tmp_path: Path, mode: str, options: dict) -> None:
    image = Image.fromarray(sample_photos()[1][100:310, 200:333])
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image.png"
    image.save(path, exif=exif, **options)
    with Image.open(path) as saved:
        upright = saved.convert("RGBA").transpose(Image.Transpose.ROTATE_270)
    hidden = load_pixels(str(path))
    for background, value in (("white", 255), ("black", 0)):
        pixels = load_pixels(str(path), background=background)
        assert np.abs(pixels - flattened(upright, value)).max() <= 1  # rounded twice
        assert np.array_equal(pixels, hidden) == (mode == "RGB")
    assert np.array_equal(hidden, np.asarray(upright)[..., :3])


def test_the_data_file_chooses_the_background_of_images_and_frames(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    Image.new("RGBA", (64, 64), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    image, video = (Medium(source, bool(place)) for place, source in enumerate(
        (str(tmp_path / "clear.png"), [str(tmp_path / "clear.png")] * 4)))
    for background, values in ((None, [10, 20, 30]), ("white", [255]), ("black", [0])):
        config = make_config(tmp_path, dataset="data.json", preprocess={"transparent_background": background})
        media = SPEC.read_media_settings(config, checkpoint_config(tmp_path / "checkpoint"))
        media = dataclasses.replace(media, videos=VIDEOS)
        for medium in (image, video):
            assert np.unique(load_media(medium, media)[0]).tolist() == values


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(sample_photos()[0][:170, :300])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif)
    assert_equal_to_reference(path, 4096, 65536)


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (200, 1), (31, 33), (16, 48), (33, 500), (1500, 40), (64, 64),
                                  (3000, 2200), (1700, 4100)])
def test_odd_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = tmp_path / "odd.png"
    Image.fromarray(noise).save(path)
    for limits in ((1, 16384), (65536, 262144)):
        assert_equal_to_reference(path, *limits)


def test_random_sizes_equal_reference() -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    generator = np.random.default_rng(1)
    for _ in range(3000):
        height, width = (int(value) for value in 2 ** generator.uniform(0, 12, 2))
        least = int(2 ** generator.uniform(0, 16))
        most = least + int(2 ** generator.uniform(10, 18))
        try:
            expected = module.smart_resize(height, width, factor=32, min_pixels=least, max_pixels=most)
        except ValueError:
            with pytest.raises(ValueError, match="200"):
                resized_size(height, width, settings(least, most))
            continue
        assert resized_size(height, width, settings(least, most)) == expected


def test_normalisation_table() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(NORM.table()[0], ((values.float() / 255 - 0.5) / 0.5).numpy())


def test_too_thin_and_damaged_images_name_the_file(tmp_path: Path) -> None:
    thin, broken, cut = tmp_path / "thin.png", tmp_path / "broken.jpg", tmp_path / "cut.jpg"
    Image.new("RGB", (1000, 4)).save(thin)
    broken.write_bytes(b"no image")
    Image.fromarray(sample_photos()[0]).save(cut)
    cut.write_bytes(cut.read_bytes()[:9000])
    for path, function in (
        (thin, lambda name: image_grid(name, settings(1, 9999))),
        (broken, lambda name: image_grid(name, settings(1, 9999))),
        (tmp_path / "absent.jpg", load_pixels),
        (cut, load_pixels),
    ):
        with pytest.raises(UserError, match=path.name) as raised:
            function(str(path))
        assert "\n" not in str(raised.value)


def write_processor(directory: Path, **fields: object) -> None:
    content = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2,
               "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **fields}
    (directory / "preprocessor_config.json").write_text(json.dumps(content))


def test_limits_are_the_intersection(tmp_path: Path) -> None:
    vision = tiny_config().vision
    with pytest.raises(UserError, match="preprocessor_config.json does not exist"):
        read_image_settings(tmp_path, min_pixels=1024, max_pixels=262144, vision=vision)
    write_processor(tmp_path)
    found = read_image_settings(tmp_path, min_pixels=1024, max_pixels=262144, vision=vision)
    assert (found.min_pixels, found.max_pixels) == (65536, 262144)
    assert found.norm == NORM
    with pytest.raises(UserError, match="nothing in common"):
        read_image_settings(tmp_path, min_pixels=1024, max_pixels=16384, vision=vision)
    write_processor(tmp_path, patch_size=14)
    with pytest.raises(UserError, match="patch_size is 14"):
        read_image_settings(tmp_path, min_pixels=1024, max_pixels=262144, vision=vision)


def test_transformers_5_processor_file(tmp_path: Path) -> None:
    write_processor(tmp_path)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    found = read_image_settings(tmp_path, min_pixels=1024, max_pixels=262144, vision=tiny_config().vision)
    assert found.max_pixels == 262144
