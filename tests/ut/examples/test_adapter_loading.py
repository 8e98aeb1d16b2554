"""LoRA adapters in the inference demo: read by PEFT in the form that it reads, and otherwise refused in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_mm.checkpoint.adapter_formats import write_adapter
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.log_lines import assert_one_line

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "qwen3vl"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE / "quickstart")]

import adapter_loading  # noqa: E402 - scripts, found only through the path above
import configure  # noqa: E402
import inference_demo  # noqa: E402
import make_digits  # noqa: E402
import make_tiny_model  # noqa: E402

OPTIONS = LoraOptions(targets=("all",), r=4, alpha=8, expert_r=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model.write_model(directory, make_digits.all_texts())
    return directory


def write(model, directory, form="peft", options=OPTIONS):
    adapters = SPEC.adapters(SPEC.read_config(model), options)
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    directory.mkdir()
    write_adapter(directory, adapters, values.__getitem__, form=form, base=str(model))
    return directory


def read_form():
    """The form that the installed versions read, and one that they do not."""
    from importlib.metadata import version

    form = adapter_loading.expert_form(peft=version("peft"), transformers=version("transformers"))
    return form, {"peft": "peft-transformers4", "peft-transformers4": "peft"}[form]


def answerer(model, adapter):
    torch.set_num_threads(1)
    return inference_demo.Answerer(str(model), device_map="cpu", dtype="auto", adapter=str(adapter))


def demo(capsys, model, adapter):
    status = inference_demo.main(
        ["--model", str(model), "--adapter", str(adapter), "--question", "?", "--device-map", "cpu"]
    )
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("peft", "transformers", "form"),
    [("0.19.1", "5.24.0", "peft"), ("0.21.2", "5.0.0rc1", "peft"), ("0.19.0", "5.2.0", "peft-transformers4"),
     ("0.18.1", "4.57.6", "peft"), ("0.19.1", "4.57.6", "peft-transformers4"), ("0.20.0.dev0", "5.1.0", "peft")],
)
def test_form_by_versions(peft, transformers, form):
    assert adapter_loading.expert_form(peft=peft, transformers=transformers) == form


def test_adapters_change_the_model(model, tmp_path):
    """And with factors of zero they do not."""
    adapter = write(model, tmp_path / "adapter", read_form()[0])
    inputs = {"input_ids": torch.arange(8)[None]}
    with torch.inference_mode():
        base = inference_demo.Answerer(str(model), device_map="cpu", dtype="auto").model(**inputs).logits
        adapted = answerer(model, adapter).model(**inputs).logits
        shutil.rmtree(adapter)
        adapter = write(model, tmp_path / "adapter", read_form()[0], options=LoraOptions(
            targets=("all",), r=4, alpha=1e-30, expert_r=3,
        ))
        unchanged = answerer(model, adapter).model(**inputs).logits
    assert (adapted - base).abs().max() > 0.1
    assert torch.equal(unchanged, base)


def test_other_forms_are_refused_with_the_command(model, tmp_path, capsys):
    right, wrong = read_form()
    for form in (wrong, "sglang", "per-expert"):
        adapter = write(model, tmp_path / form, form)
        assert_one_line(demo(capsys, model, adapter), f"--adapter {adapter}", f"--format {right}", "mm-convert")
    # without experts both orders are the same
    plain = write(model, tmp_path / "plain", wrong, LoraOptions(targets=("attention",), r=4, alpha=8, expert_r=4))
    answerer(model, plain)


def test_missing_peft_is_named(model, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    assert_one_line(demo(capsys, model, tmp_path), "package peft", "examples/qwen3vl/requirements.txt")


def _forget_config(adapter):
    (adapter / "adapter_config.json").unlink()


def _pickle(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")


def _dora(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


def _fewer_targets(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj"]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_forget_config, "has no adapter_config.json"), (_pickle, "is a pickle"), (_dora, "use_dora"),
     (_fewer_targets, "factors, and PEFT made")],
)
def test_unusable_adapters_are_one_line(model, tmp_path, capsys, spoil, message):
    adapter = write(model, tmp_path / "adapter", read_form()[0])
    spoil(adapter)
    assert_one_line(demo(capsys, model, adapter), message, str(adapter))


def test_configuration_for_another_model():
    files = configure.fill_in("run", "run/base")
    assert files["model_tiny.json"]["init_from_hf_path"] == "run/base"
    assert files["data_tiny.json"]["dataset_param"]["preprocess_parameters"]["model_name_or_path"] == "run/base"
