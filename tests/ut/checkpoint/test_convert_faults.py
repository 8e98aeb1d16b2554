"""Every fault of source, target or command line is one line that names it, and leaves no target behind."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.cli import main
from mindspeed_mm.checkpoint import conversion, directory, lock
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import RELEASE, read_tracker, write_tracker
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.huggingface import HFReader
from mindspeed_mm.checkpoint.inspection import verify
from mindspeed_mm.checkpoint.save_directory import earlier_run_warning
from mindspeed_mm.checkpoint.state import load_hf_weights
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from tests.helpers.checkpoint_directory import commit_directory
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

NORM = "model.language_model.layers.0.input_layernorm.weight"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    config = random_config(random.Random(1), moe=True, tie=False, text={"mlp_only_layers": []})
    write_hf_directory(tmp_path / "hf", config)
    return tmp_path / "hf"


def _file_of(hf: Path, name: str) -> Path:
    return hf / json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"][name]


def _edit_tensors(hf: Path, name: str, edit) -> None:
    file = _file_of(hf, name)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def _rename_in_index(hf: Path) -> None:
    def rename(index):
        index["weight_map"]["model.extra"] = index["weight_map"].pop(Q_PROJ)

    _edit_json(hf / "model.safetensors.index.json", rename)


SOURCE_FAULTS = {
    "no directory": (lambda hf: [p.unlink() for p in hf.iterdir()] and hf.rmdir(), ["config.json does not exist"]),
    "no config": (lambda hf: (hf / "config.json").unlink(), ["config.json does not exist"]),
    "no weights": (lambda hf: [p.unlink() for p in hf.glob("*safetensors*")], ["neither", "step 2"]),
    "missing file": (
        lambda hf: (hf / "model-00002-of-00003.safetensors").unlink(),
        ["lacks 1 of 3", "model-00002-of-00003.safetensors", "step 2"],
    ),
    "truncated": (
        lambda hf: (f := hf / "model-00002-of-00003.safetensors").write_bytes(f.read_bytes()[:-1]),
        ["model-00002-of-00003.safetensors is truncated", "download it again"],
    ),
    "longer": (
        lambda hf: (f := hf / "model-00002-of-00003.safetensors").write_bytes(f.read_bytes() + b"\0"),
        ["model-00002-of-00003.safetensors is too long"],
    ),
    "empty": (lambda hf: (hf / "model-00002-of-00003.safetensors").write_bytes(b""), ["truncated", "0 bytes"]),
    "a web page": (
        lambda hf: (hf / "model-00002-of-00003.safetensors").write_text("<html>Not found</html>"),
        ["no safetensors file"],
    ),
    "damaged header": (lambda hf: _flip(hf / "model-00002-of-00003.safetensors", 9), ["damaged header"]),
    "damaged index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{"), ["line 1, column 2 is not"]),
    "index names another tensor": (_rename_in_index, [Q_PROJ, "not in the index", "model.extra"]),
    "missing tensor": (
        lambda hf: (
            _edit_tensors(hf, Q_PROJ, lambda t: t.pop(Q_PROJ)),
            _edit_json(hf / "model.safetensors.index.json", lambda i: i["weight_map"].pop(Q_PROJ)),
        ),
        ["1 tensor missing", Q_PROJ],
    ),
    "unexpected tensor": (
        lambda hf: (
            _edit_tensors(hf, Q_PROJ, lambda t: t.update({"model.new": torch.zeros(2)})),
            _edit_json(
                hf / "model.safetensors.index.json",
                lambda i: i["weight_map"].update({"model.new": i["weight_map"][Q_PROJ]}),
            ),
        ),
        ["1 tensor unexpected: model.new"],
    ),
    "another shape": (
        lambda hf: _edit_tensors(hf, Q_PROJ, lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()})),
        ["of another shape", Q_PROJ, "instead of"],
    ),
    "integers": (
        lambda hf: _edit_tensors(hf, Q_PROJ, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        [Q_PROJ, "type I8", "unquantised"],
    ),
    "types within one parameter": (
        lambda hf: _edit_tensors(hf, Q_PROJ, lambda t: t.update({Q_PROJ: t[Q_PROJ].float()})),
        [Q_PROJ, "differ in type"],
    ),
    "type of one tensor": (
        lambda hf: _edit_tensors(hf, NORM, lambda t: t.update({NORM: t[NORM].float()})),
        ["config.json says bfloat16", NORM, "--dtype bf16 or fp32"],
    ),
    "type of all tensors": (
        lambda hf: _edit_json(hf / "config.json", lambda c: c.update(dtype="float16")),
        ["config.json says float16", ", ...; pass --dtype"],
    ),
    "a distributed checkpoint": (
        lambda hf: ((hf / "config.json").unlink(), (hf / ".metadata").touch()),
        ["is a distributed checkpoint; name a Hugging Face directory"],
    ),
    "config of another width": (
        lambda hf: _edit_json(hf / "config.json", lambda c: c["text_config"].update(vocab_size=97)),
        ["embed_tokens.weight is [96, 24] instead of [97, 24]"],
    ),
    "config of another depth": (
        lambda hf: _edit_json(hf / "config.json", lambda c: c["text_config"].update(num_hidden_layers=4)),
        ["tensors missing", "layers.3"],
    ),
    "another kind of model": (
        lambda hf: _edit_json(hf / "config.json", lambda c: c.update(model_type="llama")), ["model_type 'llama'"]
    ),
}


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_faults_of_the_source(hf: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = SOURCE_FAULTS[fault]
    spoil(hf)
    arguments = ["Qwen3VLConverter", "hf_to_dcp", "--hf_dir", str(hf), "--dcp_dir", str(tmp_path / "dcp")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    for part in expected:
        assert part in message
    assert not (tmp_path / "dcp").exists()


def test_square_experts_need_a_declaration(tmp_path: Path) -> None:
    for name, text in {"2I": {"hidden_size": 32, "moe_intermediate_size": 16},
                       "I": {"hidden_size": 32, "moe_intermediate_size": 32}}.items():
        config = random_config(random.Random(2), moe=True, text=text | {"mlp_only_layers": []})
        write_hf_directory(tmp_path / name, config)
        with pytest.raises(UserError, match="--expert-layout hub"):
            hf_to_dcp(tmp_path / name, tmp_path / f"dcp{name}")


def test_a_layout_that_contradicts_the_shapes(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v5 expert layout.*of another shape.*correct .*--expert-layout"):
        hf_to_dcp(hf, tmp_path / "dcp", expert_layout="v5")


def test_tied_head_must_repeat_the_embeddings(tmp_path: Path) -> None:
    config = random_config(random.Random(3), moe=True, tie=True)
    hub = write_hf_directory(tmp_path / "hf", config, shards=1)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    path = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp", tie_weight=True)
    assert "model.text_decoder.output_layer.weight" not in directory.read_manifest(path)["metadata"]["tensors"]
    dcp_to_hf(path, tmp_path / "out", tmp_path / "hf")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == hub.keys()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        hf_to_dcp(tmp_path / "hf", tmp_path / "dcp2")
    assert not (tmp_path / "dcp2").exists()


@pytest.mark.usefixtures("process_group")
def test_tied_head_must_repeat_the_embeddings_where_training_loads_them(tmp_path: Path) -> None:
    """Dropped without a word, training would use another head than transformers does."""
    config = random_config(random.Random(3), moe=True, tie=True)
    write_hf_directory(tmp_path / "hf", config, shards=1)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    load_hf_weights(torch.nn.Module(), tmp_path / "hf")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load_hf_weights(torch.nn.Module(), tmp_path / "hf")


def test_tie_weight_contradicts_config(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tie_word_embeddings false"):
        hf_to_dcp(hf, tmp_path / "dcp", tie_weight=True)


def test_existing_target(hf: Path, tmp_path: Path) -> None:
    hf_to_dcp(hf, tmp_path / "dcp")
    with pytest.raises(UserError, match="--overwrite"):
        hf_to_dcp(hf, tmp_path / "dcp")
    hf_to_dcp(hf, tmp_path / "dcp", overwrite=True)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    with pytest.raises(UserError, match="--overwrite"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "out", hf, overwrite=True)
    (tmp_path / "empty").mkdir()
    dcp_to_hf(tmp_path / "dcp", tmp_path / "empty", hf)
    directory.verify_directory(tmp_path / "empty", checksums=True)


def test_overwrite_spares_what_is_no_model(hf: Path, tmp_path: Path) -> None:
    hf_to_dcp(hf, tmp_path / "dcp")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a model directory"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "home", hf, overwrite=True)
    for target in (hf, tmp_path, tmp_path / "dcp" / "release"):
        with pytest.raises(UserError, match="read from"):
            dcp_to_hf(tmp_path / "dcp", target, hf, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_full_disk(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match="1.0 kB free"):
        hf_to_dcp(hf, tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()  # nothing was written, so nothing is left


def test_disk_error_on_the_way(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.ProgressBar, "advance", fail)
    with pytest.raises(UserError, match="the disk of .* is full; finished files are kept: free disk space"):
        hf_to_dcp(hf, tmp_path / "dcp")
    monkeypatch.undo()
    hf_to_dcp(hf, tmp_path / "dcp")
    directory.verify_directory(tmp_path / "dcp" / "release", checksums=True)


def test_source_that_changes_while_it_is_read(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = HFReader.read_unused

    def meddle(source: HFReader) -> list:
        _flip(hf / "model-00002-of-00003.safetensors", -1)
        return check(source)

    monkeypatch.setattr(HFReader, "read_unused", meddle)
    with pytest.raises(UserError, match="were changed while they were read; run the same command again"):
        hf_to_dcp(hf, tmp_path / "dcp")
    assert not (tmp_path / "dcp" / "release").exists()
    monkeypatch.undo()
    path = hf_to_dcp(hf, tmp_path / "dcp")
    assert verify(path, hf).differing == []


def test_two_at_once(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.2)
    held = lock.DirectoryLock(tmp_path / "dcp" / ".release.lock", "release")
    assert held.acquire() is None
    other = os.fork()  # the lock belongs to a process
    if other == 0:
        try:
            hf_to_dcp(hf, tmp_path / "dcp")
        except UserError as error:
            os._exit(0 if "is being written by another" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(other, 0)[1] == 0
    held.release()
    assert not (tmp_path / "dcp").exists()


def test_one_after_the_other(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has waited for the lock does not repeat the work of the one that held it."""
    acquire = lock.DirectoryLock.acquire

    def acquire_late(self: lock.DirectoryLock) -> str | None:
        monkeypatch.undo()
        hf_to_dcp(hf, tmp_path / "dcp")
        return acquire(self)

    monkeypatch.setattr(lock.DirectoryLock, "acquire", acquire_late)
    with pytest.raises(UserError, match="release exists; pass --overwrite"):
        hf_to_dcp(hf, tmp_path / "dcp")
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == [directory.TRACKER, "release"]
    directory.verify_directory(tmp_path / "dcp" / "release", checksums=True)


