"""Two ranks: LoRA runs resume to the bit, name their base, and leave adapters that PEFT loads as they are."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.models.lora import LoraOptions, is_adapter
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers.lora import factors_of
from tests.helpers.resumed_runs import LAST, Runs, assert_same_run
from tests.helpers.tiny_recipe import write_recipe
from tests.st.test_recipe import stored

pytestmark = pytest.mark.st

LORA = {"lora_target_modules": "all", "lora_r": 4, "lora_alpha": 8, "lora_expert_r": 3}
OPTIONS = LoraOptions(targets=("all",), r=4, alpha=8, expert_r=3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny recipe with weights in bf16, computed in bf16."""
    recipe = write_recipe(tmp_path_factory.mktemp("lora recipe"))
    for path in (recipe / "checkpoint").glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    (recipe / "fsdp2.yaml").write_text("param_dtype: bf16\n")
    return recipe


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> Runs:
    runs = Runs(recipe, tmp_path_factory.mktemp("runs"), processes=2)
    adapter = runs.place / "whole" / LAST / "adapter"
    runs.add("whole", **LORA)
    runs.add_stopped("resumed", [3, 6], **LORA)
    runs.add_stopped("asynchronous", [5], async_save=True, save_interval=2, keep_last=1, **LORA)
    runs.add("expert parallel", expert_model_parallel_size=2, **LORA)
    runs.add_stopped("expert parallel resumed", [4], expert_model_parallel_size=2, **LORA)
    runs.add("base in fp32", frozen_param_dtype="fp32", **LORA)
    runs.add("from adapters", lora_init_from=adapter, **LORA)
    runs.add("next stage", load="whole", finetune=True, **LORA)
    runs.add("in full", exit_interval=4)
    runs.add("over a checkpoint", load="in full", finetune=True, **LORA)
    runs.add("mixed", lora_mixed_training=True, lora_apply_modules="text_decoder", **LORA)
    text = {**LORA, "lora_target_modules": "attention,experts"}
    runs.add("after mixed", load="mixed", finetune=True, exit_interval=1, **text)
    runs.add("other parts", load="mixed", finetune=True, **LORA)
    runs.add("another rank", load="whole", **{**LORA, "lora_r": 8, "train_iters": 9})
    runs.add("another scale", load="whole", **{**LORA, "lora_alpha": 4, "train_iters": 9})
    runs.add("other targets", load="whole", **{**LORA, "lora_target_modules": "attention,experts", "train_iters": 9})
    runs.add("no adapters", load="whole", train_iters=9)
    runs.add("over a run", load="in full", **LORA)
    return runs.go()


def adapters(runs: Runs, name: str, last: str = LAST) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("model."): tensor for key, tensor in stored(runs.place / name / last).items()
        if key.startswith("model.")
    }


def first_loss(runs: Runs, name: str) -> float:
    return float.fromhex(runs.steps(name)[1]["loss"])


def test_checkpoints_hold_what_trains(runs):
    tensors = stored(runs.place / "whole" / LAST)
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    assert names and all(map(is_adapter, names))
    moments = {name.removeprefix("optimizer.")[:-8] for name in tensors if name.endswith(".exp_avg")}
    assert moments == names
    assert all(tensors[f"model.{name}"].dtype == torch.float32 for name in names)
    metadata = json.loads((runs.place / "whole" / LAST / "manifest.json").read_text())["metadata"]
    assert metadata["lora"] == OPTIONS.recorded() and metadata["base"]["kind"] == "huggingface"


@pytest.mark.parametrize("name", ["resumed", "asynchronous"])
def test_resume_to_the_bit(runs, name):
    assert_same_run(runs.steps("whole"), runs.parts(name))
    ours, theirs = stored(runs.place / name / LAST), stored(runs.place / "whole" / LAST)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_base_in_bf16_computes_the_same_to_the_bit(runs):
    assert runs.steps("base in fp32") == runs.steps("whole")


def test_expert_parallel_run_resumes(runs):
    assert_same_run(runs.steps("expert parallel"), runs.parts("expert parallel resumed"))
    assert first_loss(runs, "expert parallel") == pytest.approx(first_loss(runs, "whole"), rel=1e-3)


def test_adapters_are_where_the_next_run_begins(runs):
    """From a PEFT directory, and as a new stage from the checkpoint: the same first loss, the first run's next one."""
    assert first_loss(runs, "from adapters") == first_loss(runs, "next stage") < first_loss(runs, "whole")


def test_another_base(runs):
    base = json.loads((runs.place / "over a checkpoint" / LAST / "manifest.json").read_text())["metadata"]["base"]
    assert base["kind"] == "checkpoint" and base["path"].endswith("in full/iter_0000004")
    config = json.loads((runs.place / "over a checkpoint" / LAST / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base["path"]  # not the model that the full run began with
    assert first_loss(runs, "over a checkpoint") < first_loss(runs, "whole")


def test_mixed_training(runs):
    tensors = adapters(runs, "mixed")
    kinds = {(name.split(".")[0], is_adapter(name)) for name in tensors}
    assert kinds == {("text_decoder", True), ("image_encoder", False)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another rank", r"has other adapters: --lora-r 4, now 8; pass that run's flags"),
        ("another scale", r"has other adapters: --lora-alpha 8, now 4; pass"),
        ("other targets", r"has other adapters: --lora-target-modules all, now attention experts; pass"),
        ("other parts", r"--lora-target-modules all, now all \(the same, of other parts: see freeze and --lora-apply"),
        ("no adapters", r"holds LoRA adapters; continue with that run's --lora flags, or merge them"),
        ("over a run", r"is of a run of full fine-tuning; add --finetune to train adapters over its weights"),
    ],
)
def test_another_run_is_refused(runs, name, message):
    assert runs[name]["status"] == 2 and re.search(message, runs[name]["error"]), runs[name]


def test_peft_loads_every_adapter_directory(runs, recipe):
    """As it is, with the factors of the checkpoint beside it to the bit."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    for checkpoint in (runs.place / "mixed" / LAST, runs.place / "after mixed/iter_0000001"):
        assert checkpoint.is_dir() and not (checkpoint / "adapter").exists()
    for name in ("whole", "expert parallel"):
        base = AutoModelForImageTextToText.from_pretrained(recipe / "checkpoint", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, runs.place / name / LAST / "adapter")
        ours = {key: tensor for key, tensor in adapters(runs, name).items() if is_adapter(key)}
        config = SPEC.read_config(recipe / "checkpoint")
        planned = [a for a in SPEC.adapters(config, OPTIONS) if a.names[0] in ours]
        theirs = factors_of(model, planned)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
