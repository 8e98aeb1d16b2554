"""Every message names a record by its data file and its own index there, and says what is odd about the records."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mindspeed_mm.data import ChatDataset, validate_data
from mindspeed_mm.data.dataset import SkippedSample
from mindspeed_mm.data.record_files import read_rows
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, make_config, make_records, tiny_loader, write_checkpoint

MODES: list[dict[str, bool]] = [{}, {"preprocess_on_fly": True}, {"streaming": True}]
FILES = ("a.json", "b.jsonl", "c.parquet")


class Files:
    """Three data files of five records each; an entry of ``rows`` may be changed before ``write``."""

    def __init__(self, root: Path) -> None:
        write_checkpoint(root / "checkpoint")
        self.root = root
        self.rows = {name: make_records(root / name.partition(".")[0], 5) for name in FILES}

    def config(self, *, on_bad_sample: str = "stop", **basic: Any) -> Any:
        dataset = ",".join(str(self.root / name) for name in FILES)
        return make_config(self.root, dataset=dataset, basic=basic,
                           loader={"on_bad_sample": on_bad_sample, "shuffle": False, "drop_last": False})

    def write(self) -> None:
        a, b, c = (self.rows[name] for name in FILES)
        (self.root / "a.json").write_text(json.dumps(a))
        (self.root / "b.jsonl").write_text("\n\n".join(map(json.dumps, b)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(c), self.root / "c.parquet")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def skipped_in_training(files: Files, **basic: Any) -> list[str]:
    """The messages of one epoch without its data file's checks."""
    config = files.config(on_bad_sample="skip", **basic)
    dataset, _ = build_tiny(config)
    loader = tiny_loader(config, dataset=dataset, seq_length=512, seed=0, micro_batch_size=len(dataset),
                         global_batch_size=len(dataset), dp_rank=0, dp_size=1)
    return list(next(loader).skipped.unusable)


def names_in(message: str) -> list[str]:
    return re.findall(r"\w+\.\w+, record \d+", message)


@pytest.mark.parametrize("basic", MODES)
def test_a_bad_record(files: Files, basic: dict) -> None:
    files.rows["a.json"][1]["messages"] = []  # so that later indices over all files and rows differ
    files.rows["c.parquet"][3]["messages"].pop()
    files.write()
    with pytest.raises(UserError, match=r"a.json, record 1: the conversation is empty \(and 1 more"):
        validate_data(files.config(**basic), SPEC)
    config = files.config(on_bad_sample="skip", **basic)
    assert validate_data(config, SPEC) == [13]
    if basic.get("streaming"):
        messages = skipped_in_training(files, **basic)
    else:
        build_tiny(config)
        (skipped,) = files.root.glob("cache/*/skipped.txt")
        messages = skipped.read_text().splitlines()
    assert [names_in(message) for message in messages] == [["a.json, record 1"], ["c.parquet, record 3"]]


@pytest.mark.parametrize("basic", MODES)
def test_an_image_that_is_damaged_later(files: Files, basic: dict) -> None:
    files.rows["a.json"][1]["messages"] = []
    files.write()
    build_tiny(files.config(on_bad_sample="skip", **basic))
    (files.root / "b/0002.png").write_bytes(b"damaged")
    messages = skipped_in_training(files, **basic)
    assert [names_in(message) for message in messages if "0002.png" in message] == [["b.jsonl, record 2"]]


def test_an_image_that_is_damaged_while_the_data_set_is_built(files: Files) -> None:
    files.write()
    (files.root / "c/0004.png").write_bytes(b"damaged")
    with pytest.raises(UserError) as raised:
        build_tiny(files.config())
    assert names_in(str(raised.value)) == ["c.parquet, record 4"]
    build_tiny(files.config(on_bad_sample="skip"))
    (skipped,) = files.root.glob("cache/*/skipped.txt")
    assert names_in(skipped.read_text()) == ["c.parquet, record 4"]


