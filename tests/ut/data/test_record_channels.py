"""A record's ``channel`` reaches the batch in every mode and every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.data.formats import recognise
from mindspeed_mm.data.parsing import parse_record
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, make_config, make_records, tiny_loader, write_checkpoint

NAMES = ["ocr", None, "chart/bar", "ocr"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("channels")
    write_checkpoint(directory / "checkpoint")
    records = make_records(directory / "images", 12)
    for number, record in enumerate(records):
        name = NAMES[number % 4]
        record |= {"channel": name} if name or number % 8 == 1 else {}
    (directory / "data.json").write_text(json.dumps(records))
    return directory


def expected(index: int) -> str:
    return NAMES[index % 4] or ""


@pytest.mark.parametrize("mode", [{}, {"preprocess_on_fly": True}, {"streaming": True}, {"packing": True}], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_in_every_mode(root: Path, mode: dict[str, bool], workers: int) -> None:
    config = make_config(root, dataset=str(root / "data.json"), basic=mode, loader={"shuffle": False})
    loader = tiny_loader(
        config, seq_length=512, micro_batch_size=1, global_batch_size=1 if "packing" in mode else 4, dp_rank=0,
        dp_size=1, seed=0, num_workers=workers,
    )
    for _ in range(2):
        for batch in next(loader).batches:
            names = [expected(index) for index in batch.sample_ids]
            assert batch.record_channels == (names if any(names) else [])
            assert batch.to("cpu").record_channels == batch.record_channels
    loader.close()
    named = loader.dataset.record_channels()
    known = {(0, ""), (0, "chart/bar"), (0, "ocr")}
    assert named == (known if not {"preprocess_on_fly", "streaming"} & set(mode) else None)


def test_held_out_samples_of_a_mixture_know_their_data_set(root: Path) -> None:
    path = str(root / "data.json")
    config = make_config(root, dataset={"one": {"path": path}}, basic={
        "val_dataset": {"one": {"path": path}, "two": {"path": path, "max_samples": 4}},
    })
    _, held_out = build_tiny(config)
    samples = [held_out[index] for index in range(len(held_out))]
    assert held_out.data_set_numbers().tolist() == [sample.channel for sample in samples]
    assert sorted(held_out.data_set_numbers()) == [0] * 12 + [1] * 4
    for count in (None, 0, 1, 5, 14, 99):
        first = {(sample.channel, sample.record_channel) for sample in samples[:count]}
        assert held_out.record_channels(count) == first
    assert held_out.record_channels() == {(number, name or "") for number in (0, 1) for name in NAMES}


RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "output": "b"},
    "qa": {"question": "a", "answer": "b"},
}


def parse(record: dict[str, Any]) -> Any:
    attr = make_config(Path("."), dataset="x.json").dataset_param.attr
    return parse_record(record, recognise(attr, [record]), SPEC)


@pytest.mark.parametrize("name", RECORDS)
def test_in_every_format(name: str) -> None:
    assert parse({**RECORDS[name], "channel": " maths "}).channel == "maths"
    assert parse({**RECORDS[name], "channel": None}).channel == parse(RECORDS[name]).channel == ""
    assert "channel" in recognise(make_config(Path("."), dataset="x.json").dataset_param.attr, []).read_columns


@pytest.mark.parametrize(
    ("value", "message"),
    [(3, "is a number, not a string; write a name, or rename the column"), (["a"], "is a list, not a string"),
     ("a\nb", "printable characters"), ("x" * 101, "at most 100 printable"), ("\ud800", "printable characters")],
)
def test_other_values_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match="its column 'channel', by which evaluations are reported, .*" + message):
        parse({**RECORDS["qa"], "channel": value})
