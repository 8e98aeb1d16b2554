"""The conversion script, called as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "examples" / "qwen2vl" / "llava_instruct_2_mllm_demo_format.py"


def call(directory: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def record(image: str | None, *turns: tuple[str, str]) -> dict[str, Any]:
    converted: dict[str, Any] = {"id": "1", "conversations": [{"from": who, "value": what} for who, what in turns]}
    return converted if image is None else {**converted, "image": image}


GOOD = record("a.jpg", ("human", "<image>\nWhat?"), ("gpt", "Ein Hünd 狗."), ("human", "Sure?"), ("gpt", "Yes."))
TEXT = record(None, ("human", "Hi"), ("gpt", "Hello \x7f\u2028\"."))


@pytest.fixture()
def recipe(tmp_path: Path) -> Path:
    """The directory as the guide's step 3 leaves it."""
    (tmp_path / "data/COCO2017/train2017/sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / "data/COCO2017/train2017" / name).touch()
    write(tmp_path, [GOOD, TEXT, record("gone.jpg", ("human", "<image>x"), ("gpt", "y"))])
    return tmp_path


def write(directory: Path, records: Any) -> None:
    (directory / "data/llava_instruct_150k.json").write_text(json.dumps(records))


def output(directory: Path) -> Any:
    return json.loads((directory / "data/mllm_format_llava_instruct_data.json").read_text())


def test_default_call_is_the_recipe(recipe: Path) -> None:
    done = call(recipe)
    assert done.returncode == 0 and done.stderr == ""
    assert output(recipe) == [
        {
            "images": ["./data/COCO2017/train2017/a.jpg"],
            "messages": [
                {"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Ein Hünd 狗."},
                {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."},
            ],
        },
        {"images": [], "messages": [{"role": "user", "content": "Hi"},
                                    {"role": "assistant", "content": "Hello \x7f\u2028\"."}]},
    ]
    assert "kept 2 records, 1 of them text-only" in done.stdout
    assert "skipped 1 records whose image is missing: gone.jpg" in done.stdout
    assert oct((recipe / "data/mllm_format_llava_instruct_data.json").stat().st_mode & 0o777) == oct(0o666 & ~umask())


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_running_again(recipe: Path) -> None:
    call(recipe)
    again = call(recipe)
    assert again.returncode == 0 and "is up to date" in again.stdout
    write(recipe, [GOOD])
    refused = call(recipe)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and len(output(recipe)) == 2
    assert call(recipe, "--overwrite").returncode == 0 and len(output(recipe)) == 1
    assert not list((recipe / "data").glob(".*"))


def test_without_orjson_the_same_bytes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(recipe)
    (recipe / "no").mkdir()
    (recipe / "no" / "orjson.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(recipe / "no"))
    again = call(recipe)
    assert again.returncode == 0 and "is up to date" in again.stdout


def test_options(recipe: Path) -> None:
    write(recipe, [record("sub/c.jpg", ("system", "s"), ("human", "<image>"), ("gpt", "y"))] * 5)
    (recipe / "data/llava_instruct_150k.json").rename(recipe / "in.json")
    images = str(recipe / "data/COCO2017/train2017")
    done = call(recipe, "--input", "in.json", "--image-root", images, "--output", "new/out.json", "--limit", "2")
    assert done.returncode == 0, done.stderr
    converted = json.loads((recipe / "new/out.json").read_text())
    assert len(converted) == 2 and converted[0]["images"] == [f"{images}/sub/c.jpg"]
    assert [message["role"] for message in converted[0]["messages"]] == ["system", "user", "assistant"]
    assert call(recipe, "--limit", "0").returncode == 2


def test_malformed_records_are_named(recipe: Path) -> None:
    bad = [
        7, {"id": 1}, record("a.jpg", ("human", "no tag"), ("gpt", "y")), record(None, ("gpt", "y")),
        record(None, ("human", "x")), record(None, ("robot", "x"), ("gpt", "y")),
        record(None, ("human", "x"), ("human", "y"), ("gpt", "z")), record(3, ("human", "x"), ("gpt", "y")),
    ]
    write(recipe, [GOOD, *bad])
    done = call(recipe)
    assert done.returncode == 1 and len(output(recipe)) == 1
    assert "skipped 4 malformed records: record 1: it is not an object; record 2: it has no list" in done.stdout
    assert "tags is not that of their images: record 3: 0 <image> tags for 1 images\n" in done.stdout
    assert (
        "skipped 3 records whose turns are out of order: record 4: turn 0 is out of order: gpt; "
        "record 5: its last turn is not an answer; record 7: turn 1 is out of order: human\n"
    ) in done.stdout


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "no list"), ("[", "cannot be read as JSON"), ("[]", "no record"),
        ('[{"conversations": [], "id": 1, "id": 2}]', "id occurs twice in one object"),
    ],
)
def test_bad_input_is_one_line(recipe: Path, content: str, complaint: str) -> None:
    (recipe / "data/llava_instruct_150k.json").write_text(content)
    done = call(recipe)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert complaint in done.stderr and not (recipe / "data/mllm_format_llava_instruct_data.json").exists()


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "a/../../b.jpg"])
def test_images_outside_the_root_are_refused(recipe: Path, name: str) -> None:
    (recipe / "data/COCO2017/secret.jpg").write_bytes(b"")
    write(recipe, [GOOD, {**GOOD, "image": name}])
    done = call(recipe)
    assert done.returncode == 1 and len(output(recipe)) == 1
    assert "skipped 1 malformed records: record 1: its image lies outside --image-root" in done.stdout