@pytest.mark.parametrize("name", [".", ".."])
def test_target_without_a_name(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hf_to_dcp(hf, tmp_path / "dcp")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="--save_dir .* cannot be replaced"):
        dcp_to_hf(tmp_path / "dcp", name, hf)
    assert list(Path.cwd().iterdir()) == []


def _spoil_data(path: Path) -> None:
    file = path / "__0_0.distcp"
    values = CheckpointReader(path).read("model.text_decoder.layers.0.mlp.experts.gate_up_proj")
    position = file.read_bytes().index(values.view(torch.uint8).numpy().tobytes())
    _flip(file, position + values.nbytes // 2)


DCP_FAULTS = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "no metadata": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "missing file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "truncated file": (lambda p: (f := p / "__0_0.distcp").write_bytes(f.read_bytes()[:-5]), "bytes instead of"),
    "damaged metadata": (lambda p: _flip(p / ".metadata", 30), ".metadata"),
    "damaged values": (_spoil_data, "gate_up_proj has another checksum"),
}


@pytest.mark.parametrize("fault", DCP_FAULTS)
def test_faults_of_the_checkpoint(hf: Path, tmp_path: Path, fault: str) -> None:
    path = hf_to_dcp(hf, tmp_path / "dcp")
    spoil, expected = DCP_FAULTS[fault]
    spoil(path)
    with pytest.raises(UserError, match=expected):
        dcp_to_hf(path, tmp_path / "out", hf)
    assert not (tmp_path / "out").exists()


