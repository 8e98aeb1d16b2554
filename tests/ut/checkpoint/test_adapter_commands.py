"""mm-convert's commands for LoRA: export, import, merging, comparison, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from checkpoint.cli import main
from mindspeed_mm.checkpoint import conversion, directory, safetensors_io
from mindspeed_mm.checkpoint.adapter_commands import lora_hf_to_dcp, lora_to_hf, merge_lora, verify_lora
from mindspeed_mm.checkpoint.adapter_formats import FORMS
from mindspeed_mm.checkpoint.adapters import AdapterCheckpoint, AdapterDirectory
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import read_manifest
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.huggingface import HFReader
from mindspeed_mm.checkpoint.inspection import inspect, verify
from mindspeed_mm.checkpoint.partial import BASE_KEY
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import LORA_KEY
from tests.helpers.checkpoint_directory import commit_directory as directory_of
from tests.helpers.hf_model import hf_inputs, mixed_samples, tiny_model
from tests.ut.checkpoint.tiny import random_config, write_hf_directory
from tests.ut.checkpoint.tiny_adapters import PEFT_FORMS, TinyAdapters, edit_config, options

CONVERTER = "Qwen3VLConverter"


class Setting:
    """A base, random adapters, and a checkpoint of them."""

    def __init__(self, root, *, dtype=torch.bfloat16, layout="hub", lora=None, size=0.1, seed=0, others=None):
        config = random_config(random.Random(seed), moe=True, tie=False)
        self.root, self.hf = root, root / "hf"
        self.base = write_hf_directory(self.hf, config, dtype=dtype, layout=layout)
        self.tiny = TinyAdapters(config, lora, size=size)
        self.saved = self.tiny.save(root / "save", self.hf, others=others)

    def merged(self, dtype):
        """What merging has to give, by the definition."""
        deltas = self.tiny.deltas()
        return {name: (w.float() + deltas[name]).to(dtype) if name in deltas else w.to(dtype)
                for name, w in self.base.items()}


def tensors_of(path):
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def run(*arguments):
    return main([CONVERTER, *map(str, arguments)])


@pytest.mark.parametrize("form", FORMS)
def test_export_of_a_checkpoint(tmp_path, form, capsys):
    setting = Setting(tmp_path)
    target = tmp_path / "adapter"
    assert run("lora_to_hf", "--load_dir", tmp_path / "save", "--save_dir", target, "--format", form) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == str(setting.hf)
    assert not list(tmp_path.glob(".adapter*"))
    status = run("verify_lora", "--lora_dir", setting.saved, "--other_dir", target)
    out = capsys.readouterr().out
    assert status == (1 if form == "sglang" else 0)
    if form == "sglang":
        assert "no adapter in" in out and "visual" in out
    else:
        count = len(setting.tiny.adapters)
        experts = sum(a.is_experts for a in setting.tiny.adapters)
        equal = count - experts if form == "per-expert" else count
        assert f"adapted weights: {equal} equal bit for bit" in out
        assert ("with equal deltas up to rounding" in out) == (form == "per-expert")


def test_forms_go_around(tmp_path):
    """Each form to each other, at last to a checkpoint, whose deltas are the first one's."""
    setting = Setting(tmp_path, lora=options(targets=("attention", "experts")))
    source = setting.saved
    for number, form in enumerate(("peft", "peft-transformers4", "vllm", "peft", "per-expert", "sglang", "peft")):
        source = lora_to_hf(source, tmp_path / f"form{number}", format=form, hf_dir=setting.hf)
        exact = number < 4
        comparison = verify_lora(setting.saved, source, hf_dir=setting.hf)
        assert not comparison.differing and comparison.error < 1e-6
        assert comparison.close == 0 or not exact
    release = lora_hf_to_dcp(source, setting.hf, tmp_path / "dcp")
    assert not verify_lora(setting.saved, release).differing


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"targets": ("mlp", "experts", "merger")},
                                  {"targets": ("*.layers.1.self_attn.q_proj", "vision")}])
