"""mm-convert check_hf: a good export is ready for everybody, and each thing that is missing is named for whom it is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.cli import main
from mindspeed_mm.checkpoint.check_hf import check_hf
from mindspeed_mm.checkpoint.check_hf.consumers import (
    EVALSCOPE,
    LMMS_EVAL,
    SGLANG,
    TITLES,
    TRANSFORMERS,
    TRANSFORMERS4,
    TRANSFORMERS5,
    VLLM,
    VLMEVALKIT,
)
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.safetensors_io import build_header
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.spec import spec_of
from mindspeed_mm.models.state_dict import hf_shapes
from tests.fuzz.mutations import mutate_value
from tests.helpers.published import config_30b
from tests.ut.checkpoint.tiny import random_config
from tests.ut.checkpoint.tiny_adapters import TinyAdapters, edit_config, options

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples/qwen3vl/quickstart"))
import make_tiny_model  # noqa: E402 - a script, found only through the path above

ALL = frozenset(TITLES)
OF_TRANSFORMERS = TRANSFORMERS | {LMMS_EVAL, VLMEVALKIT}
OF_SERVERS = frozenset({VLLM, SGLANG, EVALSCOPE})
Mutation = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mm-convert exports of a tiny model that has all the files of a published one."""
    root = tmp_path_factory.mktemp("tiny-1A1B")
    make_tiny_model.write_model(root / "hf", ["a text"])
    hf_to_dcp(root / "hf", root / "dcp")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        path = dcp_to_hf(root / "dcp", root / "export", root / "hf", dtype="bf16", max_shard_size=2_000_000)
    assert "warning" not in output.getvalue()
    return path


def removed(*names: str) -> Mutation:
    return lambda path: [os.unlink(path / name) for name in names] and None


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Mutation:
    def mutate(path: Path) -> None:
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return mutate


def both(*mutations: Mutation) -> Mutation:
    return lambda path: [mutate(path) for mutate in mutations] and None


def written(name: str, text: str) -> Mutation:
    return lambda path: (path / name).write_text(text) and None


def in_layout_of_transformers_5(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
                   for name, tensor in tensors.items()}, file)


def truncated(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 2)


