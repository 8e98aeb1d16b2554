"""LoRA by the launchers' variables, with a stand-in for torchrun."""

import pytest

from tests.helpers.published import DIRECTORIES
from tests.ut.launcher.conftest import free_port, launch, value_of, write_model

LORA_LAUNCHER = "examples/qwen3vl/finetune_lora_qwen3vl_30B.sh"


def lora_flags(words):
    """Words of the LoRA flags, with their values."""
    first = next((place for place, word in enumerate(words) if word.startswith("--lora")), len(words))
    end = next((place for place in range(first, len(words)) if words[place].startswith("--")
                and not words[place].startswith("--lora")), len(words))
    return words[first:end]


def test_defaults_of_the_lora_launcher(workplace):
    result = launch(workplace, launcher=LORA_LAUNCHER)
    assert result.returncode == 0, result.stderr
    assert lora_flags(result.words) == [
        "--lora-target-modules", "attention experts", "--lora-r", "16", "--lora-alpha", "32",
    ]
    expected = {
        "--nproc_per_node": "8", "--lr": "1.0e-4", "--save": "save_dir_lora", "--save-interval": "1000",
        "--load": f"ckpt/dcp_path/{DIRECTORIES['30B']}-dcp", "--mm-model": "./examples/qwen3vl/model_30B.json",
    }
    assert {flag: value_of(result.words, flag) for flag in expected} == expected
    assert not {"--no-save-optim", "--no-save-rng", "--recompute-granularity"} & set(result.words)


def test_one_device_recomputes_unless_told_otherwise(workplace):
    result = launch(workplace, launcher=LORA_LAUNCHER, NPUS_PER_NODE=1)
    assert value_of(result.words, "--recompute-granularity") == "full"
    result = launch(workplace, launcher=LORA_LAUNCHER, NPUS_PER_NODE=1, RECOMPUTE_ARGS="")
    assert result.returncode == 0, result.stderr
    assert value_of(result.words, "--nproc_per_node") == "1"  # of the second start alone: the first one's words stay
    assert result.words.count("--recompute-granularity") == 1


def test_variables_and_further_flags(workplace):
    result = launch(
        workplace, "--lora-use-rslora", launcher=LORA_LAUNCHER, LORA_TARGETS="q_proj,*.self_attn.o_proj  experts",
        LORA_R=8, LORA_ALPHA=16, LORA_EXPERT_R=4, LR="2e-4",
    )
    assert result.returncode == 0, result.stderr
    assert lora_flags(result.words) == [
        "--lora-target-modules", "q_proj,*.self_attn.o_proj  experts", "--lora-r", "8", "--lora-alpha", "16",
        "--lora-expert-r", "4",
    ]
    assert "--lora-use-rslora" in result.words and value_of(result.words, "--lr") == "2e-4"


def test_targets_make_any_launcher_one_of_lora(workplace):
    write_model(workplace, "8B")
    result = launch(
        workplace, launcher="examples/qwen3vl/finetune_qwen3vl_8B.sh", LORA_TARGETS="attention mlp", LORA_R=16,
        MASTER_PORT=free_port(),
    )
    assert result.returncode == 0, result.stderr
    assert lora_flags(result.words) == ["--lora-target-modules", "attention mlp", "--lora-r", "16"]
    assert value_of(result.words, "--lr") == "1.0e-4" and "--no-save-optim" not in result.words


def test_full_fine_tuning_has_no_lora_flags(workplace):
    assert lora_flags(launch(workplace).words) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LORA_R": "16"}, "--lora-r has no effect without LoRA"),
        ({"LORA_TARGETS": "vision"}, "set that part's freeze to false"),
        ({"LORA_TARGETS": "gate_proj"}, "use the word experts"),
        ({"LORA_TARGETS": "attention", "LORA_R": "0"}, "LORA_R sets --lora-r"),
        ({"LORA_TARGETS": "attention", "CKPT_ARGS": "--lora-dropout 0.1"}, "PEFT has no dropout on experts"),
    ],
)
def test_mistake_is_one_line_before_torchrun(workplace, variables, message):
    result = launch(workplace, **variables)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and not result.words
    assert len(lines) == 1 and message in lines[0], result.stderr


def test_a_similar_variable_is_warned_of(workplace):
    result = launch(workplace, launcher=LORA_LAUNCHER, LORA_RANK=64)
    assert "LORA_RANK is set but not read; did you mean LORA_R?" in result.stderr