def test_import_is_a_checkpoint_that_a_run_loads(tmp_path, lora, capsys):
    setting = Setting(tmp_path, lora=options(**lora))
    adapter = lora_to_hf(setting.saved, tmp_path / "adapter")
    assert run("lora_hf_to_dcp", "--lora_dir", adapter, "--hf_dir", setting.hf, "--dcp_dir", tmp_path / "dcp") == 0
    assert "differ in rank" not in capsys.readouterr().out
    release = tmp_path / "dcp/release"
    metadata = read_manifest(release)["metadata"]
    recorded = setting.tiny.options.recorded()
    if not any(a.is_experts for a in setting.tiny.adapters):
        recorded["expert_r"] = 6  # as that of the linear layers, since nothing records it
    assert {**metadata[LORA_KEY], "targets": None, "alpha": None} == {**recorded, "targets": None, "alpha": None}
    assert metadata[LORA_KEY]["alpha"] == pytest.approx(recorded["alpha"])
    assert metadata[BASE_KEY] == read_manifest(setting.saved)["metadata"][BASE_KEY]
    assert metadata["kind"] == "converted"
    reader = CheckpointReader(release, read_manifest(release))
    assert reader.tensors.keys() == {f"model.{name}" for name in setting.tiny.factors}
    assert all(torch.equal(reader.read(f"model.{name}"), t) for name, t in setting.tiny.factors.items())
    targets = metadata[LORA_KEY]["targets"]  # they give just these adapters
    config = json.loads((setting.hf / "config.json").read_text())
    again = TinyAdapters(config, options(**lora | {"targets": tuple(targets)}))
    assert [a.name for a in again.adapters] == [a.name for a in setting.tiny.adapters]


def test_import_of_several_ranks_and_scales(tmp_path, capsys):
    """A run has one alpha and two ranks: zeros fill up, and scales go into B."""
    setting = Setting(tmp_path, lora=options(targets=("attention", "experts")))
    adapter = lora_to_hf(setting.saved, tmp_path / "adapter")
    edit_config(adapter, alpha_pattern={"k_proj": 24, "mlp.experts.down_proj": 18})
    release = lora_hf_to_dcp(adapter, setting.hf, tmp_path / "dcp")
    assert "differ in rank or scale; ranks are filled up with zeros to 6 and for experts 3" in capsys.readouterr().out
    assert not verify_lora(adapter, release, hf_dir=setting.hf).differing


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp32"])
def test_merge(tmp_path, layout, dtype, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_io, "READ_BYTES", 2000)  # several ranges of rows
    setting = Setting(tmp_path, layout=layout)
    target = tmp_path / "merged"
    assert run("merge_lora", "--hf_dir", setting.hf, "--lora_dir", tmp_path / "save", "--save_dir", target, "--dtype",
               dtype, "--max_shard_size", "20KB") == 0
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    found, expected = tensors_of(target), setting.merged(kind)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == kind
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if kind == torch.float32 else 8e-3, atol=1e-7)
    count = len(setting.tiny.adapters)
    name = str(kind).removeprefix("torch.")
    out = capsys.readouterr().out
    assert f"merged {count} adapted weights; rounding to {name} loses " in out
    assert "warning: rounding loses" not in out
    assert json.loads((target / "config.json").read_text())["dtype"] == name
    assert HFReader(target).layout == "hub"


def test_each_form_merges_to_the_same_model(tmp_path):
    setting = Setting(tmp_path, dtype=torch.float32)
    expected = tensors_of(merge_lora(setting.hf, setting.saved, tmp_path / "merged"))
    for form in ("peft", "peft-transformers4", "per-expert"):
        adapter = lora_to_hf(setting.saved, tmp_path / form, format=form)
        found = tensors_of(merge_lora(setting.hf, adapter, tmp_path / f"merged-{form}"))
        for name, tensor in expected.items():
            if form == "per-expert":
                torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("size", [1e-4, 0.5])
def test_share_of_the_update_that_rounding_loses(tmp_path, size, capsys):
    """As computed from whole tensors; a small update is warned about."""
    setting = Setting(tmp_path, size=size)
    found = tensors_of(merge_lora(setting.hf, setting.saved, tmp_path / "merged"))
    deltas = setting.tiny.deltas()
    update = torch.cat([d.flatten() for d in deltas.values()]).double()
    kept = torch.cat([(found[name].double() - setting.base[name].double()).flatten() for name in deltas])
    share = float((kept - update).norm() / update.norm())
    out = capsys.readouterr().out
    assert f"loses {100 * share:.2g} % of the update (|R(W + D) - R(W) - D| / |D|), most in model." in out
    assert ("warning: rounding loses more than 10 % of the update" in out) == (size < 1e-3) == (share > 0.9)


def test_adapters_that_have_not_trained_are_reported(tmp_path, capsys):
    setting = Setting(tmp_path, size=0)
    merge_lora(setting.hf, setting.saved, tmp_path / "merged")
    assert "warning: the adapters of all" in capsys.readouterr().out


