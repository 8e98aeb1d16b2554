"""Generate demo data: test a pipeline, its memory and its speed before you have data.

Images show coloured shapes; questions ask for colours, numbers, places and directions, and the answers are true, so
that training has something to learn. The same options give the same scenes in all formats and types of files.
"""

from __future__ import annotations

import argparse
import base64
import functools
import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mindspeed_mm.config.command_line import OneLineParser
from mindspeed_mm.config.data_config import PreprocessParameters
from mindspeed_mm.errors import UserError, report_errors
from mindspeed_mm.inputs import is_directory, reason, shorten
from mindspeed_mm.tools.make_data.formats import FORMATS, Content
from mindspeed_mm.tools.make_data.scenes import Picture, Range, SceneOptions, make_scene

_FILE_TYPES = ("json", "jsonl", "parquet", "arrow")
_MARK = "make_data.json"  # holds the options; --overwrite empties only a directory that has it
_OUTPUTS = ("images", "videos", "cache", "data.json", *(f"{s}.{t}" for s in ("train", "val") for t in _FILE_TYPES))
_NO_MODEL, _NO_MODEL_FILE, _PROGRAM = "MODEL_DIRECTORY", "MODEL_FILE", "python -m mindspeed_mm.tools.make_data"


def _range(low: int, high: int, *, single: bool = False) -> Callable[[str], Any]:
    """The type of an option: ``A`` or ``A-B`` as a :data:`Range`; with ``single`` a number."""

    def parse(text: str) -> Range | int:
        match = re.fullmatch("([0-9]{1,9})" if single else "([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
        first, last = (int(match[1]), int(match[match.lastindex or 1])) if match else (1, 0)
        if not low <= first <= last <= high:
            kind = "a number" if single else "a number or a range such as 1-3"
            raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not {kind}, within {low} to {high}")
        return first if single else (first, last)

    return parse


def _sizes(text: str) -> tuple[Range, Range]:
    """``WxH`` or ``WxH-WxH`` as the ranges of width and height."""
    match = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})(?:-([0-9]{1,5})x([0-9]{1,5}))?", text)
    numbers = [int(number) for number in match.groups() if number] if match else [1, 1, 0, 0]
    width, height = (numbers[0], numbers[-2]), (numbers[1], numbers[-1])
    if not all(32 <= first <= last <= 8192 for first, last in (width, height)):
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not WIDTHxHEIGHT, or the smallest and the largest "
                                         "size (224x224-896x448), within 32 to 8192 pixels")
    return width, height


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog=_PROGRAM, description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False)
    add, end = parser.add_argument, "(default: %(default)s)"
    number = functools.partial(_range, single=True)
    add("--format", required=True, choices=FORMATS, help="form of a record")
    add("--out", required=True, type=Path, metavar="DIR", help="new or empty directory")
    add("--overwrite", action="store_true", help="remove what this command wrote to DIR before")
    add("--records", default="100", type=number(1, 10**7), metavar="N", help=f"training records {end}")
    add("--val-records", default="0", type=number(0, 10**7), metavar="N", help=f"evaluation records, new scenes {end}")
    add("--images-per-record", default="1", type=_range(0, 64), metavar="A-B", help=end)
    add("--videos-per-record", default="0", type=_range(0, 16), metavar="A-B", help=end)
    add("--image-size", default="448x448", type=_sizes, metavar="WxH[-WxH]", help=f"of images and video frames {end}")
    add("--answer-words", default="4", type=_range(1, 10**5), metavar="A-B", help=f"1 to 3: one word {end}")
    add("--turns", default="1", type=_range(1, 1000), metavar="A-B", help=f"questions per record {end}")
    add("--objects", action="store_true", help="ask for the boxes of shapes (--format swift)")
    add("--file-type", default="json", choices=_FILE_TYPES, help=end)
    add("--image-form", choices=FORMATS["messages"].image_forms, help="(default: path; with openai base64)")
    add("--video-form", default="frames", choices=("frames", "mp4"), help=f"image files, or MP4 files by PyAV {end}")
    add("--seed", type=int, default=0, help=f"of the scenes {end}")
    add("--model", type=Path, metavar="DIR", help="directory of the tokenizer, for data.json")
    return parser.parse_args(argv)


