"""The launchers with a recipe: the file alone decides, but for what the environment sets."""

import re

import pytest

from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.training.launch_environment import VARIABLES
from tests.ut.launcher.conftest import ROOT, launch, script, value_of

RECIPE = "examples/qwen3vl/qwen3vl_full_sft_30B.yaml"
# recipe, launcher, ranks
SHIPPED = [
    *[(f"full_sft_{size}", f"finetune_qwen3vl_{size}", ranks) for size, ranks in
      (("8B", 8), ("30B", 8), ("32B", 16), ("235B", 128), ("tiny", 2))],
    ("lora_sft_30B", "finetune_lora_qwen3vl_30B", 8),
]


@pytest.fixture
def unchecked(workplace):
    """The launcher without what its Python checks before torchrun."""
    script(workplace.parent / "bin/python", "exit 0\n")
    return workplace


def flags(result):
    assert result.returncode == 0, result.stderr
    reversed_words = result.words[::-1]  # of all launches so far
    return reversed_words[: reversed_words.index("pretrain_transformers.py")][::-1]


@pytest.mark.parametrize(("recipe", "launcher", "ranks"), SHIPPED)
def test_each_recipe_is_what_launcher_and_files_say(unchecked, monkeypatch, recipe, launcher, ranks):
    monkeypatch.chdir(ROOT)
    words = flags(launch(unchecked, launcher=f"examples/qwen3vl/{launcher}.sh"))
    ours = load_job_config([f"examples/qwen3vl/qwen3vl_{recipe}.yaml"], world_size=ranks)
    theirs = load_job_config(words, world_size=ranks)
    for part in ("data", "model", "fsdp", "tools"):
        assert getattr(ours, part).model_dump() == getattr(theirs, part).model_dump(), part
    named = {"mm_data", "mm_model", "mm_tool", "fsdp2_config_path", "distributed_backend"}
    lora = {"lora_target_modules"}  # with commas or spaces
    assert ours.args.model_dump(exclude=named | lora) == theirs.args.model_dump(exclude=named | lora)
    assert (ours.args.lora_target_modules or "").replace(",", " ") == (theirs.args.lora_target_modules or "")
    assert ours.describe_ignored() == []


def test_only_the_environment_and_flags_override_the_file(unchecked):
    assert flags(launch(unchecked, MM_RECIPE=RECIPE)) == [RECIPE, "--distributed-backend", "nccl"]
    set_outside = {"LR": "2e-5", "EP": 8, "SAVE_PATH": "out dir", "CKPT_ARGS": "--async-save\n", "LOSS_ARGS": "",
                   "LOAD_PATH": ""}
    words = flags(launch(unchecked, RECIPE, "--seed", "7", "gpt_args.lr=1", **set_outside))
    assert words == [
        RECIPE, "--expert-model-parallel-size", "8", "--lr", "2e-5", "--save", "out dir", "--async-save",
        "gpt_args.load=null", "--distributed-backend", "nccl", "--seed", "7", "gpt_args.lr=1",
    ]


def test_epochs_replace_iterations(unchecked):
    words = flags(launch(unchecked, TRAIN_EPOCHS=2))
    assert value_of(words, "--train-epochs") == "2" and "--train-iters" not in words


def test_accumulation_is_the_files(unchecked):
    result = launch(unchecked, MM_RECIPE=RECIPE, GRAD_ACC_STEP=2)
    assert result.returncode == 2 and "gpt_args.global_batch_size=SAMPLES" in result.stderr


def test_every_variable_of_a_flag_has_its_place_in_the_launcher():
    text = (ROOT / "examples/qwen3vl/launch.sh").read_text()
    pairs = dict(re.findall(r"\b([A-Z_0-9]+):(--[a-z0-9-]+)", text))
    assert {flag: name for name, flag in pairs.items()} == {
        flag: name for flag, name in VARIABLES.items() if flag != "--global-batch-size"
    }


def test_the_checks_before_torchrun_read_the_recipe(workplace):
    result = launch(workplace, MM_RECIPE=RECIPE)
    assert flags(result)[0] == RECIPE and not result.stdout
    (workplace / "ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct/config.json").unlink()
    result = launch(workplace, RECIPE)
    assert result.returncode == 2
    assert f"(init_from_hf_path in {RECIPE}, section model) has no config.json" in result.stderr


def test_errors_name_the_recipes_keys_or_the_variables_that_replace_them(workplace):
    words = ["gpt_args.lr_warmup_iters=20000", "gpt_args.lr_warmup_fraction=null"]
    result = launch(workplace, RECIPE, *words)
    assert result.returncode == 2 and f"({RECIPE}: gpt_args.lr_warmup_iters sets --lr-warmup-iters" in result.stderr
    assert f"{RECIPE}: gpt_args.train_iters sets --train-iters" in result.stderr and "TRAIN_ITERS" not in result.stderr
    result = launch(workplace, RECIPE, *words, TRAIN_ITERS=500)
    assert result.returncode == 2 and "TRAIN_ITERS sets --train-iters" in result.stderr
    assert "gpt_args.train_iters" not in result.stderr