def test_keys_that_are_lost_are_counted(recipe: Path) -> None:
    write(recipe, [{**GOOD, "source": "web", "note": None}, {**GOOD, "conversations": [
        {**turn, "rating": 0} for turn in GOOD["conversations"]]}])
    done = call(recipe)
    assert done.returncode == 0 and len(output(recipe)) == 2
    assert "not read, with the number of records: source (1), conversations.rating (1)\n" in done.stdout


@pytest.mark.parametrize(
    ("record", "turn"),
    [({"system": "Be brief."}, {}), ({"tools": [{}]}, {}), ({}, {"loss": False}), ({}, {"weight": 0}),
     ({}, {"tool_calls": [1]})],
)
def test_keys_that_would_change_the_target_are_not_lost(recipe: Path, record: dict, turn: dict) -> None:
    """The loader refuses them, and could not once they are gone."""
    turns = [GOOD["conversations"][0], {**GOOD["conversations"][1], **turn}, *GOOD["conversations"][2:]]
    harmless = [{**GOOD["conversations"][0], "loss": True, "weight": 1}, *GOOD["conversations"][1:]]
    write(recipe, [GOOD, {**GOOD, **record, "conversations": turns},
                   {**GOOD, "system": "", "tools": [], "conversations": harmless}])
    done = call(recipe)
    assert done.returncode == 1 and len(output(recipe)) == 2
    key = next(iter({**record, **turn}))
    assert "skipped 1 records with keys that would change what is trained on" in done.stdout
    assert f"record 1: {key} is " in done.stdout


def test_the_source_is_not_replaced(recipe: Path) -> None:
    write(recipe, [GOOD])
    source = recipe / "data/llava_instruct_150k.json"
    before = source.read_bytes()
    done = call(recipe, "--output", str(source), "--overwrite")
    assert done.returncode == 2 and "is --input, which would be replaced" in done.stderr
    assert source.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output(recipe: Path) -> None:
    write(recipe, [GOOD])
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(SCRIPT)], cwd=recipe, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard output cannot be written: No space left on device\n")


def test_missing_steps_of_the_guide(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.returncode == 2 and "step 3" in done.stderr
    (tmp_path / "data").mkdir()
    write(tmp_path, [GOOD])
    done = call(tmp_path)
    assert done.returncode == 2 and "unpack COCO2017" in done.stderr
