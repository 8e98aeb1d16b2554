"""A broken file of a checkpoint or a model directory is one line that names it; none hangs or loads wrong values."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoint.cli import main
from mindspeed_mm.checkpoint import directory
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import (
    MANIFEST,
    METADATA,
    PROGRESS_FILE,
    TRACKER,
    checkpoint_to_load,
    read_manifest,
    read_tracker,
    verify_directory,
)
from mindspeed_mm.checkpoint.files import file_checksum
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.huggingface import INDEX, SINGLE, read_headers
from mindspeed_mm.checkpoint.inspection import inspect
from mindspeed_mm.checkpoint.metadata_file import read_entries
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.checkpoint.safetensors_io import read_header
from mindspeed_mm.checkpoint.storage import CheckpointReader, read_metadata
from mindspeed_mm.errors import UserError
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.outcomes import Outcomes
from tests.ut.checkpoint.test_loader import load, make, save
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

NOT_FILES = ["fifo", "directory", "zero", "loop"]


def replace(path: Path, kind: str) -> None:
    """Put something that is not a regular file in the place of one."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else path)


def refused(function: Callable[[], Any], *words: str) -> None:
    """``function`` raises one short line with all ``words``."""
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    assert [word for word in words if word not in message] == [], message


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory ``hf`` of three files and its checkpoint ``dcp``."""
    root = tmp_path_factory.mktemp("broken")
    write_hf_directory(root / "hf", random_config(random.Random(3), moe=False, tie=False))
    hf_to_dcp(root / "hf", root / "dcp")
    return root


@pytest.fixture
def hf(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "hf", tmp_path / "hf"))


@pytest.fixture
def release(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "dcp", tmp_path / "dcp")) / "release"


@pytest.fixture
def saved(tmp_path: Path, process_group: Any) -> Path:
    """A training checkpoint of iteration 1."""
    return save(tmp_path / "save", *make(seed=1))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint of torch's own: a tensor of two rows in one chunk."""
    path = tmp_path / "plain"
    dcp.save({"model.a": torch.ones(2, 3)}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def progress_of(path: Path, **changes: Any) -> None:
    edit_json(path / PROGRESS_FILE, lambda content: content.update(changes))


def record_again(path: Path, name: str) -> None:
    """Give the manifest the present size and checksum of a file."""
    facts = {"size": (path / name).stat().st_size, "checksum": file_checksum(path / name)}
    edit_json(path / MANIFEST, lambda content: content["files"][name].update(facts))


# progress.json


@pytest.mark.parametrize("check", ["read", "all", "sizes"])
def test_changed_progress_is_refused(saved: Path, check: str) -> None:
    text = (saved / PROGRESS_FILE).read_text()
    (saved / PROGRESS_FILE).write_text(text.replace('"iteration": 1', '"iteration": 0'))
    refused(lambda: load(saved, *make(), check=check), PROGRESS_FILE, "checksum", "restore")


def test_changed_progress_is_believed_without_checks(saved: Path) -> None:
    progress_of(saved, iteration=7)
    (saved / MANIFEST).unlink()
    assert load(saved, *make(), check="none").iteration == 7


def test_progress_that_the_manifest_lacks(saved: Path) -> None:
    edit_json(saved / MANIFEST, lambda content: content["files"].pop(PROGRESS_FILE))
    refused(lambda: load(saved, *make()), PROGRESS_FILE, MANIFEST, "remove it")


@pytest.mark.parametrize("name", ["iteration", "consumed_samples", "seed", "samples_per_epoch"])
@pytest.mark.parametrize("value", [-5, True, 1.0, "3", [1], 10**30])
def test_progress_values(saved: Path, name: str, value: Any) -> None:
    progress_of(saved, **{name: value})
    record_again(saved, PROGRESS_FILE)
    refused(lambda: load(saved, *make()), PROGRESS_FILE, str(value)[:20], "whole numbers from 0")


@pytest.mark.parametrize(
    ("content", "word"),
    [("{}", "no iteration"), ("[]", "a list"), ('{"iteration": 1, "schedule": 3}', "schedule"),
     ("[" * 10**5, "JSON"), ("{", "JSON"), ("\xff", "JSON"), ('{"iteration": null}', "whole numbers")],
)
def test_progress_of_other_kinds(tmp_path: Path, content: str, word: str) -> None:
    (tmp_path / PROGRESS_FILE).write_text(content)
    refused(lambda: Progress.read(tmp_path), PROGRESS_FILE, word)


@pytest.mark.parametrize("kind", NOT_FILES)
def test_progress_is_no_file(tmp_path: Path, kind: str) -> None:
    replace(tmp_path / PROGRESS_FILE, kind)
    refused(lambda: Progress.read(tmp_path), PROGRESS_FILE, "cannot be read")


# tracker and manifest


@pytest.mark.parametrize("text", ["²", "٣", "9" * 19, "-1", "1_0", "1.0", "", "../x", "releases", "0x1", "é"])
def test_tracker_values(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    refused(lambda: read_tracker(tmp_path), TRACKER, "iteration number", text[:10])


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", [TRACKER, "release/" + MANIFEST, "release/" + METADATA])
@pytest.mark.parametrize("is_plain", [False, True])
def test_checkpoint_files_that_are_none(release: Path, kind: str, name: str, is_plain: bool) -> None:
    replace(release.parent / name, kind)

    def read() -> None:
        path, manifest = checkpoint_to_load(release.parent, plain=is_plain)
        CheckpointReader(path, manifest)

    refused(read, Path(name).name)


def test_huge_manifest_is_not_read(release: Path) -> None:
    os.truncate(release / MANIFEST, 2 << 30)
    refused(lambda: read_manifest(release), MANIFEST, "2147483648 bytes")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.update(files=[]), ("files", "a list")),
        (lambda m: m.update(metadata=[]), ("metadata", "a list")),
        (lambda m: m.pop("metadata"), ("metadata", "null")),
        (lambda m: m.update(format=2), ("format 2",)),
        (lambda m: m["files"].update({"../x": m["files"][METADATA]}), ("../x", "inside")),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][METADATA]}), ("/etc/passwd", "inside")),
        (lambda m: m["files"].update({"": m["files"][METADATA]}), ("not a file name",)),
        (lambda m: m["files"].update({"a\0b": m["files"][METADATA]}), ("not a file name",)),
        (lambda m: m["files"].update({METADATA: None}), (METADATA, "damaged")),
        (lambda m: m["files"][METADATA].update(size=-1), (METADATA, "-1")),
        (lambda m: m["files"][METADATA].update(size=True), (METADATA, "True")),
        (lambda m: m["files"][METADATA].update(size="7"), (METADATA, "'7'")),
        (lambda m: m["files"][METADATA].update(checksum=5), (METADATA, "5")),
        (lambda m: m["files"][METADATA].update(items=[[0, -1, "x"]]), (METADATA, "-1")),
        (lambda m: m["files"][METADATA].update(items={"x": 1}), (METADATA, "'x'")),
    ],
)
def test_manifest_values(release: Path, edit: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    edit_json(release / MANIFEST, edit)
    refused(lambda: read_manifest(release), MANIFEST, *words)


def test_manifest_without_files(release: Path) -> None:
    edit_json(release / MANIFEST, lambda content: content.update(files={}))
    refused(lambda: CheckpointReader(release, verify_directory(release)), MANIFEST, "no files", "restore")


def test_metadata_must_be_in_the_manifest(release: Path) -> None:
    edit_json(release / MANIFEST, lambda content: content["files"].pop(METADATA))
    refused(lambda: CheckpointReader(release, verify_directory(release)), MANIFEST, METADATA, "restore")


@pytest.mark.parametrize(
    "base", [None, 3, [], {}, {"kind": "huggingface"}, {"kind": "other", "path": "/x", "digest": "0"},
             {"kind": "checkpoint", "path": 3, "digest": "0"}],
)
def test_base_in_the_manifest(base: Any) -> None:
    refused(lambda: Base.recorded({"metadata": {BASE_KEY: base}}), MANIFEST, "base", "restore")


@pytest.mark.parametrize(
    "facts", [{"kind": "converted"}, {"kind": "converted", "source": 3}, {"model_config": {"text": 1}}]
)
def test_facts_in_the_manifest(release: Path, facts: dict[str, Any]) -> None:
    edit_json(release / MANIFEST, lambda content: content.update(metadata=facts))
    refused(lambda: inspect(release), MANIFEST, "metadata", "again")


def test_flags_in_the_manifest_do_not_matter_to_loading(saved: Path) -> None:
    edit_json(saved / MANIFEST, lambda content: content["metadata"].update(flags=[1]))
    assert load(saved, *make()).iteration == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"size": 1}', '{"size": 1, "checksum": "x", "chunks": 1, "facts": {}}'])
