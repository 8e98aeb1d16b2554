"""Demo data: the answers are true for the pictures, all formats hold the same scenes, and the recipe reads them."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.data.record_files import read_rows
from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.make_data.__main__ import main
from mindspeed_mm.tools.make_data.formats import FORMATS
from mindspeed_mm.tools.make_data.scenes import COLOURS, Picture, SceneOptions, make_scene
from tests.helpers.tiny_data import build_tiny, write_checkpoint
from tests.helpers.video_processor import PROCESSOR

MIXED = SceneOptions(images=(0, 3), videos=(0, 2), width=(32, 90), height=(40, 70), turns=(1, 4))
SMALL = ("--image-size", "48x32-64x64")


def make(out: Path, form: str, *options: str) -> list[dict[str, Any]]:
    """Run the command, which must succeed; returns the training records."""
    assert main(["--format", form, "--out", str(out), "--records", "6", *SMALL, *options]) == 0
    path = next(out.glob("train.*"))
    if path.suffix == ".arrow":
        with pyarrow.ipc.open_stream(path) as stream:
            return stream.read_all().to_pylist()
    return list(read_rows(path))


def texts(record: dict[str, Any]) -> list[str]:
    """Questions, without tags, and answers of a record in any format."""
    if "question" in record:
        return [record["question"], record["answer"]]
    if "instruction" in record:
        old = [text for turn in record["history"] for text in turn]
        found = [*old, record["instruction"], record["output"]]
    else:
        turns = record.get("messages") or record["conversations"]
        found = [turn.get("content", turn.get("value")) for turn in turns]
    parts = [text if isinstance(text, str) else text[-1]["text"] for text in found]
    return [re.sub("^(<(image|video)>\n)+", "", part) for part in parts]


def truth(question: str, shapes: list[tuple[str, str]]) -> str:
    """The answer by (kind, colour) of the shapes that were found in the pixels."""
    kinds = Counter(kind for kind, _ in shapes)
    if match := re.fullmatch(r"How many (\w+)s are there\?", question):
        number = kinds[match[1]]
        return f"There is 1 {match[1]}." if number == 1 else f"There are {number} {match[1]}s."
    kind = re.fullmatch(r"What colour is the (\w+)\?", question)[1]
    assert kinds[kind] == 1
    return f"The {kind} is {dict(shapes)[kind]}."


def seen(picture: Picture) -> list[tuple[str, str]]:
    """Kind and colour of each shape by its pixels: a box's corners and the share of it that is filled tell the kind."""
    pixels = np.asarray(picture.draw())
    assert pixels.shape == (picture.height, picture.width, 3)
    found, rest = [], pixels.copy()
    for _, _, (x1, y1, x2, y2) in picture.shapes:
        inside = pixels[y1:y2, x1:x2]
        filled = (inside != 255).any(-1)
        assert all(side.any() for side in (filled[0], filled[-1], filled[:, 0], filled[:, -1]))
        corners = int(filled[0, 0]) + int(filled[-1, 0])
        colour = tuple(inside[filled][0].tolist())
        found.append((("circle", "triangle", "square")[corners], {rgb: name for name, rgb in COLOURS.items()}[colour]))
        rest[y1:y2, x1:x2] = 255
    assert (rest == 255).all()
    return found


def test_answers_are_true_for_the_pixels() -> None:
    asked = Counter()
    for index in range(120):
        scene = make_scene(MIXED, seed=3, split="train", index=index)
        several = len(scene.images) + len(scene.videos) > 1
        for turn in scene.turns:
            head, question = re.fullmatch(r"((?:Image|Video) \d+: )?(.*)", turn.question).groups()
            asked[question.split()[0]] += 1
            if numbers := re.findall(r"\d+", question):
                assert turn.answer == f"The sum is {sum(map(int, numbers))}."
                continue
            assert bool(head) == several
            number = int(head.split()[1].rstrip(":")) - 1 if head else 0
            if question.startswith("Which way"):
                frames = [np.argwhere((np.asarray(frame.draw()) != 255).any(-1)).mean(0)
                          for frame in scene.videos[number]]
                down, right = frames[-1] - frames[0]
                words = {"right": right > 9, "left": right < -9, "down": down > 9, "up": down < -9}
                assert turn.answer.split()[-1] == f"{next(word for word, moved in words.items() if moved)}."
            else:
                assert turn.answer == truth(question, seen(scene.images[number]))
    assert min(asked[word] for word in ("How", "What", "Which")) > 20


