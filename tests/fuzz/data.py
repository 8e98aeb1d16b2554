"""Broken images, videos, data files and tokenizer files, read as training reads them."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindspeed_mm.data.encoder import Encoder, load_tokenizer
from mindspeed_mm.data.images import image_grid, image_patches, load_pixels
from mindspeed_mm.data.record_files import RecordFile
from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.data.videos import clip_layout, clip_patches
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm, VideoSettings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.outcomes import Outcomes
from tests.helpers.tiny_data import make_config, make_records, write_checkpoint

VIDEOS = VideoSettings(0, 16384, 4096, 1 << 22, 2.0, 4, 8)
SETTINGS = MediaSettings(1024, 16384, 16, 2, 2, PixelNorm((0.5,) * 3, (0.5,) * 3, 1 / 255), VIDEOS)
_IMAGES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "MPO")
_CONTAINERS = (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("ts", "mpeg2video"), ("gif", "gif"))


def picture(mode: str = "RGB") -> Image.Image:
    """A small picture with edges and slopes."""
    rows, cols = np.mgrid[:48, :80]
    pixels = np.stack([rows * 5, cols * 3, (rows * cols) % 256], axis=2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def good_images() -> dict[str, bytes]:
    """A file of each format that is read, and of the variants that take other ways through the decoders."""
    Image.init()
    files = {}

    def add(name: str, format: str, mode: str = "RGB", **options: Any) -> None:
        if format in Image.SAVE:
            buffer = io.BytesIO()
            picture(mode).save(buffer, format, **options)
            files[name] = buffer.getvalue()

    for format in _IMAGES:
        add(format, format)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0132] = 6, "a picture", "2026:01:01 00:00:00"
    add("JPEG-exif", "JPEG", exif=exif, quality=60)
    add("JPEG-progressive", "JPEG", progressive=True)
    add("JPEG-grey", "JPEG", "L")
    add("PNG-palette", "PNG", "P")
    add("PNG-transparent", "PNG", "RGBA", exif=exif)
    add("WEBP-exif", "WEBP", exif=exif)
    add("TIFF-lzw", "TIFF", compression="tiff_lzw")
    return files


def good_videos(directory: Path) -> dict[str, bytes]:
    """A file of each container that is read; none without PyAV."""
    try:
        import av
    except ImportError:
        return {}
    files = {}
    frames = np.repeat(np.asarray(picture())[None], 12, axis=0).copy()
    for index, frame in enumerate(frames):
        frame[:, : index * 4] = 255 - frame[:, : index * 4]
    for suffix, codec in _CONTAINERS:
        path = directory / f"good.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25 if suffix == "ts" else 10)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        files[suffix] = path.read_bytes()
    return files


def read_image(path: str) -> None:
    """Measure and decode; both must agree on the size."""
    grid = image_grid(path, SETTINGS)
    patches, found = image_patches(load_pixels(path), SETTINGS)
    assert found == grid and len(patches) == grid[1] * grid[2], (found, grid)


def read_video(path: str) -> None:
    """Measure and decode; both must agree on the size."""
    grid, _ = clip_layout(path, VIDEOS, SETTINGS)
    patches, found = clip_patches(path, VIDEOS, SETTINGS)
    assert found == grid and len(patches) == np.prod(grid), (found, grid)


def fuzz_media(
    directory: Path, count: int, seed: int, files: dict[str, bytes], read: Callable[[str], None]
) -> Outcomes:
    """Damage ``files`` in ``count`` ways and read each."""
    outcomes = Outcomes()
    names = sorted(files)
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        name = names[index % len(names)]
        path = directory / f"broken.{name}"
        path.write_bytes(mutate_bytes(files[name], rng))
        outcomes.run(f"{name}, seed {seed}, input {index}", lambda path=path: read(str(path)))
        path.unlink()
    return outcomes


def fuzz_images(directory: Path, count: int, seed: int) -> Outcomes:
    """See ``fuzz_media``."""
    return fuzz_media(directory, count, seed, good_images(), read_image)


def fuzz_videos(directory: Path, count: int, seed: int) -> Outcomes:
    """See ``fuzz_media``."""
    return fuzz_media(directory, count, seed, good_videos(directory), read_video)


def _encoder(directory: Path) -> Encoder:
    template = SPEC.build_chat_template(load_tokenizer(directory), ChatTemplateOptions(name="qwen3_vl_nothink"))
    return Encoder((), template, SETTINGS, 256)


def fuzz_records(directory: Path, count: int, seed: int) -> Outcomes:
    """Change, remove and damage parts of data files, and read them whole and streamed, with skipping and without.

    A record of another file that is not touched must keep its tokens and its target.
    """
    encoder = _encoder(write_checkpoint(directory / "checkpoint"))
    records = make_records(directory / "images", 6)
    outcomes = Outcomes()
    untouched: dict[str, Any] = {}
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        path = directory / rng.choice(("broken.json", "broken.jsonl"))
        victim = rng.randrange(len(records))
        rows = [mutate_value(row, rng) if place == victim else row for place, row in enumerate(records)]
        lines = [json.dumps(row) for row in rows]
        content = ("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]").encode()
        if index % 4 == 0:
            victim, content = -1, mutate_bytes(content, rng)
        path.write_bytes(content)
        skip = {"on_bad_sample": "skip"} if rng.random() < 0.5 else {}
        config = make_config(directory, dataset=str(path), loader=skip)

        def read(config: Any = config, path: Path = path, streamed: bool = rng.random() < 0.5) -> list[Any]:
            reader = RecordReader(config, SPEC, [str(path)], limit=None)
            if not streamed:
                return [encoder.encode(record.columns()) for record in reader.read()]
            file = RecordFile(str(path))
            return [
                encoder.encode(reader.check(file[place], 0, place).columns())
                for place in range(len(file))
            ]

        rows_read = outcomes.run(f"seed {seed}, input {index}", read)
        for row in rows_read or () if victim >= 0 else ():
            _compare_untouched(row, victim, untouched, outcomes, f"seed {seed}, input {index}")
    return outcomes


def _compare_untouched(row: Any, victim: int, untouched: dict[str, Any], outcomes: Outcomes, name: str) -> None:
    place = row["record"]
    if place == victim:
        return
    kept = (list(row["input_ids"]), list(row["spans"]))
    if untouched.setdefault(place, kept) != kept:
        outcomes.add_fault(name, "changed target", f"record {place} has other tokens because of record {victim}")


def fuzz_tokenizers(directory: Path, count: int, seed: int) -> Outcomes:
    """Damage the tokenizer's files, load them, and encode a conversation."""
    good = write_checkpoint(directory / "good")
    records = make_records(directory / "images", 1)
    outcomes = Outcomes()
    names = [path.name for path in good.iterdir()]
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        broken = directory / "broken"
        shutil.copytree(good, broken)
        path = broken / rng.choice(names)
        if rng.random() < 0.5:
            path.write_text(json.dumps(mutate_value(json.loads(path.read_text()), rng)))
        elif rng.random() < 0.9:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        else:
            path.unlink()

        def read(broken: Path = broken) -> None:
            encoder = _encoder(broken)
            config = make_config(directory, dataset=str(directory / "data.json"))
            (directory / "data.json").write_text(json.dumps(records))
            for record in RecordReader(config, SPEC, [str(directory / "data.json")], limit=None).read():
                encoder.encode(record.columns())

        outcomes.run(f"{path.name}, seed {seed}, input {index}", read)
        shutil.rmtree(broken)
    return outcomes


KINDS: dict[str, Callable[[Path, int, int], Outcomes]] = {
    "images": fuzz_images, "videos": fuzz_videos, "records": fuzz_records, "tokenizers": fuzz_tokenizers,
}