def test_record_of_an_interrupted_conversion(tmp_path: Path, text: str) -> None:
    """A record that cannot be used makes the file be written again."""
    target = directory.AtomicDirectory(tmp_path / "release")
    target.resume("plan")
    (target.partial / "left").write_bytes(b"1")
    (target.partial / directory.FINISHED / "left.json").write_text(text)
    assert target.resume("plan") == {} and not (target.partial / "left").exists()


# .metadata


def chunks_of(metadata: Any) -> list[Any]:
    return metadata.state_dict_metadata["model.a"].chunks


def set_info(**changes: Any) -> Callable[[Any], None]:
    return lambda metadata: [vars(info).update(changes) for info in metadata.storage_data.values()] and None


def set_chunk(**changes: Any) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        chunks_of(metadata)[0] = dataclasses.replace(chunks_of(metadata)[0], **changes)

    return edit


def overlapping(metadata: Any) -> None:
    """Two chunks of one row, both in the first: as many elements as the tensor has."""
    chunk = dataclasses.replace(chunks_of(metadata)[0], sizes=torch.Size([1, 3]))
    chunks_of(metadata)[:] = [chunk, chunk]


def set_entry(**changes: Any) -> Callable[[Any], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["model.a"]).update(changes)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (set_info(relative_path="../x"), "../x leads out"),
        (set_info(relative_path="/etc/passwd"), "/etc/passwd leads out"),
        (set_info(relative_path="a/b"), "a/b"),
        (set_info(relative_path=3), "'3' is not a file name"),
        (set_info(offset=-1), "-1"),
        (set_info(offset="0"), "whole numbers"),
        (set_info(length=-1), "-1"),
        (set_info(length=2.0), "2.0"),
        (set_info(length=1 << 70), "whole numbers"),
        (set_chunk(offsets=torch.Size([-1, 0])), "[-1, 0]"),
        (set_chunk(offsets=torch.Size([1, 0])), "not within it"),
        (set_chunk(sizes=torch.Size([-2, -3])), "[-2, -3]"),
        (set_chunk(sizes=torch.Size([6])), "not within it"),
        (set_chunk(sizes="23"), "not within it"),
        (set_entry(size=torch.Size([2, -3])), "[2, -3]"),
        (set_entry(size=torch.Size([1 << 40, 1 << 40])), "no tensor has"),
        (set_entry(size=6), "no tensor has"),
        (set_entry(size=torch.Size([3, 3])), "not completely stored"),
        (set_entry(chunks=3), "damaged"),
        (set_entry(properties=None), "damaged"),
        (overlapping, "overlap"),
        (lambda metadata: vars(metadata).update(storage_data={}), "where model.a is"),
        (lambda metadata: vars(metadata).update(storage_data=[]), "no description"),
        (lambda metadata: vars(metadata).update(state_dict_metadata=3), "no description"),
        (lambda metadata: vars(metadata).clear(), "no description"),
    ],
)
def test_metadata_values(plain: Path, edit: Callable[[Any], None], word: str) -> None:
    metadata = read_metadata(plain / METADATA)
    assert CheckpointReader(plain).read("model.a").tolist() == [[1.0] * 3] * 2
    edit(metadata)
    (plain / METADATA).write_bytes(pickle.dumps(metadata))
    refused(lambda: CheckpointReader(plain), str(plain), word)