def _drop_chunk_checksums(manifest: dict) -> None:
    for facts in manifest["files"].values():
        facts.pop("items", None)


@pytest.mark.parametrize("chunk_checksums", [True, False])
def test_damaged_training_checkpoint(hf: Path, tmp_path: Path, chunk_checksums: bool, capsys) -> None:
    """Ours records checksums of each item; another program may record those of files only."""
    path = hf_to_dcp(hf, tmp_path / "dcp")
    _edit_json(path / "manifest.json", lambda manifest: manifest.update(metadata={"iteration": 1}))
    if not chunk_checksums:
        _edit_json(path / "manifest.json", _drop_chunk_checksums)
    dcp_to_hf(path, tmp_path / "out", hf)
    assert ("checking 1 file" in capsys.readouterr().out) == (not chunk_checksums)
    _spoil_data(path)
    with pytest.raises(UserError, match="gate_up_proj has another" if chunk_checksums else "__0_0.distcp has another"):
        dcp_to_hf(path, tmp_path / "out2", hf)
    assert not (tmp_path / "out2").exists()
    dcp_to_hf(path, tmp_path / "out3", hf, check=False)


def test_every_flipped_byte_of_the_values_is_found(hf: Path, tmp_path: Path) -> None:
    path = hf_to_dcp(hf, tmp_path / "dcp")
    file = path / "__0_0.distcp"
    intact = file.read_bytes()
    rng = random.Random(0)
    for _ in range(25):
        _flip(file, rng.randrange(len(intact)))
        try:
            dcp_to_hf(path, tmp_path / "out", hf, overwrite=True)
        except UserError:
            pass
        else:  # a byte between the tensors: the values must be right
            from tests.ut.checkpoint.test_convert import assert_equal, read_all

            assert_equal(read_all(tmp_path / "out"), read_all(hf))
        file.write_bytes(intact)


