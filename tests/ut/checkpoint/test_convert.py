"""Conversion both ways, bit for bit, read back by torch and by transformers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from mindspeed_mm.checkpoint import directory, safetensors_io, storage
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.files import file_checksum, format_checksum
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.inspection import inspect, verify
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from tests.helpers.checkpoint_directory import commit_directory
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and files so small that tiny models are split like large ones."""
    monkeypatch.setattr(safetensors_io, "READ_BYTES", 700)
    monkeypatch.setattr(storage, "FILE_BYTES", 20_000)


def read_all(path: Path) -> Tensors:
    """All tensors of a Hugging Face directory, by the safetensors library."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def expected_mcore(hub: Tensors, hf: Path) -> Tensors:
    rules = weight_rules(Qwen3VLConfig.from_pretrained(hf), expert_layout="hub")
    return {f"model.{rule.target}": rule.to_mcore([hub[name] for name, _ in rule.sources]) for rule in rules}


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 240))]
)
def test_round_trip(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any model config, from either layout and both kinds of square experts, in any type and with any bits."""
    rng = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr(safetensors_io, "READ_BYTES", 700)
        monkeypatch.setattr(storage, "FILE_BYTES", 20_000)
    layout, square = ("hub", "v5")[seed // 2 % 2], (0, 2, 1)[seed // 4 % 3]
    config = random_config(rng, square=square, moe=True if square else None)
    dtype = rng.choice([torch.bfloat16, torch.float32, torch.float16])
    hub = write_hf_directory(
        tmp_path / "hf", config, layout=layout, shards=rng.choice([1, 3]), seed=seed, dtype=dtype, any_bits=True
    )
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", expert_layout=layout if square else "auto", workers=2)
    assert (tmp_path / "dcp" / directory.TRACKER).read_text() == "release"
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == [directory.TRACKER, "release"]

    # as torch reads it
    loaded = {name: torch.empty_like(tensor) for name, tensor in expected_mcore(hub, tmp_path / "hf").items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "dcp" / "release"))
    assert_equal(loaded, expected_mcore(hub, tmp_path / "hf"))

    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", max_shard_size=rng.choice([20_000, 10**9]))
    assert_equal(read_all(tmp_path / "out"), hub)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "hf" / "tokenizer.json").read_text()
    # what we wrote records its layout, so that it needs no option even where shapes do not tell
    assert verify(tmp_path / "dcp", tmp_path / "out").differing == []
    hf_to_dcp(tmp_path / "out", tmp_path / "again", workers=2)
    for path in (tmp_path / "dcp" / "release").glob("*.distcp"):
        assert path.read_bytes() == (tmp_path / "again" / "release" / path.name).read_bytes()


def test_manifest(tmp_path: Path, small_chunks: None) -> None:
    config = random_config(random.Random(5), moe=True, tie=False)
    hub = write_hf_directory(tmp_path / "hf", config, layout="v5")
    path = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    metadata = directory.verify_directory(path, checksums=True)["metadata"]
    assert metadata["expert_layout"] == "hub" and metadata["source"]["expert_layout"] == "v5"
    for name, facts in metadata["source"]["files"].items():
        file = tmp_path / "hf" / name
        assert facts == {"size": file.stat().st_size, "checksum": file_checksum(file)}
    assert len(metadata["source"]["files"]) == 4
    import zlib

    for name, tensor in expected_mcore(hub, tmp_path / "hf").items():
        checksum = format_checksum(zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes()))
        assert metadata["tensors"][name] == {
            "shape": list(tensor.shape), "dtype": "bfloat16", "checksum": checksum,
        }


def test_index_and_shards(tmp_path: Path) -> None:
    config = random_config(random.Random(6), moe=True)
    hub = write_hf_directory(tmp_path / "hf", config)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", max_shard_size=15_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in hub.values())
    assert index["weight_map"].keys() == hub.keys()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata()["format"] == "pt"
        assert all(index["weight_map"][name] == file.name for name in names)
        assert len(names) == 1 or sum(hub[name].nbytes for name in names) <= 15_000
    directory.verify_directory(tmp_path / "out", checksums=True)


