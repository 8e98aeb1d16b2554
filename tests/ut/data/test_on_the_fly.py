"""``preprocess_on_fly`` and ``streaming`` give what the built data set gives; unreadable files; bad records."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from mindspeed_mm.data import validate_data
from mindspeed_mm.data.record_files import RecordFile, fingerprint, read_rows
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import build_tiny, make_config, make_records, tiny_loader, write_dataset

TRICKY = [{"text": 'a "shorten" ] bracket', "list": [[1, 2], {"x": "}"}]}, {"text": "\\", "list": []}, {"text": "ü\n"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fly")
    write_dataset(directory, 12)
    records = make_records(directory / "more", 7)
    (directory / "b.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), directory / "c.parquet", row_group_size=3)
    return directory


def config_of(root: Path, *, loader: dict | None = None, **basic: object) -> object:
    names = ", ".join(str(root / name) for name in ("data.json", "b.jsonl", "c.parquet"))
    return make_config(root, dataset=names, basic=basic, loader=loader)


def batches(root: Path, config: object, *, count: int = 13, consumed: int = 0, workers: int = 0) -> list[Batch]:
    loader = tiny_loader(
        config, seq_length=512, micro_batch_size=2,  # type: ignore
        global_batch_size=4, dp_rank=0, dp_size=1, seed=5, consumed_samples=consumed, num_workers=workers,
    )
    assert len(loader.dataset) == 26
    taken = list(itertools.islice((batch for step in loader for batch in step.batches), count))
    loader.close()
    return taken


@pytest.mark.parametrize("mode", ["preprocess_on_fly", "streaming"])
def test_the_same_samples_in_the_same_order_with_workers_and_resume(root: Path, mode: str) -> None:
    built = batches(root, config_of(root))
    config = config_of(root, **{mode: True})
    alone, together = batches(root, config), batches(root, config, workers=2)
    resumed = batches(root, config, consumed=8, count=9)
    for ours, theirs in [*zip(alone, built, strict=True), *zip(together, built, strict=True),
                         *zip(resumed, built[4:], strict=True)]:
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.vision.pixels, theirs.vision.pixels)


@pytest.mark.parametrize("mode", ["preprocess_on_fly", "streaming"])
def test_resume_at_another_world_size_and_over_an_epochs_end(root: Path, mode: str) -> None:
    """Steps of four of 26 samples, 24 per epoch: the fifth step of one process is that of two which start there."""
    config = config_of(root, **{mode: True})
    alone = batches(root, config, count=18)  # nine steps of two micro-batches: the epoch ends after the sixth
    by_step = [alone[place].sample_ids + alone[place + 1].sample_ids for place in range(0, 18, 2)]
    assert len({sample for step in by_step[:6] for sample in step}) == 24
    tokens = {sample: ids for batch in alone[8:] for sample, ids in _tokens(batch)}
    ranks = []
    for rank in range(2):
        loader = tiny_loader(
            config, seq_length=512,  # type: ignore[arg-type]
            micro_batch_size=1, global_batch_size=4, dp_rank=rank, dp_size=2, seed=5, consumed_samples=16,
            num_workers=rank,
        )
        ranks.append([next(loader).batches for _ in range(5)])
        loader.close()
    for step, parts in zip(by_step[4:], zip(*ranks, strict=True), strict=True):
        assert sorted(sample for part in parts for batch in part for sample in batch.sample_ids) == sorted(step)
    for batch in (batch for rank in ranks for part in rank for batch in part):
        for sample, ids in _tokens(batch):
            assert torch.equal(ids, tokens[sample])


def _tokens(batch: Batch) -> list[tuple[int, torch.Tensor]]:
    """Each sample's number and tokens."""
    lengths = np.diff(batch.cu_seqlens_host).tolist()
    return list(zip(batch.sample_ids, batch.input_ids.split(lengths), strict=True))


def test_streaming_builds_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path, 6)
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic={"streaming": True, "val_rate": 0.34})
    assert validate_data(config, SPEC) == [6]
    train, held = build_tiny(config, seq_length=512, seed=1)
    assert held is not None and (len(train), len(held)) == (4, 2)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(TypeError):
        train.costs()


@pytest.mark.parametrize("mode", ["preprocess_on_fly", "streaming"])
def test_too_long_records_are_counted_not_bad(root: Path, mode: str) -> None:
    loader = tiny_loader(
        config_of(root, loader={"shuffle": False}, **{mode: True}),  # type: ignore[arg-type]
        seq_length=30, micro_batch_size=4, global_batch_size=24,
        dp_rank=0, dp_size=1, seed=5,
    )
    step = next(loader)
    assert step.skipped.unusable == () and step.skipped.no_target == 0 and 0 < step.skipped.too_long < 24
    loss_mask = [count for batch in step.batches for count in batch.target_tokens_per_sample]
    assert loss_mask.count(0) == step.skipped.too_long


