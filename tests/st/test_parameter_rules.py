"""Two ranks: frozen parameters in bf16 and partial checkpoints change no bit of a run, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from tests.helpers.resumed_runs import LAST, Runs, assert_same_run
from tests.helpers.tiny_recipe import write_recipe
from tests.st.test_recipe import stored

pytestmark = pytest.mark.st

FREEZE = ["model.language_model.layers.0", "*.experts.*", "lm_head.weight"]
PLAN = [{"match": "*.norm.*", "scale": 0.5}]


def write_bf16_recipe(place: Path) -> Path:
    """The tiny recipe with published weights' dtype; vision encoder, a layer, experts and head are frozen."""
    recipe = write_recipe(place)
    for path in (recipe / "checkpoint").glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    model = json.loads((recipe / "model_tiny.json").read_text())
    model["image_encoder"]["vision_encoder"]["freeze"] = True
    model |= {"freeze": FREEZE, "lr_scaling_plan": PLAN}
    (recipe / "model_tiny.json").write_text(json.dumps(model))
    (recipe / "fsdp2.yaml").write_text("param_dtype: bf16\n")
    return recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    recipe = write_bf16_recipe(tmp_path_factory.mktemp("bf16 recipe"))
    runs = Runs(recipe, tmp_path_factory.mktemp("runs"), processes=2)
    options = {"projector_lr": 1e-3}
    bf16 = {**options, "frozen_param_dtype": "bf16"}
    runs.add("fp32", **options)
    runs.add("bf16", **bf16)
    runs.add_stopped("bf16 resumed", [3], **bf16)
    runs.add("first half", exit_interval=4, **options)
    runs.add("bf16 from fp32's first half", load="first half", **bf16)
    runs.add_stopped("partial", [3, 6], save_trainable_only=True, **options)
    runs.add("over a checkpoint", load="first half", save_trainable_only=True, exit_interval=6, **bf16)
    runs.add("rest over a checkpoint", load="over a checkpoint", save_trainable_only=True, **bf16)
    return runs.go()


def assets(runs: Runs) -> Path:
    """The Hugging Face directory of the recipe, which is the base of the first partial checkpoints."""
    manifest = json.loads((runs.place / "partial" / LAST / "manifest.json").read_text())
    return Path(manifest["metadata"]["base"]["path"])


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name].to(tensor.dtype)) for name, tensor in ours.items())


def test_frozen_parameters_in_bf16_change_no_bit(runs):
    assert runs.steps("bf16") == runs.steps("fp32")
    ours, theirs = stored(runs.place / "bf16" / LAST), stored(runs.place / "fp32" / LAST)
    assert ours.keys() == theirs.keys() and same(ours, theirs)
    frozen = {name for name, tensor in ours.items() if tensor.dtype == torch.bfloat16}
    assert {name.split(".")[1] for name in frozen} == {"image_encoder", "text_decoder"}
    assert not {f"optimizer.{name.removeprefix('model.')}.exp_avg" for name in frozen} & ours.keys()


def test_frozen_parameters_in_bf16_resume_to_the_bit(runs):
    assert_same_run(runs.steps("fp32"), runs.parts("bf16 resumed"))
    assert same(stored(runs.place / "bf16 resumed" / LAST), stored(runs.place / "fp32" / LAST))
    rest = runs.steps("bf16 from fp32's first half")
    assert rest and all(rest[step] == runs.steps("fp32")[step] for step in rest)


def test_partial_checkpoints_resume_to_the_bit(runs):
    assert_same_run(runs.steps("fp32"), runs.parts("partial"))
    ours, theirs = stored(runs.place / "partial" / LAST), stored(runs.place / "fp32" / LAST)
    assert same(ours, theirs)
    missing = theirs.keys() - ours.keys()
    trained = {name for name in theirs if f"optimizer.{name.removeprefix('model.')}.exp_avg" in theirs}
    assert missing == {name for name in theirs if name.startswith("model.")} - trained and missing


def test_partial_checkpoints_over_a_training_checkpoint(runs):
    """Whose frozen parameters are in fp32, while the run keeps them in bf16."""
    manifest = json.loads((runs.place / "rest over a checkpoint" / LAST / "manifest.json").read_text())
    assert manifest["metadata"]["base"]["path"] == str(runs.place / "first half/iter_0000004")
    for name in ("over a checkpoint", "rest over a checkpoint"):
        rest = runs.steps(name)
        assert rest and all(rest[step] == runs.steps("fp32")[step] for step in rest)


@pytest.mark.parametrize("name", ["partial", "rest over a checkpoint"])
def test_partial_checkpoints_export_like_whole_ones(runs, tmp_path, name):
    """Over a Hugging Face directory and over a training checkpoint."""
    exported = {}
    for save in ("fp32", name):
        dcp_to_hf(runs.place / save, tmp_path / save, assets(runs), dtype="fp32")
        exported[save] = load_file(tmp_path / save / "model.safetensors")
    assert exported[name].keys() == exported["fp32"].keys() and same(exported[name], exported["fp32"])