def test_chunks_side_by_side_do_not_overlap(plain: Path) -> None:
    metadata = read_metadata(plain / METADATA)
    chunk, info = chunks_of(metadata)[0], next(iter(metadata.storage_data.values()))
    parts = [((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 1), (1, 2)), ((0, 3), (2, 0))]
    chunks_of(metadata)[:] = [dataclasses.replace(chunk, offsets=torch.Size(a), sizes=torch.Size(b)) for a, b in parts]
    metadata.storage_data = {MetadataIndex("model.a", torch.Size(a)): info for a, _ in parts}
    (plain / METADATA).write_bytes(pickle.dumps(metadata))
    assert CheckpointReader(plain).tensors == {"model.a": ((2, 3), torch.float32)}


def test_pickle_with_a_huge_table_is_refused(plain: Path) -> None:
    (plain / METADATA).write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")  # object number 2^32 - 1
    refused(lambda: CheckpointReader(plain), METADATA, "4294967295", "again")


def test_chunk_file_is_none(plain: Path) -> None:
    reader = CheckpointReader(plain)
    replace(next(plain.glob("*.distcp")), "fifo")
    refused(lambda: reader.read("model.a"), ".distcp", "not a regular file")


# weight index and safetensors


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda i: i.update(weight_map=[]), ("weight_map", "a list")),
        (lambda i: i.update(weight_map={}), ("no tensors",)),
        (lambda i: i.pop("weight_map"), ("weight_map", "null")),
        (lambda i: i["weight_map"].update(x=3), ("x", "a number")),
        (lambda i: i["weight_map"].update(x=None), ("x", "null")),
        (lambda i: i["weight_map"].update(x="../model.safetensors"), ("../model.safetensors", "inside")),
        (lambda i: i["weight_map"].update(x="/etc/passwd"), ("/etc/passwd", "inside")),
        (lambda i: i["weight_map"].update(x="a\0b"), ("not a file name",)),
        (lambda i: i["weight_map"].update(x="absent"), ("lacks 1", "absent")),
        (lambda i: i["weight_map"].update(x="config.json"), ("config.json", "download")),
    ],
)
def test_index_values(hf: Path, edit: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    edit_json(hf / INDEX, edit)
    refused(lambda: read_headers(hf), str(hf), *words)


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", [INDEX, "config.json", "model-00001-of-00003.safetensors"])
def test_model_files_that_are_none(hf: Path, tmp_path: Path, kind: str, name: str) -> None:
    replace(hf / name, kind)
    refused(lambda: hf_to_dcp(hf, tmp_path / "new"), name)
    assert not (tmp_path / "new" / "release").exists()


@pytest.mark.parametrize("kind", ["file", *NOT_FILES])
def test_two_sets_of_weights_are_ambiguous(hf: Path, kind: str) -> None:
    if kind == "file":
        shutil.copy(hf / "model-00001-of-00003.safetensors", hf / SINGLE)
    else:
        replace(hf / SINGLE, kind)
    refused(lambda: read_headers(hf), INDEX, SINGLE, "remove the one that is not meant")


def test_index_of_the_single_file_is_not_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    tensors = write_hf_directory(path, random_config(random.Random(3), moe=False, tie=False), shards=1)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE)}))
    assert read_headers(path)[SINGLE].tensors.keys() == tensors.keys()