def _check(options: argparse.Namespace) -> None:
    """Check what the format, the file type and the --mm-data file can hold.

    Raises:
        UserError: for the first mistake, with the remedy.
    """
    chosen, name, videos = FORMATS[options.format], f"--format {options.format}", options.videos_per_record[1]
    for flag, found, most in (("--images-per-record", options.images_per_record[1], chosen.max_images),
                              ("--turns", options.turns[1], chosen.max_turns)):
        if found > most:
            raise UserError(f"{flag} {found}: {name} holds {most} in a record; set {most} at most")
    if videos and options.video_form not in chosen.video_forms:
        remedy = "set --video-form mp4" if chosen.video_forms else "set --videos-per-record 0, or --format messages"
        raise UserError(f"--videos-per-record {videos}: {name} holds no videos as {options.video_form}; {remedy}")
    if videos and options.video_form == "mp4" and importlib.util.find_spec("av") is None:
        raise UserError("--video-form mp4 needs PyAV, which is not installed: pip install av")
    if options.image_form not in chosen.image_forms:
        raise UserError(f"--image-form {options.image_form}: {name} does not hold this; set it to "
                        f"{' or '.join(chosen.image_forms)}")
    if options.image_form == "bytes" and options.file_type.startswith("json"):
        raise UserError(f"--image-form bytes: a {options.file_type} file cannot hold bytes; set --file-type parquet")
    if options.objects and (options.format != "swift" or not options.images_per_record[1]):
        raise UserError("--objects needs --format swift and --images-per-record 1 or more")
    if options.model is not None and not is_directory(options.model):
        raise UserError(f"--model {shorten(options.model)} is not a directory; name that of the tokenizer")
    if "," in str(options.out):
        raise UserError(f"--out {shorten(options.out)} has a comma, which separates data files in data.json; rename it")


def _prepare(out: Path, options: argparse.Namespace) -> None:
    """Make the directory, without files of an earlier run, and note the options in it."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        if not options.overwrite:
            raise UserError(f"--out {shorten(out)} is not empty; choose another directory, or add --overwrite")
        if not (out / _MARK).is_file():
            raise UserError(f"--out {shorten(out)} has no {_MARK}, so this command did not write it; choose another")
        for path in (out / name for name in _OUTPUTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (out / _MARK).write_text(json.dumps(vars(options), indent=4, default=str) + "\n", encoding="utf-8")
    for name in ("images", "videos"):
        (out / name).mkdir()


def _jpeg(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    picture.draw().save(buffer, "JPEG", quality=90)  # in a fifth of a PNG's time
    return buffer.getvalue()


def _mp4(frames: Sequence[Picture]) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=2, options={"qscale": "2"})  # in every build of FFmpeg
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for frame in [*frames, None]:
            container.mux(stream.encode(frame and av.VideoFrame.from_image(frame.draw())))
    return buffer.getvalue()


def _record(options: argparse.Namespace, scenes: SceneOptions, split: str, index: int) -> dict[str, Any]:
    """One record; its images and videos are written unless it holds them itself."""
    scene, name = make_scene(scenes, seed=options.seed, split=split, index=index), f"{split}-{index:07d}"

    def stored(path: str, content: bytes) -> str:
        (options.out / path).write_bytes(content)
        return f"file://{quote(str(options.out / path))}" if options.image_form == "file-url" else path

    def image(file: str, content: bytes) -> Any:
        if options.image_form == "bytes":
            return {"bytes": content, "path": file}
        if options.image_form == "base64":
            return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        return stored(f"images/{file}", content)

    def video(stem: str, frames: Sequence[Picture]) -> Any:
        if options.video_form == "mp4":
            return stored(f"videos/{stem}.mp4", _mp4(frames))
        return [stored(f"videos/{stem}-{step}.jpg", _jpeg(frame)) for step, frame in enumerate(frames)]

    images = [image(f"{name}-{number}.jpg", _jpeg(picture)) for number, picture in enumerate(scene.images)]
    videos = [video(f"{name}-{number}", frames) for number, frames in enumerate(scene.videos)]
    return FORMATS[options.format].record(Content(name, scene.turns, images, videos if scenes.videos[1] else None))


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A JSON list, JSON lines, a Parquet file or an Arrow stream, by the suffix of ``path``."""
    if path.suffix.startswith(".json"):
        start, between, end = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
        with open(path, "w", encoding="utf-8") as file:
            for number, record in enumerate(records):
                file.write((between if number else start) + json.dumps(record))
            file.write(end)
        return
    import pyarrow
    import pyarrow.parquet

    rows = list(records)
    rows[0] = dict.fromkeys(itertools.chain(*rows)) | rows[0]  # the first names the columns
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:  # as datasets' save_to_disk
            stream.write_table(table, max_chunksize=1000)