def test_assets_of_another_model(hf: Path, tmp_path: Path) -> None:
    path = hf_to_dcp(hf, tmp_path / "dcp")
    other = random_config(random.Random(1), moe=True, tie=False, text={"num_hidden_layers": 2, "vocab_size": 56})
    write_hf_directory(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"tensors unexpected.*of another shape.*--model_assets_dir"):
        dcp_to_hf(path, tmp_path / "out", tmp_path / "other")


def test_assets_that_compute_something_else(hf: Path, tmp_path: Path) -> None:
    """With the same shapes, which nothing but the recorded config tells apart."""
    path = hf_to_dcp(hf, tmp_path / "dcp")
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{path} belongs to a model with another config.json: text.*0.001 in {other}"):
        dcp_to_hf(path, tmp_path / "out", other)
    config["text_config"]["rms_norm_eps"] = 1e-6
    config["text_config"] |= {"initializer_range": 0.5, "router_aux_loss_coef": 0.5, "max_position_embeddings": 77}
    (other / "config.json").write_text(json.dumps(config))
    dcp_to_hf(path, tmp_path / "out", other)


def test_a_runs_directory_is_no_target(hf: Path, tmp_path: Path) -> None:
    """Its tracker file would name the converted weights."""
    with commit_directory(tmp_path / "save/iter_0000300", {}):
        pass
    write_tracker(tmp_path / "save", 300)
    with pytest.raises(UserError, match=r"--dcp_dir \S+ has checkpoints of a training run, the last of iteration 300"):
        hf_to_dcp(hf, tmp_path / "save")
    assert read_tracker(tmp_path / "save") == 300
    hf_to_dcp(hf, tmp_path / "save", overwrite=True)
    assert read_tracker(tmp_path / "save") == RELEASE
    assert f"--load {tmp_path}/save/iter_0000300" in earlier_run_warning(str(tmp_path / "save"), str(tmp_path / "save"))
