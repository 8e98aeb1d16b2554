"""GenericDCPConverter: any tensors, under other names, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from checkpoint.cli import main
from mindspeed_mm.checkpoint import directory, safetensors_io, storage
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base
from tests.helpers.checkpoint_directory import commit_directory
from tests.ut.checkpoint.test_convert import read_all

Tensors = dict[str, torch.Tensor]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, and so NaN, infinities and -0 too."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Tensors]:
    """A directory of an unknown model, with tensors of all types, in two files without an index."""
    monkeypatch.setattr(safetensors_io, "READ_BYTES", 300)
    monkeypatch.setattr(storage, "FILE_BYTES", 1000)
    monkeypatch.setattr(storage, "MIN_FILE_BYTES", 500)
    torch.manual_seed(0)
    tensors = {
        "model.embed.weight": random_bits(torch.bfloat16, 50, 8),
        "model.experts.w1": random_bits(torch.float32, 4, 6, 10),
        "model.experts.bias": random_bits(torch.float32, 8),
        **{f"model.{dtype}".replace("torch.", ""): random_bits(dtype, 7, 5) for dtype in safetensors_io.CODES},
        "logit_scale": torch.tensor(2.6592),
        "logit_bias": torch.tensor(-1.5),
        "model.step": torch.tensor(3),
        "model.empty": torch.zeros(0, 4),
    }
    path = tmp_path / "hf"
    path.mkdir()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:6]}, path / "a.safetensors")
    save_file({name: tensors[name] for name in names[6:]}, path / "b.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "new", "text_config": {"num_experts": 4}}))
    return path, tensors


def to_dcp(hf: Path, target: Path, *options: str) -> int:
    return main(["GenericDCPConverter", "hf_to_dcp", "--hf_dir", str(hf), "--dcp_dir", str(target), *options])


def to_hf(source: Path, target: Path, assets: Path, *options: str) -> int:
    places = ["--load_dir", str(source), "--save_dir", str(target), "--model_assets_dir", str(assets)]
    return main(["GenericDCPConverter", "dcp_to_hf", *places, *options])


def stored(path: Path) -> Tensors:
    """All tensors of a checkpoint, by torch's own reader, without ``model.``."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert all(name.startswith("model.") for name in state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def assert_same(left: Tensors, right: Tensors) -> None:
    """Names, types, shapes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        bits = [value.reshape(-1).view(torch.uint8) for value in (tensor, right[name])]
        assert torch.equal(*bits), name


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("hf_prefix", "dcp_prefix"), [("", ""), ("model.", "text."), ("", "x."), ("model.", ""), ("none.", "x.")]
)
def test_round_trip(hf: tuple[Path, Tensors], tmp_path: Path, hf_prefix: str, dcp_prefix: str) -> None:
    path, tensors = hf
    options = ["--hf_prefix", hf_prefix, "--dcp_prefix", dcp_prefix]
    assert to_dcp(path, tmp_path / "dcp", *options) == 0
    expected = {
        dcp_prefix + name.removeprefix(hf_prefix) if name.startswith(hf_prefix) else name: tensor
        for name, tensor in tensors.items()
    }
    assert_same(stored(tmp_path / "dcp" / "release"), expected)
    if dcp_prefix or not hf_prefix:  # otherwise the way back cannot tell which names had the prefix
        assert to_hf(tmp_path / "dcp", tmp_path / "out", path, *options, "--max_shard_size", "500") == 0
        assert_same(read_all(tmp_path / "out"), tensors)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "new"


def test_fused_and_tied(hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tensors = hf
    options = ["--fused_linear_names", "experts", "--tie_weight_mapping", "lm_head.weight,model.embed.weight"]
    assert to_dcp(path, tmp_path / "dcp", *options) == 0
    fused = {"model.experts.w1": tensors["model.experts.w1"].reshape(24, 10)}  # and not the one-dimensional bias
    tied = {"lm_head.weight": tensors["model.embed.weight"]}
    assert_same(stored(tmp_path / "dcp" / "release"), {**tensors, **fused, **tied})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a")}))
    capsys.readouterr()
    assert to_hf(tmp_path / "dcp", tmp_path / "out", path, "--fused_linear_names", "experts") == 0
    assert_same(read_all(tmp_path / "out"), tensors)  # what the index names, and so without the tied one
    assert f"1 of {len(tensors) + 1} tensors are not in {path}" in capsys.readouterr().out


@pytest.mark.parametrize("config", [{"num_experts": 4}, {"thinker_config": {"text_config": {"num_experts": 4}}}])
def test_places_of_the_number_of_experts(hf: tuple[Path, Tensors], tmp_path: Path, config: dict[str, object]) -> None:
    path, tensors = hf
    assert to_dcp(path, tmp_path / "dcp", "--fused_linear_names", "experts") == 0
    (path / "config.json").write_text(json.dumps(config))
    assert to_hf(tmp_path / "dcp", tmp_path / "out", path, "--fused_linear_names", "experts") == 0
    assert_same(read_all(tmp_path / "out"), tensors)


@pytest.mark.parametrize("replaced", ["model.bool", "model.empty"])
def test_a_tied_name_replaces_a_tensor(
    hf: tuple[Path, Tensors], tmp_path: Path, replaced: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tensors = hf
    assert to_dcp(path, tmp_path / "dcp", "--tie_weight_mapping", f"{replaced},logit_scale") == 0
    assert f"note: {replaced} of {path} is replaced by logit_scale (--tie_weight_mapping)\n" in capsys.readouterr().out
    assert_same(stored(tmp_path / "dcp" / "release"), {**tensors, replaced: tensors["logit_scale"]})


def test_other_options_do_not_resume(
    hf: tuple[Path, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of an interrupted conversion with another source of a tied tensor are not taken over."""
    path, tensors = hf

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directory.AtomicDirectory, "commit", full)
        assert to_dcp(path, tmp_path / "dcp", "--tie_weight_mapping", "tied,logit_scale") == 2
    assert "finished files are kept" in capsys.readouterr().err
    assert to_dcp(path, tmp_path / "dcp", "--tie_weight_mapping", "tied,logit_bias") == 0
    assert_same(stored(tmp_path / "dcp" / "release"), {**tensors, "tied": tensors["logit_bias"]})


