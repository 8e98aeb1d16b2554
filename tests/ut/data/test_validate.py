"""Every mistake in the data is one line that names file, record and remedy."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.data.validate import validate_data
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, make_config, make_records, write_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("validate")
    (directory / "checkpoint").mkdir()
    return directory


@pytest.fixture(scope="module")
def records(root: Path) -> list[dict[str, Any]]:
    return make_records(root / "images", 6)


def check(root: Path, rows: Any, **overrides: Any) -> int:
    (root / "data.json").write_text(json.dumps(rows))
    return validate_data(make_config(root, dataset=str(root / "data.json"), **overrides), SPEC)


def test_good_data(root: Path, records: list) -> None:
    assert check(root, records) == [6]
    assert check(root, records, basic={"max_samples": 4}) == [4]


def set_in(*path: Any) -> Callable[[list], None]:
    *keys, last, value = path

    def change(rows: list) -> None:
        target: Any = rows
        for key in keys:
            target = target[key]
        target[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (set_in(2, "text"), r"record 2: it is a string"),
        (lambda rows: rows[3].pop("messages"), r"record 3: its column 'messages' \(attr.messages\) is missing.*images"),
        (set_in(1, "messages", {}), r"record 1: its column 'messages' .* is an object, not a list"),
        (set_in(1, "messages", 0, "x"), "record 1: message 0 is a string"),
        (lambda rows: rows[1]["messages"][0].pop("role"),
         "'role' of message 0 is missing; it has: content; set attr.role_tag to its key"),
        (set_in(1, "messages", 1, "content", None), "'content' of message 1 is null"),
        (set_in(1, "messages", 1, "role", "gpt"), "role 'gpt'; attr names the roles user, assistant"),
        (set_in(4, "messages", []), "record 4: the conversation is empty"),
        (lambda rows: rows[4]["messages"].pop(), "record 4: the last message .* is not an answer, .*remove it"),
        (set_in(1, "images", ["a", "b"]), "record 1: it has 1 <image> tags in its questions, but 2 images"),
        (lambda rows: rows[1].pop("images"), r"no column 'images' \(attr.images\); it has: messages; set attr.images"),
        (set_in(1, "images", [3]), "is not a list of images: one is a number; write paths"),
        (set_in(1, "images", [{"x": 1}]), "record 1: an image is an object that has the key 'x', which is not read"),
        (set_in(1, "images", ["."]), r"record 1: image \S+ is a directory; write the path of a file"),
        (lambda rows: rows[1]["messages"].insert(1, {"role": "user", "content": "x"}),
         r"messages 0 \(user\) and 1 \(user\) do not alternate; join them into one, or remove one"),
        (lambda rows: rows[1]["messages"].pop(0), "not with a question; add it, or remove"),
        (set_in(1, "messages", 1, "weight", 0.5), "'weight' of message 1 is 0.5; it must be true or false, 1 or 0"),
        (set_in(1, "messages", 0, "loss", True), r"'loss' of message 0 \(user\) is true, and only answers are"),
        (set_in(1, "messages", 1, "tool_calls", [1]), "message 1 is not a tool call: it is a number, not an object"),
        (set_in(1, "objects", {"bbox": [[0, 0, 1, 1]]}), "record 1: it has 0 <bbox> in its messages, but 1 in its"),
        (set_in(1, "images", ["gone.png"]),
         r"image gone.png does not exist \(looked for \S+/gone.png and gone.png\); put"),
    ],
)
def test_bad_record(root: Path, records: list, change: Callable[[list], Any], complaint: str) -> None:
    rows = copy.deepcopy(records)
    change(rows)
    with pytest.raises(UserError, match=complaint) as raised:
        check(root, rows)
    assert "data.json" in str(raised.value) and "\n" not in str(raised.value)


def test_template_that_cannot_think(root: Path, records: list) -> None:
    with pytest.raises(UserError, match="no thinking part; choose qwen3_vl"):
        check(root, records, basic={"enable_thinking": True})
    assert check(root, records, basic={"enable_thinking": True, "template": "qwen3_vl"}) == [6]


def test_imports_no_torch() -> None:
    """The launcher waits for this check; torch alone takes seconds to import."""
    listed = ("import sys; from mindspeed_mm.data import validate_data; from mindspeed_mm.models.spec import get_spec; "
              "get_spec('qwen3_vl'); print(*{'torch', 'transformers', 'megatron', 'datasets'} & set(sys.modules))")
    found = subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""


def test_unknown_names_of_the_model_family(root: Path, records: list) -> None:
    with pytest.raises(UserError, match="template 'llava' is unknown .*; choose qwen3_vl_nothink or qwen3_vl$"):
        check(root, records, basic={"template": "llava"})
    with pytest.raises(UserError, match="collate_param.model_name 'llava' is unknown .*; choose qwen3vl$"):
        check(root, records, loader={"collate_param": {"model_name": "llava"}})


def test_counts_missing_images(root: Path, records: list) -> None:
    with pytest.raises(UserError, match="record 1.*and 3 more such records"):
        check(root, [{**record, "images": ["no.png"] * len(record["images"])} for record in records])


def test_no_list_no_file_no_model(root: Path, records: list, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an object, not a list"):
        check(root, {"data": records})
    with pytest.raises(UserError, match="has no record"):
        check(root, [])
    with pytest.raises(UserError, match="absent.json does not exist.*docs/own_data.md"):
        validate_data(make_config(root, dataset=str(root / "absent.json")), SPEC)
    with pytest.raises(UserError, match="model_name_or_path.*step 2"):
        validate_data(make_config(tmp_path, dataset=str(root / "data.json")), SPEC)


def test_other_names_and_roles(root: Path) -> None:
    rows = [{
        "chat": [
            {"from": "sys", "value": "Be brief."}, {"from": "human", "value": "Time?"},
            {"from": "call", "value": '{"name": "clock", "arguments": {}}'}, {"from": "result", "value": "12:00"},
            {"from": "gpt", "value": "Noon."},
        ],
        "photos": None,
    }]
    attr = {"images": "photos", "messages": "chat", "role_tag": "from", "content_tag": "value", "user_tag": "human",
            "assistant_tag": "gpt", "system_tag": "sys", "function_tag": "call", "observation_tag": "result"}
    assert check(root, rows, attr=attr) == [1]
    rows[0]["chat"][2]["value"] = "now"
    with pytest.raises(UserError, match="message 2 is not a tool call"):
        check(root, rows, attr=attr)


def test_videos_without_tags_are_refused(root: Path, records: list) -> None:
    with pytest.raises(UserError, match="record 0: it has 0 <video> tags in its questions, but 1 videos"):
        check(root, [{**records[0], "videos": ["a.mp4"]}], attr={"videos": "videos"})


@pytest.mark.parametrize("basic", [{}, {"streaming": True}])
def test_a_file_without_records_beside_others_is_refused(tmp_path: Path, basic: dict) -> None:
    data = write_dataset(tmp_path)
    for name, content in (("empty.jsonl", "\n\n"), ("empty.json", "[]")):
        (tmp_path / name).write_text(content)
        config = make_config(tmp_path, dataset=f"{data},{tmp_path}/{name}", basic=basic)
        for read in (lambda config=config: validate_data(config, SPEC), lambda config=config: build_tiny(config)):
            with pytest.raises(UserError, match=rf"{name} has no records; write records .*, or leave it out"):
                read()


def test_a_file_of_unusable_records_only_is_refused_where_they_are_skipped(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "bad.json").write_text('[{"messages": []}, {"messages": 1}]')
    config = make_config(tmp_path, dataset=f"{tmp_path}/bad.json", loader={"on_bad_sample": "skip"})
    for read in (lambda: validate_data(config, SPEC), lambda: build_tiny(config)):
        with pytest.raises(UserError, match=r"none of 2 records can be used; the first: .*bad.json, record 0: the con"):
            read()


def test_files_that_are_named_twice_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_dataset(tmp_path)
    (tmp_path / "link.json").symlink_to(data)
    (tmp_path / "other.json").write_text(data.read_text())
    build_tiny(make_config(tmp_path, dataset=f"{data},{tmp_path}/other.json"))
    assert not [one for one in caplog.messages if "more than once" in one or "evaluated on" in one]
    build_tiny(make_config(tmp_path, dataset=f"{data},{data}", basic={"val_dataset": f"{tmp_path}/link.json"}))
    assert f"dataset names {data} more than once: its records count as often" in caplog.messages
    assert f"{tmp_path}/link.json is trained on and evaluated on: its evaluation says nothing of other data" in \
        caplog.messages


def test_columns_named_by_attr(root: Path, records: list, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="attr.*system and images|images and system both name the column 'images'"):
        check(root, records, attr={"system": "images"})
    with pytest.raises(UserError, match="its questions, but attr.images is null; set it to the column of their paths"):
        check(root, records, attr={"images": None})
    caplog.set_level("INFO")
    (root / "data.json").write_text(json.dumps(records))
    (root / "elsewhere").mkdir(exist_ok=True)
    reader = RecordReader(make_config(root, dataset="x", attr={"system": "prompt"}), SPEC, [str(root / "data.json")],
                          limit=None)
    assert len(list(reader.read())) == 6 and reader.notes["absent"] == "no record has the column 'prompt' (attr.system)"
    rows = [{**record, "prompt": "Be brief."} for record in records]
    assert check(root, rows, attr={"system": "prompt"}) == [6]
    rows[2]["messages"] = [{"role": "system", "content": "Be long."}, *rows[2]["messages"]]
    with pytest.raises(UserError, match="record 2: it has a system message and a column 'prompt' .*; remove one"):
        check(root, rows, attr={"system": "prompt", "system_tag": "system"})