def test_a_line_that_is_not_json(files: Files) -> None:
    files.write()
    path = files.root / "b.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "{", *lines[5:]]))
    with pytest.raises(UserError, match=r"b.jsonl, record 2 \(line 5\) is not valid JSON"):
        read_rows(path)[2]
    assert validate_data(files.config(on_bad_sample="skip"), SPEC) == [14]
    config = files.config(on_bad_sample="skip", streaming=True)
    assert validate_data(config, SPEC) == [14]
    (message,) = skipped_in_training(files, streaming=True)
    assert names_in(message) == ["b.jsonl, record 2"] and "is not valid JSON" in message
    with pytest.raises(UserError, match=r"b.jsonl, record 2 \(line 5\) is not valid JSON"):
        validate_data(files.config(streaming=True), SPEC)


def test_summary_and_cache_after_a_file_is_renamed(files: Files) -> None:
    long = "word " * 400
    files.rows["b.jsonl"][3]["messages"][0]["content"] += long
    files.rows["c.parquet"][0]["messages"][0]["content"] += long
    files.write()

    def summaries() -> list[str]:
        config = files.config()
        build_tiny(config, seq_length=200)
        return [path.read_text() for path in files.root.glob("cache/tokenized-*/summary.txt")]

    (summary,) = summaries()
    assert f"2 skipped: the first turn is too long (the first: {files.root}/b.jsonl, record 3)" in summary
    (files.root / "b.jsonl").rename(files.root / "d.jsonl")
    dataset, _ = build_tiny(
        make_config(files.root, dataset=str(files.root / "d.jsonl"), basic={"max_samples": 3})
    )
    assert dataset.describe(2) == f"{files.root}/d.jsonl, record 2"


@pytest.mark.parametrize("basic", MODES)
def test_samples_and_records_find_each_other(files: Files, basic: dict) -> None:
    files.rows["a.json"][1]["messages"] = []
    files.write()
    dataset, held = build_tiny(files.config(on_bad_sample="skip", val_rate=0.3, **basic))
    assert held is not None
    known = {split.describe(index) for split in (dataset, held) for index in range(len(split))}
    numbers = {name: range(5) for name in FILES} if basic.get("streaming") else {
        **{name: range(5) for name in FILES}, "a.json": (0, 2, 3, 4)}
    assert known == {f"{files.root}/{name}, record {number}" for name in FILES for number in numbers[name]}
    for split in (dataset, held):
        for index in range(len(split)):
            path, _, record = split.describe(index).rpartition(", record ")
            assert split.find(path, int(record)) == index
    path, _, record = held.describe(0).rpartition(", record ")
    with pytest.raises(UserError, match="is not in the data set"):
        dataset.find(path, int(record))
    with pytest.raises(UserError, match="c.parquet, record 5 is not in the data set"):
        dataset.find(str(files.root / "c.parquet"), 5)
    with pytest.raises(UserError, match="d.json is not one of the data files; choose .*a.json or"):
        dataset.find("d.json", 0)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [message for message in caplog.messages if "control tokens" in message]
    caplog.clear()
    return found


def tokens(dataset: ChatDataset) -> list[np.ndarray | None]:
    found: list[np.ndarray | None] = []
    for index in range(len(dataset)):
        try:
            found.append(dataset[index].input_ids)
        except SkippedSample:
            found.append(None)
    return found


def test_written_out_control_tokens_are_counted_and_said_once(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mindspeed_mm")
    files.write()
    for basic in MODES:
        tokens(build_tiny(files.config(**basic))[0])
    assert said(caplog) == []  # nothing to say
    files.rows["b.jsonl"][3]["messages"][0]["content"] += " <|im_end|>\n<|im_start|>system"
    files.rows["b.jsonl"][3]["messages"][1]["content"] += "<|image_pad|>"
    files.rows["c.parquet"][0]["messages"][1]["content"] += "<|endoftext|> <|box_start|>"
    files.rows["c.parquet"][2]["messages"][1]["content"] += "<|box_start|> < |im_end| >"  # neither is one of them
    files.write()
    note = ("3 messages of 2 records in which control tokens of the chat format are written out, encoded as plain "
            f"text; the first: <|im_end|> in {files.root}/b.jsonl, record 3")
    for basic in MODES:
        for _ in range(2):  # built, and from the cache
            tokens(build_tiny(files.config(**basic))[0])
            (message,) = said(caplog)
            assert message.endswith(f": {note}"), message


def test_streaming_says_the_first_beyond_those_that_are_read_ahead(
    files: Files, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindspeed_mm.data.records._STREAMED_ROWS_CHECKED", 2)
    caplog.set_level(logging.INFO, "mindspeed_mm")
    for name in ("b.jsonl", "c.parquet"):
        files.rows[name][3]["messages"][0]["content"] += "<|im_end|>"
    files.write()
    dataset, _ = build_tiny(files.config(streaming=True))
    assert said(caplog) == []
    tokens(dataset)
    (message,) = said(caplog)
    assert message.startswith("1 message of 1 record in which control tokens")
    assert f"; the first: <|im_end|> in {files.root}/b.jsonl" in message


@pytest.mark.parametrize("streamed", [False, True])
def test_videos_within_records_are_refused_with_a_remedy(tmp_path: Path, streamed: bool) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    (row,) = make_records(tmp_path, 2)[1:]
    row["videos"] = [{"bytes": b"\x89PNG", "path": None}]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    config = make_config(tmp_path, dataset=str(path), attr={"videos": "videos"}, basic={"streaming": streamed})
    with pytest.raises(UserError) as raised:
        validate_data(config, SPEC)
    complaint = f"{path}, record 0: its column 'videos' (attr.videos)"
    assert complaint in str(raised.value) and "write each into a file of its own" in str(raised.value)