@pytest.mark.parametrize("direction", ["to DCP", "to safetensors"])
def test_bf16_changes_floating_point_alone(hf: tuple[Path, Tensors], tmp_path: Path, direction: str) -> None:
    path, tensors = hf
    options = [["--to_bf16"], []] if direction == "to DCP" else [[], ["--to_bf16"]]
    assert to_dcp(path, tmp_path / "dcp", *options[0]) == 0
    assert to_hf(tmp_path / "dcp", tmp_path / "out", path, *options[1]) == 0
    back = load_file(tmp_path / "out" / "model.safetensors")
    expected = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():  # by value, as conversions may choose the bits of NaN
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name].nan_to_num(), tensor.nan_to_num()), name
        assert torch.equal(back[name].isnan(), tensor.isnan()), name


def test_a_checkpoint_of_torchs_own(
    hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tensors = hf
    model = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    state = {"model": model, "optimizer": {"step": torch.tensor(1)}, "checkpoint_version": 3.0}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "plain"), no_dist=True)
    capsys.readouterr()
    assert to_hf(tmp_path / "plain", tmp_path / "out", path) == 2
    assert "no manifest.json" in error_line(capsys)
    assert to_hf(tmp_path / "plain", tmp_path / "out", path, "--skip_check") == 0
    assert_same(read_all(tmp_path / "out"), model)


def test_a_partial_checkpoint_is_completed_by_its_base(hf: tuple[Path, Tensors], tmp_path: Path) -> None:
    path, tensors = hf
    assert to_dcp(path, tmp_path / "dcp") == 0
    base = Base.of(tmp_path / "dcp" / "release", "--load")
    trained = {"model.embed.weight": random_bits(torch.float32, 50, 8)}
    with commit_directory(tmp_path / "iter_0000001", {BASE_KEY: dataclasses.asdict(base)}) as partial:
        dcp.save({"model": trained}, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    shutil.move(tmp_path / "dcp", tmp_path / "moved")
    options = ["--base_dir", str(tmp_path / "moved" / "release")]
    assert to_hf(tmp_path / "iter_0000001", tmp_path / "out", path, *options) == 0
    assert_same(read_all(tmp_path / "out"), {**tensors, **trained})


def test_the_files_that_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """model.safetensors if it is there, or else all files, which must not repeat each other; no config is needed."""
    path = tmp_path / "hf"
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "first.safetensors")
    assert to_dcp(path, tmp_path / "one") == 0
    assert_same(stored(tmp_path / "one" / "release"), {"a": torch.ones(2)})
    save_file({"a": torch.ones(3), "b": torch.zeros(1)}, path / "second.safetensors")
    capsys.readouterr()
    assert to_dcp(path, tmp_path / "two") == 2
    assert "a is in first.safetensors and second.safetensors" in error_line(capsys)
    save_file({"c": torch.zeros(4)}, path / "model.safetensors")
    assert to_dcp(path, tmp_path / "two") == 0
    assert_same(stored(tmp_path / "two" / "release"), {"c": torch.zeros(4)})