def test_boxes_are_those_of_the_named_shapes(tmp_path: Path) -> None:
    records = make(tmp_path / "out", "swift", "--objects", "--images-per-record", "1-2", "--turns", "2")
    for index, record in enumerate(records):
        objects, text = record["objects"], " ".join(texts(record))
        assert text.count("<bbox>") == len(objects["bbox"]) and text.count("<ref-object>") == len(objects["ref"])
        places = objects.get("image_id", [0] * len(objects["bbox"]))
        for name, (x1, y1, x2, y2), place in zip(objects["ref"], objects["bbox"], places, strict=True):
            with Image.open(tmp_path / "out" / record["images"][place]) as image:
                middle = image.getpixel(((x1 + x2) // 2, (y1 + 2 * y2) // 3))
            assert np.abs(np.subtract(middle, COLOURS[name.split()[0]])).max() < 90, index  # JPEG blurs colours
    assert {len(record["images"]) for record in records} == {1, 2}


def test_all_formats_hold_the_same_scenes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = {name: make(tmp_path / name, name, "--images-per-record", "0-1") for name in FORMATS}
    expected = [texts(record) for record in records["messages"]]
    assert len({str(one) for one in expected}) > 3
    for name, found in records.items():
        assert [texts(record) for record in found] == expected, name
    images = [record["images"] for record in records["messages"]]
    assert {len(one) for one in images} == {0, 1}
    for name in ("sharegpt", "swift", "alpaca"):
        assert [record["images"] for record in records[name]] == images
    assert [[one["image"]] if "image" in one else [] for one in records["llava"]] == images
    assert [one.get("image", []) for one in records["qwen"]] == images
    assert [[one["image"]] if one["image"] else [] for one in records["qa"]] == images
    parts = [record["messages"][0]["content"][:-1] for record in records["openai"]]
    assert [len(one) for one in parts] == [len(one) for one in images]
    for (path,), (part,) in ((a, b) for a, b in zip(images, parts, strict=True) if a):
        content = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        assert content == (tmp_path / "messages" / path).read_bytes()
    said = capsys.readouterr().out
    assert "next: python -m mindspeed_mm.tools.show_data --mm-data" in said and "--mm-model MODEL_FILE --seq" in said
    assert "MODEL_FILE: your --mm-model file, whose init_from_hf_path names the model's directory" in said


def test_turns_and_history(tmp_path: Path) -> None:
    found = {name: make(tmp_path / name, name, "--turns", "3", "--images-per-record", "2")
             for name in ("messages", "alpaca", "llava", "openai") if FORMATS[name].max_images > 1}
    for name, records in found.items():
        assert [texts(record) for record in records] == [texts(record) for record in found["messages"]], name
    assert {len(record["messages"]) for record in found["messages"]} == {6}
    first = [record["history"][0][0] for record in found["alpaca"]]
    assert all(text.startswith("<image>\n<image>\nImage ") for text in first)


@pytest.mark.parametrize("file_type", ["jsonl", "parquet", "arrow"])
def test_file_types_hold_the_same_records(tmp_path: Path, file_type: str) -> None:
    options = ("--images-per-record", "0-1", "--videos-per-record", "0-1")
    expected = make(tmp_path / "json", "messages", *options)
    assert make(tmp_path / "other", "messages", *options, "--file-type", file_type) == expected
    for path in (tmp_path / "json").glob("*s/*"):
        assert (tmp_path / "other" / path.relative_to(tmp_path / "json")).read_bytes() == path.read_bytes()


def test_columns_that_the_first_record_lacks_are_kept(tmp_path: Path) -> None:
    records = make(tmp_path / "out", "llava", "--images-per-record", "0-1", "--file-type", "parquet", "--seed", "2")
    assert records[0]["image"] is None and any(record["image"] for record in records)


@pytest.mark.parametrize("form", ["bytes", "base64", "file-url"])
def test_forms_of_images(tmp_path: Path, form: str) -> None:
    paths = make(tmp_path / "path", "messages")
    records = make(tmp_path / "a b", "messages", "--image-form", form, "--file-type", "parquet")
    for record, plain in zip(records, paths, strict=True):
        expected = (tmp_path / "path" / plain["images"][0]).read_bytes()
        (image,) = record["images"]
        if form == "bytes":
            assert image["bytes"] == expected and image["path"] == Path(plain["images"][0]).name
        elif form == "base64":
            assert base64.b64decode(image.partition("base64,")[2]) == expected
        else:
            assert image.startswith("file:///") and "a%20b/images/" in image
    assert any((tmp_path / "a b" / "images").iterdir()) == (form == "file-url")


def test_words_of_answers() -> None:
    for words in (4, 5, 9, 30):
        options = SceneOptions(words=(words, words))
        scenes = [make_scene(options, seed=0, split="train", index=index) for index in range(20)]
        assert {len(scene.turns[0].answer.split()) for scene in scenes} == {words}
    bare = make_scene(SceneOptions(words=(1, 1)), seed=0, split="train", index=0).turns[0]
    assert bare.answer == bare.word and " " not in bare.word


def test_scenes_depend_on_seed_split_and_index_only() -> None:
    code = ("from mindspeed_mm.tools.make_data.scenes import *\n"
            "print(make_scene(SceneOptions((2, 3), (1, 1), turns=(2, 9)), seed=5, split='val', index=7))")
    run = [subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                          capture_output=True, text=True, check=True).stdout for seed in "12"]
    options = SceneOptions((2, 3), (1, 1), turns=(2, 9))
    assert run == [f"{make_scene(options, seed=5, split='val', index=7)}\n"] * 2
    others = [(5, "train", 7), (6, "val", 7), (5, "val", 8)]
    scenes = {make_scene(options, seed=seed, split=split, index=index) for seed, split, index in others}
    assert len({*scenes, make_scene(options, seed=5, split="val", index=7)}) == 4


@pytest.mark.parametrize(("form", "video_form"), [("messages", "frames"), ("sharegpt", "mp4")])
def test_the_recipe_reads_it(tmp_path: Path, form: str, video_form: str) -> None:
    if video_form == "mp4":
        pytest.importorskip("av")
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "video_preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    make(tmp_path / "out", form, "--images-per-record", "1-2", "--videos-per-record", "1", "--val-records", "2",
         "--video-form", video_form, "--model", str(tmp_path / "checkpoint"))
    scenes = {path.read_bytes() for path in (tmp_path / "out" / "images").glob("*-000000[01]-0.jpg")}
    assert len(scenes) == 4  # the two of val.json are not those of train.json
    config = load_config(tmp_path / "out" / "data.json", DataConfig, flag="--mm-data")
    train, val = build_tiny(config)
    assert (len(train), len(val)) == (6, 2)
    for sample in (train[0], val[1]):
        assert sample.loss_mask.sum() > 2 and {medium.grid_thw[0] > 1 for medium in sample.media} == {False, True}


