"""Files to samples: cache, truncation, several files, and changes that must be noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data import cache
from mindspeed_mm.data.collator import collate
from mindspeed_mm.data.dataset import ChatDataset
from mindspeed_mm.data.media_files import MediaFinder
from mindspeed_mm.data.record_files import read_rows
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.tiny_data import (
    build_tiny,
    checkpoint_config,
    make_config,
    make_records,
    write_checkpoint,
    write_dataset,
)


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    return tmp_path


def build(root: Path, *, seq_length: int = 1024, seed: int = 1, **overrides: object) -> tuple:
    overrides.setdefault("dataset", str(root / "data.json"))
    config = make_config(root, **overrides)  # type: ignore[arg-type]
    return build_tiny(config, seq_length=seq_length, seed=seed)


def answers(dataset: ChatDataset, root: Path) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(root / "checkpoint" / "tokenizer.json"))
    samples = [dataset[index] for index in range(len(dataset))]
    return [
        tokenizer.decode(sample.input_ids[sample.loss_mask].tolist(), skip_special_tokens=True) for sample in samples
    ]


def test_samples_of_real_files(root: Path) -> None:
    train, held_out = build(root)
    assert held_out is None and len(train) == 12
    texts = answers(train, root)
    assert texts[1] == "The digit is 1." and texts[0] == "The digit is 0.Yes, there is one."
    model_config = checkpoint_config(root / "checkpoint")
    batch = collate([train[index] for index in range(12)], SPEC, model_config)
    assert len(batch.vision.grid_thw) == 8
    assert batch.vision.grid_thw[0] == (1, 2, 2)  # 32x32
    assert batch.sample_ids == list(range(12))


def test_cache_is_reused_and_keyed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = build(root)
    monkeypatch.setattr("mindspeed_mm.data.prepare.load_tokenizer", lambda _: pytest.fail("built anew"))
    again, _ = build(root)
    assert answers(train, root) == answers(again, root)
    for change in (
        {"seq_length": 900},
        {"basic": {"mask_history": True}},
        {"basic": {"max_samples": 5}},
        {"preprocess": {"image_max_pixels": 4096}},
        {"basic": {"overwrite_cache": True}},
    ):
        if change == {"basic": {"overwrite_cache": True}}:
            monkeypatch.setattr(cache, "_PROCESS_START", time.time() + 60)
        with pytest.raises(pytest.fail.Exception):
            build(root, **change)
    monkeypatch.setattr(cache, "_PROCESS_START", time.time() - 60)
    build(root, basic={"overwrite_cache": True})  # another process of this job has built it already
    records = json.loads((root / "data.json").read_text())
    records[1]["messages"][1]["content"] = "changed"
    (root / "data.json").write_text(json.dumps(records))
    with pytest.raises(pytest.fail.Exception):
        build(root)
    assert not list((root / "cache").glob("*.building-*"))


def test_overwrite_replaces(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(root)
    (finished,) = (root / "cache").glob("tokenized-*/finished")
    os.utime(finished, (1, 1))
    train, _ = build(root, basic={"overwrite_cache": True})
    assert finished.stat().st_mtime > 1 and len(train) == 12


def test_other_processes_wait_for_the_builder(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from mindspeed_mm.data.cache import build_once\n"
        "def build(directory):\n"
        "    time.sleep(0.4); (directory / 'by').write_text(sys.argv[2])\n"
        "    open(sys.argv[1] + '.count', 'a').write('x')\n"
        "print((build_once(Path(sys.argv[1]), build, overwrite=True) / 'by').read_text())"
    )
    target = tmp_path / "cache" / "entry"
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(target), str(name)], stdout=subprocess.PIPE, text=True)
        for name in range(3)
    ]
    outputs = {process.communicate(timeout=30)[0] for process in started}
    assert len(outputs) == 1 and Path(f"{target}.count").read_text() == "x"


def test_killed_builder_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from mindspeed_mm.data.cache import build_once\n"
        "def build(directory):\n"
        "    (directory / 'half').touch(); print('building', flush=True); time.sleep(60)\n"
        "build_once(Path(sys.argv[1]), build)"
    )
    target = tmp_path / "cache" / "entry"
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"building\n"
        builder.kill()
    assert not target.exists() and len(list(target.parent.glob("entry.building-*"))) == 1
    cache.build_once(target, lambda directory: (directory / "whole").touch())
    assert sorted(path.name for path in target.iterdir()) == ["finished", "whole"]
    assert not list(target.parent.glob("entry.building-*"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _nest(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [_flip, _nest, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
@pytest.mark.parametrize("name", ["rows/*.arrow", "rows/state.json", "summary.txt", "finished"])
def test_a_damaged_entry_is_built_again(
    root: Path, name: str, damage: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    before = answers(build(root)[0], root)
    (path,) = (root / "cache").glob(f"tokenized-*/{name}")
    damage(path)
    assert answers(build(root)[0], root) == before
    messages = [message for message in caplog.messages if "is damaged" in message and "is rebuilt" in message]
    assert len(messages) == (0 if name == "finished" and damage is Path.unlink else 1)
    assert not messages or path.name in messages[0] or name == "finished"
    caplog.clear()
    assert answers(build(root)[0], root) == before and "is damaged" not in caplog.text
    shutil.rmtree(path.parents[name.startswith("rows")])
    path.parents[name.startswith("rows")].write_text("no directory")
    for _ in range(2):
        assert answers(build(root)[0], root) == before


def test_a_lower_limit_of_unusable_records_counts_for_a_cached_entry(root: Path) -> None:
    (root / "images/0001.png").write_bytes(b"damaged")
    (root / "images/0002.png").write_bytes(b"damaged")
    loader = {"on_bad_sample": "skip", "max_bad_samples": 2}
    assert len(build(root, loader=loader)[0]) == 10
    with pytest.raises(UserError, match=r"record 1: .*\(and 1 more such records\); .*max_bad_samples allows 1"):
        build(root, loader={**loader, "max_bad_samples": 1})


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cache_dir \S+cache cannot be written: No space left.*; free disk space"):
        cache.build_once(tmp_path / "cache" / "entry", full)
    assert not list((tmp_path / "cache").glob("*building*"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir \S+file cannot be made: .*choose another"):
        cache.build_once(tmp_path / "file" / "entry", full)


def test_truncation_drops_turns_then_samples(root: Path) -> None:
    whole, _ = build(root)
    lengths = [len(whole[index].input_ids) for index in range(12)]
    limit = sorted(lengths)[5]
    short, _ = build(root, seq_length=limit)
    assert 0 < len(short) < 12 and max(len(short[index].input_ids) for index in range(len(short))) <= limit
    summaries = {path.read_text() for path in (root / "cache").glob("*/summary.txt")}
    (summary,) = (text for text in summaries if not text.startswith("12 records, 12 kept whole\n"))
    assert f"skipped: the first turn is too long (the first: {root}/data.json, record " in summary
    with pytest.raises(UserError, match="no record can be trained on"):
        build(root, seq_length=3)


def test_several_files_and_formats(root: Path) -> None:
    records = make_records(root / "more", 4)
    (root / "b.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / "c.parquet")
    names = ", ".join(str(root / name) for name in ("data.json", "b.jsonl", "c.parquet"))
    train, _ = build(root, dataset=names)
    assert len(train) == 20
    assert answers(train, root)[12:16] == answers(train, root)[16:]
    train, held_out = build(root, dataset=names, basic={"max_samples": 2, "val_dataset": str(root / "b.jsonl")})
    assert (len(train), len(held_out)) == (6, 4)


def test_val_rate_splits(root: Path) -> None:
    train, held_out = build(root, basic={"val_rate": 0.25})
    assert (len(train), len(held_out)) == (9, 3)
    assert sorted(answers(train, root) + answers(held_out, root)) == sorted(answers(build(root)[0], root))
    assert answers(build(root, basic={"val_rate": 0.25})[1], root) == answers(held_out, root)


def test_val_max_samples_limits_both_kinds(root: Path) -> None:
    assert len(build(root, basic={"val_rate": 0.5, "val_max_samples": 2})[1]) == 2
    train, held_out = build(root, basic={"val_dataset": str(root / "data.json"), "val_max_samples": 5})
    assert (len(train), len(held_out)) == (12, 5)


def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(UserError, match="cache_dir .* without file locks.*choose another"):
        cache.build_once(tmp_path / "cache" / "entry", lambda directory: None)


def test_replaced_and_missing_images_are_named(root: Path) -> None:
    train, _ = build(root)
    Image.new("RGB", (320, 320)).save(root / "images" / "0001.png")
    with pytest.raises(UserError, match=r"^\S+data.json, record 1: image \S+0001.png now has"):
        train[1]
    (root / "images" / "0002.png").unlink()
    with pytest.raises(UserError, match="record 2.*0002.png.*missing"):
        train[2]


def test_parallel_tokenizing_gives_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = build(root)
    monkeypatch.setattr("mindspeed_mm.data.prepare._RECORDS_PER_PROCESS", 4)
    together, _ = build(
        root, basic={"cache_dir": str(root / "other"), "preprocessing_num_workers": 2, "preprocessing_batch_size": 3}
    )
    for index in range(12):
        assert np.array_equal(alone[index].input_ids, together[index].input_ids)

    def refuse(*_: object) -> None:
        raise UserError("bad")

    monkeypatch.setattr("mindspeed_mm.data.encoder.measure_media", refuse)
    with pytest.raises(UserError, match="record 1: bad"):
        build(root, basic={"cache_dir": str(root / "third"), "preprocessing_num_workers": 2})


def test_paths_are_not_joined_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "x.jpg").touch()
    (tmp_path / "outside.jpg").touch()
    monkeypatch.chdir(tmp_path)
    finder = MediaFinder("./data")
    assert finder.find("images/x.jpg") == "./data/images/x.jpg"
    assert finder.find("./data/images/x.jpg") == "./data/images/x.jpg"
    assert finder.find("outside.jpg") == "outside.jpg"
    assert finder.find(str(tmp_path / "outside.jpg")) == str(tmp_path / "outside.jpg")
    assert finder.find("images") is None and finder.find("y/z.jpg") is None


def test_unreadable_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    bad = tmp_path / "bad.json"
    for content, complaint in (("{}", "an object, not a list"), ("[1,", "not valid JSON")):
        bad.write_text(content)
        with pytest.raises(UserError, match=complaint):
            read_rows(bad)
    with pytest.raises(UserError, match="correct the path, or its permissions|docs/own_data.md"):
        read_rows(tmp_path / "absent.json")
    bad.write_text("[]")
    with pytest.raises(UserError, match="no record"):
        build(tmp_path, dataset=str(bad))