def test_merge_over_a_distributed_checkpoint(tmp_path):
    """The base is the one that the run loaded; --hf_dir gives the other files."""
    setting = Setting(tmp_path)
    other = write_hf_directory(tmp_path / "tuned", json.loads((setting.hf / "config.json").read_text()), seed=5)
    hf_to_dcp(tmp_path / "tuned", tmp_path / "dcp")
    saved = setting.tiny.save(tmp_path / "over_dcp", tmp_path / "dcp")
    found = tensors_of(merge_lora(setting.hf, saved, tmp_path / "merged", dtype="fp32"))
    name = setting.tiny.adapters[0].source[0]
    torch.testing.assert_close(found[name], other[name].float() + setting.tiny.deltas()[name])
    adapter = lora_to_hf(saved, tmp_path / "adapter", hf_dir=setting.hf)
    again = tensors_of(merge_lora(setting.hf, adapter, tmp_path / "again", dtype="fp32", base_dir=tmp_path / "dcp"))
    assert all(torch.equal(again[key], tensor) for key, tensor in found.items())
    with pytest.raises(UserError, match="names no base model|is no Hugging Face directory here; name the base model's"):
        lora_to_hf(saved, tmp_path / "adapter2")


def test_parameters_that_trained_in_full_are_merged_and_not_exported(tmp_path):
    target = "image_encoder.vision_projector.merger.norm.weight"
    setting = Setting(tmp_path, lora=options(targets=("attention",)))
    values = torch.randn(setting.tiny.weights["model.visual.merger.norm.weight"])
    saved = setting.tiny.save(tmp_path / "mixed", setting.hf, others={target: values})
    found = tensors_of(merge_lora(setting.hf, saved, tmp_path / "merged"))
    assert torch.equal(found["model.visual.merger.norm.weight"], values.bfloat16())
    with pytest.raises(UserError, match="also has 1 parameter that trained in full, such as .*; make a whole model"):
        lora_to_hf(saved, tmp_path / "adapter")


def test_mindspeeds_name_and_options(tmp_path, capsys):
    setting = Setting(tmp_path)
    assert run("merge_mm_lora_dcp_weight_to_base_hf", "--base_hf_dir", setting.hf, "--lora_dcp_dir", setting.saved,
               "--lora_target_modules", "q_proj,k_proj", "--scaling", "1.0", "--save_merged_hf_dir",
               tmp_path / "merged") == 0
    out = capsys.readouterr().out
    assert "note: --scaling has no effect: scale and targets are read from the adapters" in out
    merge_lora(setting.hf, setting.saved, tmp_path / "again")
    found = tensors_of(tmp_path / "merged")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors_of(tmp_path / "again").items())


def test_merged_model_computes_what_peft_computes(tmp_path):
    """The directory in transformers against the adapters in PEFT, and the weights against PEFT's own merge."""
    model = tiny_model().eval()
    config = model.config.to_dict()
    model.save_pretrained(tmp_path / "hf")
    tiny = TinyAdapters(config, size=0.15)
    adapter = tiny.write(tmp_path / "adapter", PEFT_FORMS[0])
    merged = merge_lora(tmp_path / "hf", adapter, tmp_path / "merged")
    inputs = hf_inputs(mixed_samples()[1])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(tiny_model().eval(), str(adapter))
        expected = wrapped(**inputs).logits
        loaded = type(model).from_pretrained(merged, attn_implementation="eager").eval()
        found = loaded(**inputs).logits
        assert (found - expected).norm() / expected.norm() < 1e-6
        state = wrapped.merge_and_unload().state_dict()
    differing = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[name])}
    assert not differing


def test_an_interrupted_merge_is_resumed(tmp_path, monkeypatch, capsys):
    """Finished files are kept, and the result and the share that it reports are those of a run in one go."""
    monkeypatch.setattr(safetensors_io, "READ_BYTES", 2000)
    setting = Setting(tmp_path)

    def merge(name):
        return merge_lora(setting.hf, setting.saved, tmp_path / name, workers=1, max_shard_size=20_000)

    written = 0
    advance = conversion.ProgressBar.advance

    def interrupt(progress, count):
        nonlocal written
        written += count
        if written - count <= 70_000 < written:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        advance(progress, count)

    with monkeypatch.context() as patch:
        patch.setattr(conversion.ProgressBar, "advance", interrupt)
        with pytest.raises(SystemExit):
            merge("merged")
    assert not (tmp_path / "merged").exists()
    assert list((directory.partial_name(tmp_path / "merged") / directory.FINISHED).glob("model-*.json"))
    capsys.readouterr()
    merge("merged")
    resumed = capsys.readouterr().out
    assert "resuming:" in resumed
    merge("once")
    lines = [[line for line in out.splitlines() if line.startswith("merged ")]
             for out in (resumed, capsys.readouterr().out)]
    assert lines[0] == lines[1] and lines[0]
    assert not list(tmp_path.glob(".merged*"))
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes(), path.name


