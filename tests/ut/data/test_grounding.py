"""Boxes and points in the coordinates of the model: against the pixels of the picture, in every form and mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.grounding import with_objects
from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import Message
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.make_data.__main__ import main as make_data
from tests.helpers.tiny_data import build_tiny, make_config, write_checkpoint

QUESTION = Message("user", "<image>Where is the <ref-object>?")


@pytest.fixture
def image(tmp_path: Path) -> str:
    """200 x 100 pixels."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def answer(objects: Any, image: str, text: str = "At <bbox>.", *, tokens: bool = False, images: int = 1) -> list[str]:
    messages = [QUESTION, Message("assistant", text, in_loss=True)]
    found = with_objects(messages, objects, [image] * images, SPEC, special_tokens=tokens)
    assert [message.in_loss for message in found] == [None, True]
    return [message.text for message in found]


def test_units(image: str) -> None:
    for kind, box in (("real", [20, 10, 100, 100]), ("norm1", [0.1, 0.1, 0.5, 1]), ("norm1000", [100, 100, 500, 1000])):
        objects = {"ref": ["dog"], "bbox": [box], "bbox_type": kind}
        assert answer(objects, image) == ["<image>Where is the dog?", "At [100, 100, 500, 1000]."]
    objects = {"ref": ["dog"], "bbox": [[20, 10, 100, 100]], "image_id": None, "bbox_type": None}  # as in Parquet
    assert answer(objects, image, tokens=True) == [
        "<image>Where is the <|object_ref_start|>dog<|object_ref_end|>?",
        "At <|box_start|>(100,100),(500,1000)<|box_end|>.",
    ]
    assert answer({"ref": ["dog"], "bbox": [[199, 1.04]]}, image)[1] == "At [995, 10]."


def test_upright_images(tmp_path: Path) -> None:
    picture = Image.new("RGB", (100, 200))  # stored on its side
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert answer({"ref": ["dog"], "bbox": [[200, 100]]}, str(tmp_path / "turned.jpg"))[1] == "At [1000, 1000]."


@pytest.mark.parametrize(
    ("objects", "complaint"),
    [
        ("x", "'objects' is a string, not an object with ref and bbox"),
        ({"box": []}, "has the key 'box', which is not read; it may have ref, bbox"),
        ({"ref": ["a"], "bbox": []}, "it has 1 <bbox> in its messages, but 0 in its column 'objects'"),
        ({"ref": [], "bbox": [[1, 2]]}, "1 <ref-object> in its messages, but 0"),
        ({"ref": ["a"], "bbox": [[1, 2, 3]]}, r"box 0 .* is \[1, 2, 3\], not \[x, y\] or"),
        ({"ref": ["a"], "bbox": [[0, 0, 201, 3]]}, r"beyond its image of 200 x 100 \(real\)"),
        ({"ref": ["a"], "bbox": [[0, 0, 20, 3]], "bbox_type": "norm1"}, r"beyond its image of 1 x 1 \(norm1\)"),
        ({"ref": ["a"], "bbox": [[9, 0, 3, 3]]}, "second corner is not below and right"),
        ({"ref": ["a"], "bbox": [[0, 0]], "image_id": [1]}, "one of the 1 images, counted from 0, for each of 1 boxes"),
        ({"ref": ["a"], "bbox": [[0, 0]], "bbox_type": "cm"}, "bbox_type .* is cm; it must be real, norm1, norm1000"),
        ({"ref": [1], "bbox": [[0, 0]]}, "holds a number, not a string"),
    ],
)
def test_mistakes(image: str, objects: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        answer(objects, image)


def test_boxes_are_where_the_shapes_are(tmp_path: Path) -> None:
    """Read back from the answers: the corners of the box enclose the colour that the question asks for."""
    assert make_data(["--format", "swift", "--objects", "--out", str(tmp_path), "--records", "12", "--image-size",
                      "200x120-320x240", "--answer-words", "1-4"]) == 0
    rows = json.loads((tmp_path / "train.json").read_text())
    config = make_config(tmp_path, dataset=str(tmp_path / "train.json"))
    records = list(RecordReader(config, SPEC, [str(tmp_path / "train.json")], limit=None).read())
    seen = 0
    for row, record in zip(rows, records, strict=True):
        texts = "".join(message.text for message in record.messages)
        assert "<bbox>" not in texts and "<ref-object>" not in texts
        for box, pixels in zip(SPEC.boxes_in(texts), row.get("objects", {}).get("bbox", []), strict=True):
            with Image.open(record.images[0]) as picture:
                size = np.array(picture.size * 2)
            assert np.abs(np.array(box) / 1000 * size - pixels).max() <= size.max() / 2000
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("mode", [{}, {"preprocess_on_fly": True}, {"streaming": True}])
def test_every_mode_trains_on_the_same(tmp_path: Path, image: str, mode: dict[str, bool]) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    rows = [{
        "messages": [{"role": "user", "content": QUESTION.text}, {"role": "assistant", "content": text}],
        "images": [image], **({"objects": {"ref": ["dog"], "bbox": [[20, 10, 100, 100]]}} if "<" in text else {}),
    } for text in ("At <bbox>.", "At [100, 100, 500, 1000].")]
    rows[1]["messages"][0]["content"] = "<image>Where is the dog?"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    dataset, _ = build_tiny(make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic=mode))
    assert np.array_equal(dataset[0].input_ids, dataset[1].input_ids)
    rows[0]["objects"]["bbox"] = [[20, 10, 300, 100]]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="data.json, record 0: box 0 .* beyond its image of 200 x 100"):
        dataset, _ = build_tiny(make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic=mode))
        dataset[0]


def test_boxes_of_texts() -> None:
    text = ('[{"bbox_2d": [1, 2, 30, 40], "label": "a"}, {"point_2d": [5, 6]}] <|box_start|>(7,8),(9,10)<|box_end|> '
            "[1, 2, 3, 4] [1, 2] x[1, 2, 3, 4] [1, 2, 3, 4000]")
    assert SPEC.boxes_in(text) == [[1, 2, 30, 40], [5, 6], [7, 8, 9, 10], [1, 2, 3, 4]]