def write_header(path: Path, content: Any, data: bytes = bytes(24)) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "shape": [True, 6]}, {**GOOD, "shape": [2.0, 3]}, {**GOOD, "shape": [-2, -3]},
        {**GOOD, "shape": ["2", 3]}, {**GOOD, "shape": {}}, {**GOOD, "shape": "23"}, {**GOOD, "shape": None},
        {**GOOD, "shape": [1 << 80]}, {**GOOD, "shape": [0, 1 << 61, 1 << 61], "data_offsets": [0, 0]},
        {**GOOD, "shape": [2, 3, *[1] * 100_000]}, {**GOOD, "shape": [1 << 60] * 100_000},
        {**GOOD, "data_offsets": [0.0, 24]}, {**GOOD, "data_offsets": [False, 24]}, {**GOOD, "data_offsets": [-24, 0]},
        {**GOOD, "data_offsets": [24, 0]}, {**GOOD, "data_offsets": [0]}, {**GOOD, "data_offsets": 3},
        {**GOOD, "data_offsets": [4, 28]}, {**GOOD, "dtype": 3}, {**GOOD, "dtype": ["F32"]}, {**GOOD, "dtype": "F31"},
        {}, [], None, 3, "x",
    ],
)
def test_header_entries(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "a.safetensors"
    write_header(path, {"good": GOOD})
    assert read_header(path).tensors["good"].shape == (2, 3)
    write_header(path, {"bad": entry})
    refused(lambda: read_header(path), str(path), "bad")


@pytest.mark.parametrize("metadata", [[], 0, "x", {"a": 1}, {"a": None}, False])
def test_header_metadata(tmp_path: Path, metadata: Any) -> None:
    path = tmp_path / "a.safetensors"
    write_header(path, {"__metadata__": metadata, "good": GOOD})
    refused(lambda: read_header(path), str(path), "__metadata__", "download")


@pytest.mark.parametrize("content", [[], 3, "x", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_header_of_other_kinds(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.safetensors"
    write_header(path, content)
    refused(lambda: read_header(path), str(path), "download")


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_length_of_a_header(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    refused(lambda: read_header(path), str(path), "truncated")


@pytest.mark.parametrize(
    "content", [struct.pack("<Q", 1 << 63) + b"{}", b"123", struct.pack("<Q", 2) + b"[]",
                struct.pack("<Q", 32) + b'{"a": {"data_offsets": [9, -9]}}'],
)
def test_weights_of_a_base(hf: Path, content: bytes) -> None:
    name = "model-00001-of-00003.safetensors"
    (hf / name).write_bytes(content)
    refused(lambda: Base.of(hf, "--load-base"), name, "download")


@pytest.mark.parametrize("kind", NOT_FILES)
def test_weights_of_a_base_are_no_file(hf: Path, kind: str) -> None:
    replace(hf / "model-00001-of-00003.safetensors", kind)
    refused(lambda: Base.of(hf, "--load-base"), "model-00001-of-00003.safetensors", "cannot be read")


def test_base_without_manifest(plain: Path) -> None:
    refused(lambda: Base.of(plain, "--load-base"), str(plain), MANIFEST, "--load-base")


# command line


@pytest.mark.parametrize(
    ("content", "word"),
    [("a: [", "YAML"), ("- 1", "map"), ("hf_dir: x\nhf_dir: y", "twice"), ("[" * 5000, "YAML"),
     ('hf_dir: "a\\0b"', "NUL"), ("workers: ²", "whole number"), ("workers: " + "9" * 30, "whole number")],
)
def test_options_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, word: str) -> None:
    (tmp_path / "options.yaml").write_text(content)
    arguments = ["--config", str(tmp_path / "options.yaml"), "--dcp_dir", str(tmp_path / "new")]
    arguments += [] if "hf_dir" in content else ["--hf_dir", str(tmp_path)]
    assert main(["Qwen3VLConverter", "hf_to_dcp", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line


@pytest.mark.parametrize("kind", NOT_FILES)
def test_options_file_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    replace(tmp_path / "options.yaml", kind)
    assert main(["Qwen3VLConverter", "hf_to_dcp", "--config", str(tmp_path / "options.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "options.yaml cannot be read" in line


@pytest.mark.parametrize(
    "option", ["--max_shard_size=" + "9" * 400, "--fused_linear_names=" + "[" * 100_000, "--fused_linear_names=[1"]
)
def test_option_values(capsys: pytest.CaptureFixture[str], option: str) -> None:
    words = ["--load_dir", "a", "--save_dir", "b", "--model_assets_dir", "c", option]
    assert main(["GenericDCPConverter", "dcp_to_hf", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and len(line) < 2000


# what is named directly, and what is missing


@pytest.mark.parametrize("is_plain", [False, True])
def test_an_older_iteration_is_loaded_by_its_own_directory(tmp_path: Path, process_group: Any, is_plain: bool) -> None:
    old = save(tmp_path / "save", *make(seed=1))
    new = Path(shutil.copytree(old, old.with_name("iter_0000002")))
    directory.write_tracker(tmp_path / "save", 2)
    assert checkpoint_to_load(old.parent, plain=is_plain)[0] == new
    assert checkpoint_to_load(old, plain=is_plain)[0] == old
    (old / MANIFEST).unlink()
    if is_plain:
        assert checkpoint_to_load(old, plain=True) == (old, {"format": 1, "metadata": {}, "files": {}})
    else:
        refused(lambda: checkpoint_to_load(old, plain=False), str(old))


def test_missing_assets_are_named(
    source: Path, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / "tokenizer.json").unlink()
    dcp_to_hf(source / "dcp", tmp_path / "out", hf)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {hf} is incomplete, and so is {tmp_path / 'out'}")
    words = ("tokenizer (all): there is neither tokenizer.json nor vocab.json", "tokenizer settings (all)",
             "chat template (all)", "image processor (all)", "mm-convert check_hf")
    assert [word for word in words if word not in warnings[0]] == [], warnings[0]


# random damage


def mutants(path: Path, count: int, seed: int) -> Iterator[str]:
    """Damage a file ``count`` times; yields a name of each damage, and restores the file in the end."""
    good = path.read_bytes()
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_text(json.dumps(mutate_value(json.loads(good), rng)))
        else:
            path.write_bytes(mutate_bytes(good, rng))
        yield f"{path.name}, seed {seed}, input {index}"
    path.write_bytes(good)


def _read_all(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.tensors}


def test_random_damage_of_a_checkpoint(saved: Path, plain: Path) -> None:
    """Whatever is accepted has the tracked iteration's values."""
    outcomes = Outcomes()

    def read(root: Path = saved.parent) -> tuple[Progress, dict[str, torch.Tensor]]:
        path, manifest = checkpoint_to_load(root, plain=False)
        progress, reader = Progress.read(path, manifest), CheckpointReader(path, manifest)
        return progress, {name: reader.read(name) for name in reader.tensors}

    expected_progress, expected = read()
    for file in (saved.parent / TRACKER, saved / MANIFEST, saved / PROGRESS_FILE, saved / METADATA):
        for name in mutants(file, 40, seed=1):
            result = outcomes.run(name, read)
            if result is not None:
                assert result[0] == expected_progress, name
                assert all(torch.equal(tensor, expected[key]) for key, tensor in result[1].items()), name
    for name in mutants(saved / PROGRESS_FILE, 30, seed=2):
        outcomes.run(name, lambda: Progress.read(saved))
    for name in mutants(plain / METADATA, 60, seed=3):
        outcomes.run(name, lambda: read_entries(plain, None))
        values = outcomes.run(name, lambda: _read_all(plain)) or {}
        assert all(torch.equal(value, torch.ones(2, 3)) for value in values.values()), name
    assert not outcomes.faults, outcomes.faults[0]
    assert outcomes.counts["refused"] > 150 and sum(outcomes.counts.values()) == 310, outcomes


def test_random_damage_of_weight_files(hf: Path) -> None:
    outcomes = Outcomes()
    for name in mutants(hf / INDEX, 40, seed=4):
        outcomes.run(name, lambda: read_headers(hf))
    path = hf / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for index in range(60):
        rng = random.Random(5_000_015 + index)
        if index % 2:
            header = json.dumps(mutate_value(json.loads(content[8 : 8 + length]), rng)).encode()
        else:
            header = mutate_bytes(content[8 : 8 + length], rng)
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        outcomes.run(f"header {index}", lambda: read_headers(hf))
    assert not outcomes.faults, outcomes.faults[0]
    assert outcomes.counts["refused"] > 60, outcomes
