"""Tables and directories as data files: the same records by index, in order, with a limit; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mindspeed_mm.data import arrow_files
from mindspeed_mm.data.record_files import (
    RecordError,
    RecordFile,
    data_parts,
    fingerprint,
    read_rows,
    struct_columns,
)
from mindspeed_mm.errors import UserError

ROWS = [
    {"id": str(place), "messages": [{"role": "user", "content": f"<image> ü{place}"}],
     "images": [{"bytes": bytes([place, 0xFF]) * 50, "path": None}, {"bytes": b"", "path": "a.png"}]}
    for place in range(40)
]
STREAM = "s.arrow"


def write_arrow(path: Path, rows: list[dict], *, stream: bool, **options: object) -> None:
    table = pyarrow.Table.from_pylist(rows)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(str(path), table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=7):
            writer.write_batch(batch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, root / "p.parquet", row_group_size=7)
    write_arrow(root / STREAM, ROWS, stream=True)
    write_arrow(root / "f.arrow", ROWS, stream=False)
    write_arrow(root / "packed.arrow", ROWS, stream=True, compression="zstd")
    data = datasets.Dataset.from_list(ROWS, features=datasets.Features({
        "id": datasets.Value("string"), "messages": [{name: datasets.Value("string") for name in ("role", "content")}],
        "images": [datasets.Image()],
    }))
    data.save_to_disk(root / "saved", num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(root / "splits")
    for kind in ("parquet", "jsonl"):
        (root / kind).mkdir()
    (root / "parquet/.hidden").touch()
    for number, (start, end) in enumerate(((0, 11), (11, 12), (12, 40))):
        shard = f"train-{number:05}-of-00003"
        pyarrow.parquet.write_table(table.slice(start, end - start), root / f"parquet/{shard}.parquet")
        lines = "\n".join(json.dumps({"id": row["id"]}) for row in ROWS[start:end])
        (root / f"jsonl/{shard}.jsonl").write_text(lines)
    return root


@pytest.mark.parametrize(
    "name", ["p.parquet", STREAM, "f.arrow", "packed.arrow", "saved", "splits/train", "parquet", "jsonl"]
)
def test_records_by_index_and_in_order(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / name
    expected = [{"id": row["id"]} for row in ROWS] if name == "jsonl" else ROWS
    assert list(read_rows(path)) == expected
    assert list(read_rows(path, limit=13)) == expected[:13]
    monkeypatch.setattr("mindspeed_mm.data.record_files._PARTS_OPEN", 1)
    rows = RecordFile(str(path))
    for index in (39, 0, 12, 13, 14, 30, 11, 10):
        assert rows[index] == expected[index]
    with pytest.raises(IndexError):
        rows[40]
    assert struct_columns(path) == (frozenset() if name == "jsonl" else {"messages", "images"})
    child = os.fork()  # as a data worker: files that its parent has open are its own
    if not child:
        os._exit(0 if [rows[index] for index in (39, 12, 13)] == [expected[index] for index in (39, 12, 13)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert rows[1] == expected[1]


def test_csv_and_tsv_are_strings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffid,text\n01,"a ""b"",\nc"\n,ü\n')
    (tmp_path / "a.tsv").write_text("id\ttext\n01\ta, b\n")
    assert list(read_rows(tmp_path / "a.csv")) == [{"id": "01", "text": 'a "b",\nc'}, {"id": "", "text": "ü"}]
    assert list(read_rows(tmp_path / "a.tsv")) == [{"id": "01", "text": "a, b"}]
    for content, message in (("id,id\n1,2\n", "id occurs twice"), ("a,b\n1\n", "Expected 2 columns, got 1"),
                             ("", "Empty CSV")):
        (tmp_path / "b.csv").write_text(content)
        with pytest.raises(UserError, match=f"CSV file .*b.csv.*{message}"):
            read_rows(tmp_path / "b.csv")


def test_the_parts_of_a_directory_are_its_fingerprint(root: Path, tmp_path: Path) -> None:
    """In the order of ``state.json``; the place of the directory does not matter, its content does."""
    copy = tmp_path / "saved"
    shutil.copytree(root / "saved", copy)
    assert [Path(part).name for part in data_parts(copy)] == [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert data_parts(root / "p.parquet") == [str(root / "p.parquet")]
    assert fingerprint([copy]) == fingerprint([str(root / "saved")]) == fingerprint(data_parts(copy))
    state = json.loads((copy / "state.json").read_text())
    state["_data_files"].reverse()
    (copy / "state.json").write_text(json.dumps(state))
    assert fingerprint([copy]) != fingerprint([root / "saved"])
    assert read_rows(copy)[0] == ROWS[27]


def files(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, '{"a": 1}\n')


@pytest.mark.parametrize(("content", "message"), [
    ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, "the splits train, test; name one of them: .*/d/train"),
    ({"dataset_dict.json": '{"splits": []}'}, "dataset_dict.json cannot be read: .*; save the data set again, or name"),
    ({"state.json": '{"_data_files": [], "_indices_data_files": [{}]}'}, r"after dataset.flatten_indices\(\)"),
    ({"state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'}, "leads out of the directory"),
    ({"state.json": "{}"}, "state.json cannot be read.*; save the data set again"),
    ({"state.json": '{"_data_files": [{"filename": "x.arrow"}]}'}, "x.arrow does not exist"),
    ({}, "is a directory and is empty; name its data files"),
    (files("a.jsonl", "README.md"), "is a directory and holds README.md and a.jsonl; name its data files"),
    (files("a.json", "b.json"), "holds b.json; .* only .parquet, only .arrow, only .jsonl files"),
    (files("train.jsonl", "test.jsonl"), r"several splits \(test, train\); name the files to use, .*/train.jsonl,"),
    (files("a-train-00000-of-00001.jsonl", "a-test-00000-of-00001.jsonl"), r"several splits \(a-test, a-train\)"),
    (files("train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl"), "holds 2 of 3 shards; add the others, or name"),
])
def test_directories_that_are_no_data_file(tmp_path: Path, content: dict[str, str], message: str) -> None:
    (tmp_path / "d").mkdir()
    for name, text in content.items():
        (tmp_path / "d" / name).write_text(text)
    for read in (read_rows, RecordFile, struct_columns):
        with pytest.raises(UserError, match=message) as raised:
            read(str(tmp_path / "d"))
        assert "\n" not in str(raised.value)


def test_shards_that_need_no_names(tmp_path: Path) -> None:
    for name in ("part-0.jsonl", "part-1.jsonl", "_SUCCESS"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert list(read_rows(tmp_path)) == [{"a": 1}] * 2
    (tmp_path / "part-1.jsonl").write_text('{"a": 1}\n\n{"a": x}\n')
    with pytest.raises(RecordError, match=r"record 2 .* is not valid JSON"):
        read_rows(tmp_path)[2]


def test_damaged_arrow_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (root / STREAM).read_bytes()
    path = tmp_path / "x.arrow"
    ends = [end for end in range(len(content)) if content.startswith(b"\xff\xff\xff\xff", end)]
    for damaged, message in ((content[: ends[3]], "it was cut off"), (content[:1000], "cannot be read"),
                             (b"", "cannot be read"), (b"[]", "cannot be read")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"Arrow file .*x.arrow.*{message}.*; correct it"):
            RecordFile(str(path))
    # the offsets of the first column: behind its end
    first = content.index(b"".join(n.to_bytes(4, "little") for n in range(7)))
    path.write_bytes(content[: first + 20] + b"\xff\xff\xff\x7f" + content[first + 24 :])
    rows = RecordFile(str(path))
    assert rows[7] == ROWS[7]
    with pytest.raises(RecordError, match="x.arrow, record 0 cannot be read: .*ffset"):
        rows[0]
    monkeypatch.setattr(arrow_files, "_COMPRESSED", 100)
    with pytest.raises(UserError, match="packed.arrow cannot be read: it is a compressed stream"):
        RecordFile(str(root / "packed.arrow"))


def test_a_damaged_row_does_not_hide_the_rows_before_it(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"b", b"\xff", b"d"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    rows = RecordFile(str(tmp_path / "a.parquet"))
    assert [rows[index]["text"] for index in (0, 1, 3)] == ["a", "b", "d"]
    with pytest.raises(RecordError, match="a.parquet, record 2 cannot be read"):
        rows[2]


def test_arrow_values_are_not_copied_for_other_records(tmp_path: Path) -> None:
    """A mapped file takes no memory of Arrow's; a record that is read out of order is converted alone."""
    write_arrow(tmp_path / "a.arrow", [{"image": bytes(100_000)}] * 40, stream=True)
    before = pyarrow.total_allocated_bytes()
    rows = RecordFile(str(tmp_path / "a.arrow"))
    assert len(rows[20]["image"]) == 100_000 and pyarrow.total_allocated_bytes() - before < 50_000
    assert len(rows._parts[0].rows._rows) == 1  # type: ignore[attr-defined]


def test_other_names_for_tables(root: Path, tmp_path: Path) -> None:
    for name, kind in (("p.parquet", "Parquet file"), (STREAM, "Arrow stream"), ("f.arrow", "Arrow file")):
        shutil.copy(root / name, tmp_path / "x.json")
        with pytest.raises(UserError, match=f"x.json is an? {kind}, not a UTF-8 text; give it a name that ends in"):
            read_rows(tmp_path / "x.json")
        shutil.copy(root / name, tmp_path / Path(name).name.upper())
        assert read_rows(tmp_path / Path(name).name.upper())[3] == ROWS[3]