def test_another_base_is_refused(tmp_path):
    setting = Setting(tmp_path)
    write_hf_directory(tmp_path / "other", json.loads((setting.hf / "config.json").read_text()), seed=3)
    with pytest.raises(UserError, match="other is not the base of .*iter_0000007"):
        merge_lora(tmp_path / "other", setting.saved, tmp_path / "merged")


def test_a_moved_base_is_named(tmp_path):
    setting = Setting(tmp_path)
    shutil.move(setting.hf, tmp_path / "moved")
    with pytest.raises(UserError, match="iter_0000007: its base .*hf is no Hugging Face directory here; name"):
        lora_to_hf(setting.saved, tmp_path / "adapter")
    lora_to_hf(setting.saved, tmp_path / "adapter", hf_dir=tmp_path / "moved")
    merge_lora(tmp_path / "moved", setting.saved, tmp_path / "merged")


def test_values_that_are_not_finite_are_refused(tmp_path):
    setting = Setting(tmp_path)
    name = next(name for name in setting.tiny.factors if name.endswith("down_proj_lora_B"))
    for value in (float("nan"), float("inf")):
        setting.tiny.factors[name][1, 2, 0] = value
        adapter = setting.tiny.write(tmp_path / f"adapter {value}")
        saved = setting.tiny.save(tmp_path / f"save {value}", setting.hf)
        for source in (adapter, saved):
            with pytest.raises(UserError, match=f"{name} has values that are NaN or infinite; take an earlier"):
                merge_lora(setting.hf, source, tmp_path / "merged")
            with pytest.raises(UserError, match=f"{name} has values that are NaN or infinite"):
                lora_to_hf(source, tmp_path / "written", hf_dir=setting.hf)
        with pytest.raises(UserError, match=f"{name} has values that are NaN or infinite"):
            lora_hf_to_dcp(adapter, setting.hf, tmp_path / "dcp")
    assert not any((tmp_path / made).exists() for made in ("merged", "written", "dcp/release"))


def test_a_base_that_is_not_the_whole_model_is_refused(tmp_path):
    setting = Setting(tmp_path)
    adapter = setting.tiny.write(tmp_path / "adapter")
    write_hf_directory(tmp_path / "other", random_config(random.Random(4), moe=False, tie=False))
    for base in (setting.saved, tmp_path / "other"):
        with pytest.raises(UserError, match="does not fit .*config.json: .* missing: .*; name the base"):
            merge_lora(setting.hf, adapter, tmp_path / "merged", base_dir=base)
        with pytest.raises(UserError, match="does not fit .*config.json: .* missing: .*; name the base"):
            lora_hf_to_dcp(adapter, setting.hf, tmp_path / "dcp", base_dir=base)