def _data_config(options: argparse.Namespace, files: Sequence[Path]) -> dict[str, Any]:
    """Content of the --mm-data file; its limits admit images and frames at their size."""
    chosen, (width, height) = FORMATS[options.format], options.image_size
    attr = chosen.attr | ({"formatting": "swift"} if options.objects else {})
    if options.videos_per_record[1] and chosen.attr.get("formatting") != "llava":  # whose columns have fixed names
        attr["videos"] = "videos"
    preprocess = {"model_name_or_path": str(options.model.absolute()) if options.model else _NO_MODEL}
    for name in ("image_max_pixels", "video_max_pixels"):
        preprocess[name] = max(width[1] * height[1], PreprocessParameters.model_fields[name].default)
    basic = {"dataset_dir": str(options.out), "cache_dir": str(options.out / "cache")}
    basic |= dict(zip(("dataset", "val_dataset"), map(str, files), strict=False))
    return {"dataset_param": {"preprocess_parameters": preprocess, "basic_parameters": basic, "attr": attr}}


def make_data(options: argparse.Namespace) -> None:
    """Write the directory and print what is in it.

    Raises:
        UserError: for the first mistake, and if the directory cannot be written.
    """
    out = options.out = options.out.absolute()
    options.image_form = options.image_form or FORMATS[options.format].image_forms[0]
    _check(options)
    scenes = SceneOptions(options.images_per_record, options.videos_per_record, *options.image_size, options.turns,
                          options.answer_words, options.objects)
    files, config = [], out / "data.json"
    try:
        _prepare(out, options)
        for split, count in (("train", options.records), ("val", options.val_records)):
            if count:
                files.append(out / f"{split}.{options.file_type}")
                _write(files[-1], (_record(options, scenes, split, index) for index in range(count)))
        config.write_text(json.dumps(_data_config(options, files), indent=4) + "\n", encoding="utf-8")
        sizes = {path: path.stat().st_size for path in (*files, *out.glob("images/*"), *out.glob("videos/*"))}
    except OSError as error:
        raise UserError(f"--out {shorten(out)} cannot be written: {reason(error)}; free space there, or choose another "
                        "directory") from error
    print(f"{' and '.join(map(str, files))}: {options.records} and {options.val_records} records")
    print(f"{len(sizes) - len(files)} image and video files; {sum(sizes.values()) / 1e6:.1f} MB in all")
    print(f"{config}: for --mm-data")
    if options.model is None:
        print(f"first: replace {_NO_MODEL} in this file by the tokenizer's directory, or give --model")
    print(f"next: python -m mindspeed_mm.tools.show_data --mm-data {shlex.quote(str(config))} --mm-model "
          f"{_NO_MODEL_FILE} --seq-length 1024")
    print(f"{_NO_MODEL_FILE}: your --mm-model file, whose init_from_hf_path names the model's directory; those of the "
          "published sizes, and a tiny one, are in examples")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return report_errors(lambda: make_data(_arguments(argv)), interrupted="interrupted; start again with --overwrite")


if __name__ == "__main__":
    sys.exit(main())