@pytest.mark.parametrize(("name", "write"), [
    ("x.json", lambda path: path.write_text(json.dumps(TRICKY, ensure_ascii=False, indent=1))),
    ("x.jsonl", lambda path: path.write_text("\n".join(json.dumps(row) for row in TRICKY) + "\n")),
    ("x.parquet", lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": row["text"]} for row in TRICKY]), path, row_group_size=2)),
])
def test_any_record_can_be_reached(tmp_path: Path, name: str, write: object) -> None:
    write(tmp_path / name)  # type: ignore[operator]
    file = RecordFile(str(tmp_path / name))
    assert len(file) == 3 and len(RecordFile(str(tmp_path / name), limit=2)) == 2
    for index in (2, 0, 1, 2):
        assert file[index]["text"] == TRICKY[index]["text"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    def write(rows: list[dict[str, str]]) -> None:
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows))

    write([{"text": "one"}, {"text": "two"}])
    file = RecordFile(str(path))
    write([{"text": "two"}, {"text": "one"}])  # of the same size: a worker that opens it now would read other records
    with pytest.raises(UserError, match=f"{name} has changed since the run began"):
        file[0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_a_file_that_does_not_fit_into_memory_is_refused_but_streamed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = tmp_path / name, [{"text": "a" * 1000}] * 1000
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, compression="gzip", use_dictionary=False
        )
        assert path.stat().st_size < 100_000
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else json.dumps(rows))
    monkeypatch.setattr("mindspeed_mm.data.record_files.available_memory", lambda: 2_900_000)
    if name.endswith("parquet"):  # read by row groups
        assert read_rows(path)[999] == rows[0]
    else:
        with pytest.raises(UserError, match=f"{name} needs about 0.0 GB of memory.*streaming to true"):
            read_rows(path)
    assert len(RecordFile(str(path))) == 1000
    monkeypatch.setattr("mindspeed_mm.data.record_files.available_memory", lambda: None)
    assert len(read_rows(path)) == 1000


def test_a_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    rows = [json.dumps(list(range(k, k + 300))) for k in range(5_000)]  # 8 MB: more than all blocks together
    first.write_text("\n".join(rows))
    second.write_text("\n".join(rows))
    assert fingerprint([first]) == fingerprint([str(second)]) != fingerprint([first, second])
    second.write_text("\n".join(rows[::-1]))
    assert fingerprint([first]) != fingerprint([second])
    second.write_text("")
    assert fingerprint([second]) != fingerprint([first])
    with pytest.raises(UserError, match="absent.json cannot be read: No such file"):
        fingerprint([tmp_path / "absent.json"])


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for content, complaint in (('{"a": []}', "an object, not a list"), ('[{"a": 1}, {', "not a valid JSON list"),
                               ("", "is empty"), ("7", "not a valid JSON list")):
        bad.write_text(content)
        with pytest.raises(UserError, match=complaint):
            RecordFile(str(bad))
    bad.write_text(" [ ]\n")
    assert len(RecordFile(str(bad))) == 0
    bad.write_text('[{"a": x}]')
    with pytest.raises(UserError, match=r"bad.json, record 0 \(which begins in line 1 .*\) is not valid JSON"):
        RecordFile(str(bad))[0]
    with pytest.raises(UserError, match="docs/own_data.md"):
        RecordFile(str(tmp_path / "absent.jsonl"))


def test_bad_records_before_training_stop_or_are_skipped(tmp_path: Path) -> None:
    records = make_records(tmp_path / "images", 12)
    write_dataset(tmp_path, 12)
    records[3]["messages"] = []
    (tmp_path / "images" / "0004.png").write_bytes(b"damaged")
    (tmp_path / "data.json").write_text(json.dumps(records))

    def build(**loader: object) -> int:
        config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), loader=loader)
        validate_data(config, SPEC)
        return len(build_tiny(config, seq_length=512, seed=1)[0])

    with pytest.raises(UserError, match="record 3: the conversation is empty"):
        build()
    with pytest.raises(UserError, match="record 3: the conversation is empty.*max_bad_samples allows 1"):
        build(on_bad_sample="skip", max_bad_samples=1)
    assert build(on_bad_sample="skip", max_bad_samples=2) == 10
    (skipped,) = (tmp_path / "cache").glob("tokenized-*/skipped.txt")
    first, second = skipped.read_text().splitlines()
    assert "record 3" in first and "record 4" in second and "0004.png" in second


def test_bad_records_while_streaming_travel_with_the_step(tmp_path: Path) -> None:
    write_dataset(tmp_path, 6)
    records = json.loads((tmp_path / "data.json").read_text())
    records[2]["messages"][0]["content"] = "no tag"
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "images" / "0001.png").unlink()
    skip = {"shuffle": False, "on_bad_sample": "skip"}
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic={"streaming": True}, loader=skip)
    loader = tiny_loader(
        config, seq_length=512, micro_batch_size=3,
        global_batch_size=6, dp_rank=0, dp_size=1, seed=5,
    )
    step = next(loader)
    assert len(step.skipped.unusable) == 2 and len(step.batches) == 2
    assert "record 1" in step.skipped.unusable[0] and "0001.png" in step.skipped.unusable[0]
    assert "record 2: it has 0 <image> tags" in step.skipped.unusable[1]
    counts = [count for batch in step.batches for count in batch.target_tokens_per_sample]
    assert np.flatnonzero(np.array(counts) == 0).tolist() == [1, 2]


@pytest.mark.parametrize("name", ["data.json", "b.jsonl", "c.parquet"])
def test_a_streamed_file_that_is_written_to(root: Path, tmp_path: Path, name: str) -> None:
    """Of the same size, after it was opened."""
    path = tmp_path / name
    path.write_bytes((root / name).read_bytes())
    rows = RecordFile(str(path))
    first = rows[0]
    time.sleep(0.01)
    with path.open("r+b") as file:
        file.write(path.read_bytes()[:4])
    with pytest.raises(UserError, match=f"{name} has changed since the run began") as raised:
        rows[1]
    assert type(raised.value) is UserError  # no bad record, which could be skipped
    assert RecordFile(str(path))[0] == first


def test_the_line_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n  2 "b": 3}\n]\n')
    with pytest.raises(UserError, match=r"record 1 \(which begins in line 4 of the file\) is not valid JSON"):
        read_rows(path)[1]
    assert read_rows(path)[0] == {"a": 1}


@pytest.mark.parametrize("name", ["data.xls", "data.XLSX", "data.txt"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(UserError, match=rf"{name} is a \.\w+ file; data files are JSON lists, .*: convert it"):
        read_rows(tmp_path / name)