def test_result_does_not_depend_on_workers(tmp_path: Path, small_chunks: None) -> None:
    write_hf_directory(tmp_path / "hf", random_config(random.Random(8), moe=True))
    for workers in (1, 4):
        hf_to_dcp(tmp_path / "hf", tmp_path / f"dcp{workers}", workers=workers)
    one, four = tmp_path / "dcp1" / "release", tmp_path / "dcp4" / "release"
    assert len(list(one.iterdir())) > 5
    for path in one.iterdir():
        assert path.read_bytes() == (four / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_hf_to_dcp_in_a_chosen_type(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    source = torch.float32 if dtype == "bf16" else torch.bfloat16
    hub = write_hf_directory(tmp_path / "hf", random_config(random.Random(9)), dtype=source)
    path = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", dtype=dtype)
    reader = CheckpointReader(path)
    want = {name: tensor.to(expected) for name, tensor in expected_mcore(hub, tmp_path / "hf").items()}
    assert_equal({name: reader.read(name) for name in reader.tensors}, want)
    assert verify(path, tmp_path / "hf").differing == []


def _training_checkpoint(root: Path, hub: Tensors, hf: Path) -> Path:
    """What training saves: fp32 parameters and other state, through torch's own writer."""
    state = {name: tensor.float() for name, tensor in expected_mcore(hub, hf).items()}
    state |= {f"optimizer.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in list(state.items())}
    state["rng.0.cpu"] = torch.zeros(4, dtype=torch.uint8)
    # values that bf16 does not hold, so that the rounding is seen
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.mul_(1.2345678)
    path = root / "iter_0000003"
    with commit_directory(path, {"iteration": 3}) as partial:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    directory.write_tracker(root, 3)
    return path


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("keep", torch.float32), ("fp32", torch.float32)],
)
def test_training_checkpoint(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    hub = write_hf_directory(tmp_path / "hf", random_config(random.Random(11), moe=True))
    path = _training_checkpoint(tmp_path / "save", hub, tmp_path / "hf")
    dcp_to_hf(path, tmp_path / "out", tmp_path / "hf", dtype=dtype)
    want = {name: (tensor.float() * 1.2345678).to(expected) for name, tensor in hub.items()}
    assert_equal(read_all(tmp_path / "out"), want)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == str(expected).removeprefix("torch.")
    if expected == torch.bfloat16:
        assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_reader_takes_any_rows_and_strides(tmp_path: Path) -> None:
    values = torch.arange(60.0).reshape(12, 5)
    state = {"model.a": values, "model.t": torch.arange(60.0).reshape(5, 12).t(), "model.s": torch.tensor(3.0)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "d"))
    reader = CheckpointReader(tmp_path / "d")
    assert torch.equal(reader.read("model.a", (3, 7)), values[3:7])
    assert torch.equal(reader.read("model.t", (2, 9)), state["model.t"][2:9])
    assert torch.equal(reader.read("model.s"), state["model.s"])


def test_reader_takes_archives_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save({"model.a": torch.arange(5.0)}, storage_writer=dcp.FileSystemWriter(tmp_path / "d"))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(CheckpointReader(tmp_path / "d").read("model.a"), torch.arange(5.0))


@pytest.mark.parametrize(("layout", "moe"), [("hub", True), ("v5", True), ("hub", False)])
def test_transformers_gives_the_same_logits(tmp_path: Path, layout: str, moe: bool) -> None:
    import transformers

    # transformers 4 reads the published layout whatever the widths, 5 misreads it where a matrix is square
    before_5 = int(transformers.__version__.split(".")[0]) < 5
    config = random_config(random.Random(13), moe=moe, square=2 if before_5 else 0)
    write_hf_directory(tmp_path / "published", config, dtype=torch.float32)
    write_hf_directory(tmp_path / "hf", config, layout=layout, dtype=torch.float32)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", expert_layout=layout)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", max_shard_size=30_000)
    patches = 16  # one image of 4x4 patches, so of 4 tokens
    inputs = {
        "input_ids": torch.tensor([[1, 52, 50, 50, 50, 50, 53, 7, 8, 9]]),
        "pixel_values": torch.randn(patches, 96, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
    }
    if before_5:
        inputs.pop("mm_token_type_ids")
    logits = []
    for name in ("published", "out"):
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert logits[0].std() > 1e-4
    assert torch.equal(*logits)


def test_verify_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from checkpoint.cli import main

    config = random_config(random.Random(14), moe=True, tie=False)
    hub = write_hf_directory(tmp_path / "hf", config, shards=1)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    arguments = ["--dcp_dir", str(tmp_path / "dcp"), "--hf_dir", str(tmp_path / "hf")]
    assert main(["Qwen3VLConverter", "verify", *arguments]) == 0
    file = tmp_path / "hf" / "model.safetensors"
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    with safe_open(file, "pt") as opened:
        offset = file.stat().st_size - sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    content = bytearray(file.read_bytes())
    header = json.loads(content[8:offset])
    content[offset + header[name]["data_offsets"][0]] ^= 1  # the lowest bit of one element
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["Qwen3VLConverter", "verify", *arguments]) == 1
    out = capsys.readouterr().out
    assert f"{name} (model.text_decoder.layers.1.self_attention.linear_qkv.weight): 1 element differs" in out
    assert "1 tensor differs" in out and hub


def test_verify_rounds_as_the_export_was_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from checkpoint.cli import main

    config = random_config(random.Random(16), moe=True, tie=False)
    write_hf_directory(tmp_path / "hf", config, dtype=torch.float32)
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", dtype="bf16")
    arguments = ["--dcp_dir", str(tmp_path / "dcp"), "--hf_dir", str(tmp_path / "out")]
    assert main(["Qwen3VLConverter", "verify", *arguments]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary == f"equal, bit for bit, after rounding to bfloat16, as {tmp_path / 'out'} was written"
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # the lowest bit of the last element
    file.write_bytes(content)
    assert main(["Qwen3VLConverter", "verify", *arguments]) == 1
    assert "1 element differs\n1 tensor differs, after rounding to bfloat16, as " in capsys.readouterr().out
    (tmp_path / "out" / "manifest.json").unlink()  # no record of a rounding
    assert main(["Qwen3VLConverter", "verify", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("torch.float32 instead of torch.bfloat16" in line for line in lines) == 20
    assert re.fullmatch(r"and \d+ more", lines[-2]) and "tensors differ" in lines[-1]


def test_inspect(tmp_path: Path) -> None:
    write_hf_directory(tmp_path / "hf", random_config(random.Random(15), moe=True, square=2), layout="v5")
    assert "undecided" in inspect(tmp_path / "hf")
    hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", expert_layout="v5")
    text = inspect(tmp_path / "dcp")
    assert "3 files in v5 layout" in text or "4 files in v5 layout" in text
    assert "model.text_decoder.layers.*.self_attention.linear_qkv.weight" in text
    assert "layers.1.self_attention" in inspect(tmp_path / "dcp", every_tensor=True)
    with pytest.raises(UserError, match="neither"):
        inspect(tmp_path)