@pytest.mark.parametrize("named", [True, False], ids=["by data.json", "recognised"])
@pytest.mark.parametrize("file_type", ["jsonl", "parquet", "arrow"])
def test_every_format_is_read_alike(tmp_path: Path, file_type: str, named: bool) -> None:
    found = {}
    for form in FORMATS:
        out = tmp_path / form
        make(out, form, "--file-type", file_type, "--images-per-record", "0-1")
        content = json.loads((out / "data.json").read_text())
        if not named:
            del content["dataset_param"]["attr"]
        config = validate_config(content, DataConfig, source="data.json")
        reader = RecordReader(config, SPEC, config.dataset_param.basic_parameters.dataset_files, limit=None)
        found[form] = [
            ([(role, re.sub(r"<image>|\s", "", text)) for role, text, _ in record.messages], len(record.images))
            for record in reader.read()
        ]
        assert len(found[form]) == 6 and not reader.skipped.messages
    assert all(records == found["messages"] for records in found.values())


def test_video_files_show_the_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    options = ("--images-per-record", "0", "--videos-per-record", "1")
    frames = make(tmp_path / "frames", "messages", *options)
    for copy in ("one", "two"):
        files = make(tmp_path / copy, "qwen", *options, "--video-form", "mp4")
    for record, listed in zip(files, frames, strict=True):
        content = (tmp_path / "one" / record["video"][0]).read_bytes()
        assert content == (tmp_path / "two" / record["video"][0]).read_bytes()
        with av.open(io.BytesIO(content)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for pixels, path in zip(decoded, listed["videos"][0], strict=True):
            with Image.open(tmp_path / "frames" / path) as image:
                assert np.abs(np.subtract(pixels, image, dtype=np.float32)).mean() < 8


def test_mm_data_files(tmp_path: Path) -> None:
    def attr(form: str, *options: str) -> dict[str, Any]:
        make(tmp_path / form, form, "--overwrite", *options)
        return json.loads((tmp_path / form / "data.json").read_text())["dataset_param"]["attr"]

    assert {form: attr(form).get("formatting") for form in FORMATS} == {
        "messages": None, "sharegpt": None, "llava": "llava", "qwen": "llava", "openai": "openai", "swift": None,
        "alpaca": "alpaca", "qa": "qa"}
    assert attr("swift", "--objects") == {"formatting": "swift"}
    assert attr("messages", "--videos-per-record", "0-1", "--image-size", "600x500") == {"videos": "videos"}
    config = load_config(tmp_path / "messages" / "data.json", DataConfig, flag="--mm-data").dataset_param
    assert config.preprocess_parameters.image_max_pixels == config.preprocess_parameters.video_max_pixels == 300_000


def test_overwrite_removes_only_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    make(out, "messages", "--file-type", "jsonl")
    (out / "mine.txt").write_text("x")
    arguments = ["--format", "qa", "--out", str(out), "--records", "2", *SMALL]
    assert main(arguments) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    names = {"data.json", "images", "make_data.json", "mine.txt", "train.json", "videos"}
    assert {path.name for path in out.iterdir()} == names and len(list(out.glob("images/*"))) < 6
    (out / "make_data.json").unlink()
    assert main([*arguments, "--overwrite"]) == 2 and "did not write it" in capsys.readouterr().err
    assert (out / "mine.txt").exists() and (out / "train.json").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--format llava --images-per-record 0-2", "--images-per-record 2: --format llava holds 1 in a record"),
        ("--format qa --turns 2", "--turns 2: --format qa holds 1 in a record"),
        ("--format qwen --videos-per-record 1", "holds no videos as frames; set --video-form mp4"),
        ("--format openai --videos-per-record 1", "set --videos-per-record 0"),
        ("--format sharegpt --image-form base64", "does not hold this; set it to path or bytes"),
        ("--format messages --image-form bytes", "a json file cannot hold bytes; set --file-type parquet"),
        ("--format messages --objects", "--objects needs --format swift"),
        ("--format messages --model /nowhere", "--model /nowhere is not a directory"),
        ("--format messages --records 0", "--records: '0' is not a number, within 1"),
        ("--format messages --turns 3-1", "--turns: '3-1' is not a number or a range"),
        ("--format messages --image-size 64x64-32x32", "--image-size: '64x64-32x32' is not WIDTHxHEIGHT"),
        ("--format messages --image-size 64", "--image-size: '64' is not WIDTHxHEIGHT"),
        ("--format nothing", "--format: invalid choice: 'nothing'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: str, complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*options.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # fails as a full disk does: without a file name
    try:
        status = main(["--format", "messages", "--out", str(tmp_path / "out"), *SMALL])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 2 and error == (f"error: --out {tmp_path / 'out'} cannot be written: File too large; free space "
                                     "there, or choose another directory\n")