def test_adapters_over_a_training_checkpoint_are_not_the_published_models(tmp_path):
    """Whose weights are nowhere as a Hugging Face directory; those of a converted checkpoint are."""
    setting = Setting(tmp_path)
    hf_to_dcp(setting.hf, tmp_path / "dcp")
    with directory_of(tmp_path / "tuned/iter_0000001", {"kind": "training"}) as partial:
        shutil.copytree(tmp_path / "dcp/release", partial, dirs_exist_ok=True, ignore=lambda *_: {"manifest.json"})
    recorded = {"model": {"init_from_hf_path": str(setting.hf)}}
    over_converted = setting.tiny.save(tmp_path / "one", tmp_path / "dcp", metadata=recorded)
    over_tuned = setting.tiny.save(tmp_path / "two", tmp_path / "tuned/iter_0000001", metadata=recorded)
    config = json.loads((lora_to_hf(over_converted, tmp_path / "adapter") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(setting.hf)
    with pytest.raises(UserError, match="its base .*tuned/iter_0000001 is no Hugging Face directory .*dcp_to_hf"):
        lora_to_hf(over_tuned, tmp_path / "adapter2")


def test_the_source_is_not_written_into(tmp_path):
    setting = Setting(tmp_path)
    for place in (setting.saved / "adapter", setting.hf / "adapter"):
        with pytest.raises(UserError, match=f"--save_dir {place} is inside .*, which is read from; name another"):
            lora_to_hf(setting.saved, place, overwrite=True)


def test_verify_lora_finds_a_difference(tmp_path, capsys):
    setting = Setting(tmp_path)
    adapter = lora_to_hf(setting.saved, tmp_path / "adapter")
    edit_config(adapter, alpha_pattern={"layers.0.self_attn.q_proj": 13})
    assert run("verify_lora", "--lora_dir", setting.saved, "--other_dir", adapter) == 1
    out = capsys.readouterr().out
    assert "layers.0.self_attn.q_proj: the deltas differ by 0.077 of their norm" in out and "1 different" in out


def test_export_replaces_only_with_overwrite(tmp_path):
    setting = Setting(tmp_path)
    lora_to_hf(setting.saved, tmp_path / "adapter")
    with pytest.raises(UserError, match="--save_dir .*adapter exists; pass --overwrite"):
        lora_to_hf(setting.saved, tmp_path / "adapter", format="sglang")
    lora_to_hf(setting.saved, tmp_path / "adapter", format="sglang", overwrite=True)
    assert AdapterDirectory(tmp_path / "adapter", setting.tiny.spec, setting.tiny.model_config).experts == "3-D"
    with pytest.raises(UserError, match="is or holds .*adapter, which is read from"):
        lora_to_hf(tmp_path / "adapter", tmp_path / "adapter", hf_dir=setting.hf, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(UserError, match="mine is not a model directory, so it is not replaced"):
        lora_to_hf(setting.saved, tmp_path / "mine", overwrite=True)


def test_other_commands_name_the_right_one(tmp_path):
    setting = Setting(tmp_path)
    adapter = lora_to_hf(setting.saved, tmp_path / "adapter")
    checkpoint = "iter_0000007 holds LoRA adapters; merge_lora of mm-convert adds them to the base model, lora_to_hf"
    with pytest.raises(UserError, match=checkpoint):
        dcp_to_hf(setting.saved, tmp_path / "x", setting.hf)
    with pytest.raises(UserError, match=checkpoint):
        verify(setting.saved, setting.hf)
    for command in (lambda: dcp_to_hf(adapter, tmp_path / "x", setting.hf), lambda: verify(adapter, setting.hf)):
        with pytest.raises(UserError, match="adapter holds LoRA adapters and not a checkpoint; lora_hf_to_dcp of mm-c"):
            command()
    with pytest.raises(UserError, match="--hf_dir .*adapter holds LoRA adapters and not a model; lora_hf_to_dcp of mm"):
        hf_to_dcp(adapter, tmp_path / "dcp")
    hf_to_dcp(setting.hf, tmp_path / "whole")
    with pytest.raises(UserError, match="release holds no LoRA adapters; dcp_to_hf converts a checkpoint of full"):
        lora_to_hf(tmp_path / "whole", tmp_path / "x", hf_dir=setting.hf)
    with pytest.raises(UserError, match="has no adapter_config.json, so it is no directory of adapters; a checkpoint"):
        lora_hf_to_dcp(setting.saved, setting.hf, tmp_path / "dcp")


def test_inspect(tmp_path):
    setting = Setting(tmp_path)
    adapter = lora_to_hf(setting.saved, tmp_path / "adapter")
    text = inspect(setting.saved)
    assert "LoRA           rank 6, of experts 3, alpha 12, scale alpha / rank" in text
    assert "LoRA targets   all" in text and f"over the base {setting.hf}" in text
    text = inspect(adapter)
    assert "LoRA adapters, experts' factors canonical" in text and "rank 6, alpha 12" in text
    assert f"base               {setting.hf}" in text and "rank_pattern" in text


def damaged(setting, change):
    manifest = read_manifest(setting.saved)
    change(manifest["metadata"])
    return lambda: AdapterCheckpoint(setting.saved, manifest, setting.tiny.spec, setting.tiny.model_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(LORA_KEY), "holds no LoRA adapters"),
        (lambda m: m[LORA_KEY].update(r=0), "manifest.json: lora must have r, expert_r, alpha, use_rslora of a LoRA"),
        (lambda m: m.update({LORA_KEY: 3}), "manifest.json: lora must have .* and is 3; restore the checkpoint"),
        (lambda m: m[LORA_KEY].update(r=5), r"does not fit the model: \d+ tensors of another shape: .* of \[5, "),
    ],
)
def test_refused_records(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        damaged(Setting(tmp_path), change)()


def test_unexpected_tensors_are_refused(tmp_path):
    setting = Setting(tmp_path, others={"text_decoder.other.lora_A": torch.zeros(2)})
    with pytest.raises(UserError, match="does not fit the model: 1 tensor unexpected: text_decoder.other.lora_A; name"):
        lora_to_hf(setting.saved, tmp_path / "adapter")