def test_a_result_without_config_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "hf" / "model.safetensors")
    assert to_dcp(tmp_path / "hf", tmp_path / "dcp") == 0
    for size in ("5GB", "8"):
        assert to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", "--max_shard_size", size, "--overwrite") == 0
    assert to_hf(tmp_path / "dcp", tmp_path / "out", tmp_path / "hf", "--overwrite") == 0
    capsys.readouterr()
    assert to_hf(tmp_path / "dcp", tmp_path / "dcp" / "release", tmp_path / "hf", "--overwrite") == 2
    assert "is or holds" in error_line(capsys)
    assert to_hf(tmp_path / "dcp", tmp_path, tmp_path / "hf", "--overwrite") == 2
    assert_same(stored(tmp_path / "dcp" / "release"), {"a": torch.ones(2), "b": torch.ones(3)})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tie_weight_mapping", "a,b"], "1 tensor missing: b"),
        (["--hf_prefix", "model.", "--dcp_prefix", "logit_", "--tie_weight_mapping", "model.scale,model.step"],
         "logit_scale and model.scale both become logit_scale; correct --hf_prefix or --dcp_prefix"),
    ],
)
def test_errors_of_hf_to_dcp(
    hf: tuple[Path, Tensors], tmp_path: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_dcp(hf[0], tmp_path / "dcp", *options) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "dcp").exists()


INDEX = json.dumps({"weight_map": {"model.bool": "a", **{f"more.{n}": "a" for n in range(5)}}})


@pytest.mark.parametrize(
    ("options", "file", "content", "expected"),
    [
        ([], "model.safetensors.index.json", INDEX, "5 tensors missing: more.0, more.1, more.2, ...; check the prefix"),
        ([], "model.safetensors.index.json", '{"weight_map": {}}', "its weight_map names no tensors; download it"),
        ([], "model.safetensors.index.json", "{", "index.json, line 1, column 2 is not valid JSON"),
        (["--fused_linear_names", "experts"], "config.json", "{}", "the num_experts (None) of"),
        (["--fused_linear_names", "experts"], "config.json", '{"num_experts": 5}', "w1 [24, 10] is not made of"),
        (["--fused_linear_names", "experts"], "config.json", "[]", "config.json holds a list; it must hold an object"),
        (["--hf_prefix", "logit_", "--dcp_prefix", "model."], "config.json", "{}", "both become logit_scale; correct"),
    ],
)
def test_errors_of_dcp_to_hf(
    hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], file: str,
    content: str, expected: str,
) -> None:
    path, _ = hf
    tied = ["--tie_weight_mapping", "model.scale,logit_scale"]
    assert to_dcp(path, tmp_path / "dcp", "--fused_linear_names", "experts", *tied) == 0
    (path / file).write_text(content)
    capsys.readouterr()
    assert to_hf(tmp_path / "dcp", tmp_path / "out", path, *options) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_places_and_types(
    hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = hf
    dcp.save({"model.c": torch.zeros(1, dtype=torch.complex128)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    assert to_dcp(path, tmp_path / "dcp") == 0
    capsys.readouterr()
    for command, expected in (
        (lambda: to_dcp(tmp_path / "dcp", tmp_path / "x"), "dcp is a distributed checkpoint; name a"),
        (lambda: to_dcp(tmp_path / "none", tmp_path / "x"), "none has neither"),
        (lambda: to_hf(path, tmp_path / "x", path), "is a Hugging Face directory; name a distributed checkpoint"),
        (lambda: to_hf(tmp_path / "dcp", tmp_path / "x", tmp_path / "none"), "none is not a directory"),
        (lambda: to_hf(tmp_path / "dcp", tmp_path / "x", tmp_path / "dcp"), "dcp is a distributed checkpoint"),
        (lambda: to_hf(tmp_path / "plain", tmp_path / "x", path, "--skip_check"), "model.c is torch.complex128, which"),
    ):
        assert command() == 2
        assert expected in error_line(capsys)
        assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_refused(
    hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = hf
    assert to_dcp(path, tmp_path / "dcp") == 0
    file = tmp_path / "dcp" / "release" / "__0_0.distcp"
    entry = directory.read_manifest(file.parent)["files"][file.name]["items"][0]
    content = bytearray(file.read_bytes())
    content[entry[0] + entry[1] // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert to_hf(tmp_path / "dcp", tmp_path / "out", path) == 2
    assert "has another checksum than recorded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_match_nothing_are_said(
    hf: tuple[Path, Tensors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_dcp(hf[0], tmp_path / "dcp", "--hf_prefix", "modle.", "--fused_linear_names", "experts,exprets") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.partition(str(hf[0]))[2] for note in notes] == [
        " has exprets in its name (--fused_linear_names)", " begins with modle. (--hf_prefix)",
    ]