def without_a_tensor(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    file = path / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def single_file_and_stray(path: Path) -> None:
    merged = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    removed("model.safetensors.index.json", *(file.name for file in path.glob("*.safetensors")))(path)
    save_file(merged, path / "model.safetensors", metadata={"expert_layout": "hub"})
    save_file({"extra": torch.zeros(1)}, path / "extra.safetensors")


NO_TEMPLATE = edited("tokenizer_config.json", lambda c: c.pop("chat_template"))
MOVE_ROPE = edited("config.json", lambda c: c["text_config"].update(
    rope_parameters=c["text_config"].pop("rope_scaling") | {"rope_theta": c["text_config"].pop("rope_theta")}
))
MUTATIONS: dict[str, tuple[Mutation, str, frozenset[str], str]] = {
    # name: (mutation, topic, blocked consumers, words of the problem)
    "no config": (removed("config.json"), "config.json", ALL, "does not exist"),
    "config cut off": (written("config.json", '{"model_type"'), "config.json", ALL, "config.json"),
    "no architectures": (
        edited("config.json", lambda c: c.pop("architectures")), "config.json", OF_SERVERS, "architectures is None"),
    "another architecture": (
        edited("config.json", lambda c: c.update(architectures=["Qwen2ForCausalLM"])), "config.json", OF_SERVERS,
        "instead of [Qwen3VLMoeForConditionalGeneration]"),
    "config of transformers 5": (
        MOVE_ROPE, "config.json", frozenset({TRANSFORMERS4}), "lacks text_config.rope_scaling, text_config.rope_theta"),
    "experts of transformers 5": (
        in_layout_of_transformers_5, "weights", frozenset({TRANSFORMERS4, *OF_SERVERS}), "layout of transformers 5"),
    "truncated": (truncated, "weights", ALL, "truncated"),
    "a file is missing": (removed("model-00001-of-00003.safetensors"), "weights", ALL, "lacks 1 of 3 weight files"),
    "a tensor is missing": (without_a_tensor, "weights", ALL, "1 tensor missing"),
    "no index": (removed("model.safetensors.index.json"), "weights", ALL, "has neither"),
    "a stray file without an index": (
        single_file_and_stray, "weights", OF_SERVERS, "extra.safetensors is no part of the model: without"),
    "no vocabulary": (removed("tokenizer.json", "vocab.json"), "tokenizer", ALL, "neither tokenizer.json nor"),
    "an empty vocabulary": (
        edited("tokenizer.json", lambda c: c["model"].pop("vocab")), "tokenizer", ALL, "has no vocabulary"),
    "ids would be guessed": (removed("tokenizer.json"), "tokenizer", ALL, "would be guessed"),
    "another tokenizer": (
        edited("config.json", lambda c: c.update(image_token_id=c["video_token_id"])), "tokenizer", ALL,
        "image_token_id in config.json is"),
    "a larger tokenizer": (
        edited("tokenizer.json", lambda c: c["added_tokens"][-1].update(id=9999)), "tokenizer", ALL, "9999"),
    "no tokenizer settings": (removed("tokenizer_config.json"), "tokenizer settings", ALL, "is missing"),
    "no template": (both(NO_TEMPLATE, removed("chat_template.json")), "chat template", ALL, "cannot be rendered"),
    "the tokenizer's template only": (
        removed("chat_template.json"), "chat template", OF_TRANSFORMERS, "the processor does not read that"),
    "template without images": (
        both(NO_TEMPLATE, written("chat_template.json", '{"chat_template": "{{ messages }}"}')), "chat template", ALL,
        "never writes <|image_pad|>"),
    "no image processor": (removed("preprocessor_config.json"), "image processor", ALL, "does not exist"),
    "image processor of no type": (
        edited("preprocessor_config.json", lambda c: c.pop("image_processor_type")), "image processor", ALL,
        "has no image_processor_type"),
    "image processor of another model": (
        edited("preprocessor_config.json", lambda c: c.update(patch_size=14)), "image processor", ALL,
        "patch_size is 14"),
    "generation settings cut off": (written("generation_config.json", "{"), "generation settings", ALL, "generation"),
    "nothing stops": (
        both(removed("generation_config.json"), edited("config.json", lambda c: c["text_config"].pop("eos_token_id")),
             edited("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))), "stop tokens",
        frozenset({*OF_TRANSFORMERS, VLLM, SGLANG}), "does not stop at <|im_end|>"),
    "generation settings without eos": (
        edited("generation_config.json", lambda c: c.pop("eos_token_id")), "stop tokens",
        TRANSFORMERS | {VLMEVALKIT}, "answers run on to the token limit"),
    "the tokenizer ends elsewhere": (
        edited("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")), "stop tokens",
        frozenset({LMMS_EVAL}), "eos_token of tokenizer_config.json"),
    "an adapter beside the model": (
        written("adapter_config.json", '{"peft_type": "LORA"}'), "adapter", OF_TRANSFORMERS, "lies beside the model"),
    "a broken link": (lambda path: os.symlink("nowhere", path / "merges"), "links", ALL, "lead nowhere"),
}
NOTES: dict[str, tuple[Mutation, str, str]] = {
    # name: (mutation, topic, words of the problem); everybody is still ready
    "no generation settings": (removed("generation_config.json"), "generation settings", "top_k are lost"),
    "no video processor": (removed("video_preprocessor_config.json"), "video processor", "limits of images"),
    "the processor's template only": (NO_TEMPLATE, "chat template", "AutoTokenizer"),
    "two templates": (written("chat_template.jinja", "<|image_pad|><|video_pad|>"), "chat template", "differ"),
    "another dtype": (
        edited("config.json", lambda c: c.update(dtype="float16")), "dtype", "says float16, the files hold bfloat16"),
    "a stray file": (
        lambda path: save_file({"extra": torch.zeros(1)}, path / "extra.safetensors"), "weights", "no part"),
    "leftovers": (written("x.safetensors.incomplete", "x"), "leftovers", "interrupted"),
    "a changed file": (written("merges.txt", ""), "changed files", "merges.txt has 0 bytes"),
    "a removed file": (removed("merges.txt"), "changed files", "merges.txt is missing"),
    "total size": (
        edited("model.safetensors.index.json", lambda c: c["metadata"].update(total_size=1)), "weights", "total_size"),
    "one eos": (
        edited("generation_config.json", lambda c: c.update(eos_token_id=c["eos_token_id"][0])), "stop tokens",
        "lacks <|endoftext|>"),
}


def mutant(good: Path, tmp_path: Path, mutate: Mutation) -> Path:
    path = tmp_path / "of-1A1B"
    shutil.copytree(good, path)
    mutate(path)
    return path


def test_an_export_is_ready_for_everybody(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_hf(good, checksums=True)
    assert report.ready and not report.findings, report.text()
    assert main(["Qwen3VLConverter", "check_hf", "--dir", str(good)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[-1] for line in table.splitlines()[3:]] == ["ready"] * len(TITLES)
    assert len(list(good.glob("*.safetensors"))) == 3 and "in 3 files" in table and "bfloat16" in table


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_missing_is_named_for_whom(good: Path, tmp_path: Path, name: str) -> None:
    mutate, topic, blocked, words = MUTATIONS[name]
    path = mutant(good, tmp_path, mutate)
    report = check_hf(path)
    matching = [finding for finding in report.findings if finding.topic == topic and finding.blocks == blocked]
    assert any(words in finding.problem for finding in matching), report.text()
    assert {name for name in TITLES if report.missing(name)} == blocked, report.text()
    assert all(finding.remedy for finding in report.findings)
    for consumer in TITLES:
        assert report.verdict(consumer).startswith("missing: " if consumer in blocked else "ready")
        assert check_hf(path, consumers=[consumer]).ready is (consumer not in blocked)


@pytest.mark.parametrize("name", NOTES)
def test_what_is_worth_knowing_is_a_note(good: Path, tmp_path: Path, name: str) -> None:
    mutate, topic, words = NOTES[name]
    report = check_hf(mutant(good, tmp_path, mutate))
    assert report.ready
    assert [finding.topic for finding in report.findings if finding.topic != "changed files"] == [topic] * (
        topic != "changed files"), report.text()
    assert any(words in finding.problem for finding in report.findings), report.text()


def test_a_changed_weight_is_found_by_its_checksum(good: Path, tmp_path: Path) -> None:
    path = mutant(good, tmp_path, lambda path: None)
    file = sorted(path.glob("*.safetensors"))[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert check_hf(path).ready
    (finding,) = check_hf(path, checksums=True).findings
    assert finding.topic == "weights" and finding.blocks == ALL
    assert f"{file.name} has another checksum" in finding.problem
    removed("manifest.json")(path)
    (finding,) = check_hf(path, checksums=True).findings
    assert finding.topic == "checksums" and not finding.blocks


@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json",
    "generation_config.json", "model.safetensors.index.json", "manifest.json",
])
def test_random_damage_is_a_finding_or_harmless(good: Path, tmp_path: Path, name: str) -> None:
    path = mutant(good, tmp_path, lambda path: None)
    content = (path / name).read_text()
    for seed in range(25):
        value = mutate_value(json.loads(content), random.Random(seed))
        (path / name).write_text(json.dumps(value))
        report = check_hf(path)
        assert report.text() and json.loads(report.json())["ready"] is report.ready


def test_unreadable_files_are_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path)[-9:] != "vocab.json"[-9:] and access(path, mode))
    (finding,) = check_hf(good).findings
    assert finding.topic == "permissions" and "vocab.json" in finding.problem and finding.blocks == ALL


@pytest.mark.parametrize(("directory", "consumer"), [
    ("iter_0000300", LMMS_EVAL), ("omni-1A1B", VLMEVALKIT), ("whisper-1A1B", SGLANG),
])
def test_names_that_mislead_programs(good: Path, tmp_path: Path, directory: str, consumer: str) -> None:
    os.symlink(good, tmp_path / directory)
    (finding,) = check_hf(tmp_path / directory).findings
    assert finding.topic == "directory name" and finding.notes == {consumer} and "ln -s" in finding.remedy


def test_a_dense_model_must_not_have_the_name_of_a_sparse_one(tmp_path: Path) -> None:
    from tests.ut.checkpoint.tiny import write_hf_directory

    path = tmp_path / "of-1A1B"
    write_hf_directory(path, random_config(random.Random(2), moe=False, tie=True))
    notes = [finding.problem for finding in check_hf(path).findings if finding.topic == "directory name"]
    assert len(notes) == 1 and "a dense model" in notes[0]


FORMS = {
    "peft": {TRANSFORMERS5, VLLM}, "vllm": {TRANSFORMERS5, VLLM}, "peft-transformers4": {TRANSFORMERS4},
    "sglang": {SGLANG}, "per-expert": {SGLANG},
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_each_form(tmp_path: Path, form: str) -> None:
    config = random_config(random.Random(1), moe=True, tie=False)
    adapters = TinyAdapters(config, options(targets=("attention", "experts"), expert_r=6))
    path = adapters.write(tmp_path / "adapter", form=form)
    edit_config(path, base_model_name_or_path="Qwen/Qwen3-VL-30B-A3B-Instruct")
    report = check_hf(path)
    assert {name for name in TITLES if not report.missing(name)} - {EVALSCOPE} == FORMS[form], report.text()
    assert not report.missing(EVALSCOPE) or not FORMS[form] & {VLLM, SGLANG}
    if VLLM in FORMS[form]:
        assert any("--max-lora-rank 8" in finding.remedy for finding in report.notes(VLLM))


@pytest.mark.parametrize(("fields", "consumers", "words"), [
    ({"base_model_name_or_path": "/nowhere/model"}, TRANSFORMERS, "does not exist here"),
    ({"rank_pattern": {"q_proj": 1024}}, {VLLM}, "at most 512"),
    ({"use_rslora": True}, {SGLANG}, "SGLang ignores use_rslora"),
    ({"target_modules": None}, {VLLM, SGLANG}, "lacks target_modules"),
    ({"use_dora": True}, ALL, "use_dora"),
])
def test_adapters_that_some_cannot_take(
    tmp_path: Path, fields: dict[str, Any], consumers: set[str], words: str
) -> None:
    config = random_config(random.Random(1), moe=False, tie=False)
    path = TinyAdapters(config, options(targets=("attention",), expert_r=None)).write(tmp_path / "iter" / "adapter")
    edit_config(path, **{"base_model_name_or_path": str(tmp_path), **fields})
    report = check_hf(tmp_path / "iter")
    assert report.directory == path
    finding = next(finding for finding in report.findings if words in finding.problem)
    assert consumers <= finding.blocks | {LMMS_EVAL, VLMEVALKIT, EVALSCOPE}, report.text()
    assert all(report.missing(name) for name in (LMMS_EVAL, VLMEVALKIT))  # they take whole models


def test_json_has_the_verdicts(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mutant(good, tmp_path, removed("chat_template.json"))
    command = ["Qwen3VLConverter", "check_hf", "--dir", str(path), "--json"]
    assert main([*command, "--for", "vllm,transformers"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert {name: facts["ready"] for name, facts in content["consumers"].items()} == {
        TRANSFORMERS4: False, TRANSFORMERS5: False, VLLM: True
    }
    assert content["consumers"][TRANSFORMERS4]["missing"][0]["topic"] == "chat template" and not content["ready"]
    assert main([*command, "--for", "vllm,sglang"]) == 0


def test_what_is_no_model_is_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        check_hf(tmp_path / "nothing")
    root = good.parent / "dcp"
    (tmp_path / "run").mkdir()
    shutil.copytree(root / "release", tmp_path / "run" / "iter_0000003")
    (tmp_path / "run" / "best_checkpointed_iteration.txt").write_text("3")
    for given, path in ((root, root / "release"), (root / "release", root / "release"),
                        (tmp_path / "run" / "best", tmp_path / "run" / "iter_0000003")):
        with pytest.raises(UserError, match=f"dcp_to_hf --load_dir {path} --save_dir DIR"):
            check_hf(given)
    with pytest.raises(UserError, match=r"dcp/best: .* has no best_checkpointed_iteration.txt"):
        check_hf(root / "best")
    with pytest.raises(UserError, match="--for ollama: unknown"):
        check_hf(good, consumers=["ollama"])


def test_weights_are_judged_by_their_headers(good: Path, tmp_path: Path) -> None:
    """The shapes and sizes of the 30B model, in files without a byte of data on the disk."""
    path = tmp_path / "Qwen3-VL-30B-A3B"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_30b()))
    spec = spec_of(path)
    shapes = hf_shapes(spec.weight_rules(spec.read_config(path), expert_layout="hub"))
    files: list[dict[str, tuple[int, ...]]] = [dict(list(shapes.items())[start::13]) for start in range(13)]
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-00013.safetensors"
        header = build_header([(key, torch.bfloat16, shape) for key, shape in tensors.items()], {"format": "pt"})
        nbytes = sum(2 * torch.Size(shape).numel() for shape in tensors.values())
        (path / name).write_bytes(header)
        os.truncate(path / name, len(header) + nbytes)
        weight_map |= dict.fromkeys(tensors, name)
        total += nbytes
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    report = check_hf(path)
    assert not [finding for finding in report.findings if finding.topic == "weights"], report.text()
    assert "62.1 GB" in report.content and sum(file.stat().st_blocks for file in path.iterdir()) * 512 < 10_000_000
    assert report.seconds < 20
