"""Flags: values, ranges, help, and the rules among them."""

import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

from mindspeed_mm.config.checks import ModelFacts, check_flags, check_model, check_parallel
from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.flags import SECTIONS, TrainingArgs
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.config.schema import EFFECTIVE, role_of
from mindspeed_mm.errors import UserError

BASE = "--mm-data d --mm-model m --seq-length 1024 --train-iters 10000 --lr 1e-5 --use-torch-fsdp2".split()

# The flags of the published launcher, as a user pastes them.
RECIPE = """
    --use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1
    --context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 8 --tokenizer-type NullTokenizer
    --vocab-size 152064 --seq-length 1024 --make-vocab-size-divisible-by 1 --normalization RMSNorm --use-fused-rmsnorm
    --swiglu --use-fused-swiglu --no-masked-softmax-fusion --lr 1.0e-5 --lr-decay-style cosine --weight-decay 0
    --train-iters 10000 --lr-warmup-fraction 0.1 --clip-grad 0.0 --adam-beta1 0.9 --adam-beta2 0.999
    --no-gradient-accumulation-fusion --seed 42 --load ckpt --use-flash-attn --no-load-optim --no-load-rng
    --no-save-optim --no-save-rng --num-workers 8 --use-torch-fsdp2 --untie-embeddings-and-output-weights
    --ckpt-format torch_dcp --fsdp2-config-path f.yaml --optimizer-selection fused_torch_adamw
    --use-cpu-initialization --calculate-per-token-loss --init-model-with-meta-device --log-tps
    --mm-data d --mm-model m --mm-tool t --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 5000
    --save save_dir --distributed-backend nccl
""".split()


def _parse(words):
    args = parse_args(BASE + words.split())
    check_flags(args)
    return args


def _check_model(words, *, world_size=1, sharding_size="auto", **facts):
    facts = {"attention_heads": {"text": (32, 4), "vision": (16, 16)}, "num_experts": 128, **facts}
    model = ModelOptions(model_id="qwen3_vl_moe", init_from_hf_path="hf")
    fsdp = FSDPConfig(sharding_size=sharding_size)
    args = _parse(f"{words} --fsdp2-config-path f.yaml")
    check_model(args, fsdp, model, ModelFacts(model_type="qwen3_vl_moe", **facts), world_size=world_size)


def test_every_flag_of_the_recipe_is_taken():
    args = parse_args(RECIPE)
    check_flags(args)
    assert check_parallel(args, FSDPConfig(), world_size=8) == 8
    assert (args.lr, args.seed, args.save, args.calculate_per_token_loss) == (1e-5, 42, "save_dir", True)
    assert args.warmup_samples == 8000.0 and args.decay_samples == 80000


@pytest.mark.parametrize("name", TrainingArgs.model_fields)
def test_each_flag_has_one_role_and_says_what_it_does(name):
    info = TrainingArgs.model_fields[name]
    assert role_of(info) and info.description
    assert sum(name in section.model_fields for section in SECTIONS) == 1, "--help shows it once"


def test_effective_flags_are_read_somewhere():
    """A flag that no code reads would be ignored in silence."""
    package = Path(__file__).resolve().parents[3] / "mindspeed_mm"
    sources = [path for path in package.rglob("*.py") if path.name != "flags.py"]
    sources += [package.parent / "pretrain_transformers.py"]
    text = "\n".join(path.read_text() for path in sources if path.exists())
    if "load_job_config(" not in text.replace("def load_job_config(", ""):
        pytest.skip("there is no entry point that could read them")
    # read through properties of TrainingArgs, or through one flag that stands for a group of them
    derived = {"lr_decay_iters", "lr_warmup_fraction", "lr_warmup_iters"}
    unread = [
        name
        for name, info in TrainingArgs.model_fields.items()
        if role_of(info) == EFFECTIVE and name not in derived
        and len(typing.get_args(info.annotation)) != 1  # a flag with one choice is held to it
        and not re.search(rf"\b{name}\b", text)
    ]
    assert unread == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr -1", "--lr is -1; it must be greater than 0"),
        ("--lr -1e-5", "--lr is -1e-5; it must be greater than 0"),
        ("--lr nan", "--lr is nan; it must be a finite number"),
        ("--lr fast", "--lr is fast; it must be a number"),
        ("--adam-beta1 1.5", "--adam-beta1 is 1.5; it must be at least 0 and less than 1"),
        ("--lr-warmup-fraction 2", "--lr-warmup-fraction is 2; it must be at least 0 and less than 1"),
        ("--micro-batch-size 0", "--micro-batch-size is 0; it must be at least 1"),
        ("--train-iters 0", "--train-iters is 0; it must be at least 1"),
        ("--train-iters 1.5", "--train-iters is 1.5; it must be a whole number"),
        ("--clip-grad=-1", "--clip-grad is -1; it must be at least 0"),
        ("--lr-decay-style wsd", "--lr-decay-style is wsd; choose cosine, linear, constant, inverse-square-root"),
        ("--micro-batch-sise 3", "unknown flag --micro-batch-sise; did you mean --micro-batch-size?"),
        ("--use_flash_attn", "unknown flag --use_flash_attn; did you mean --use-flash-attn?"),
        ("--bf16", "unknown flag --bf16: the compute type is param_dtype in the --fsdp2-config-path file"),
        ("--zzz", "unknown flag --zzz; --help lists all flags"),
        ("stray", "unexpected word 'stray'; every value follows its flag"),
        ("--lr", "--lr needs a value"),
        ("--save=", "--save is empty; give it a value or leave it out"),
        ("--seed 18446744073709551616", "--seed is 18446744073709551616; it must be at least 0 and less than 1844"),
        ("--log-tps=1", "--log-tps takes no value, but was given '1'"),
        ("--min-lr 1", "--min-lr 1.0 exceeds --lr 1e-05; lower it"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "exclude each other"),
        ("--lr-warmup-iters 10000", "must be less than the 10000 steps of the decay"),
        ("--save-interval 5", "--save-interval 5 has nowhere to save to; add --save DIR"),
        ("--async-save", "--async-save has no effect without --save; add --save DIR"),
        ("--save d --keep-every 100", "--keep-every 100 has no effect without --keep-last; add --keep-last N"),
        ("--keep-best 2", "--keep-best has no effect without --save; add --save DIR"),
        ("--keep-best -1", "--keep-best"),
        ("--early-stopping-patience 0", "--early-stopping-patience"),
        ("--early-stopping-threshold nan", "--early-stopping-threshold"),
        ("--save-trainable-only", "--save-trainable-only has no effect without --save; add --save DIR"),
        ("--save d --save-trainable-only --random-init", "needs loaded weights as a base"),
        ("--load-base d", "--load-base d is the base of what --load names; add --load DIR"),
        ("--check-load some", "--check-load is some; choose read, all, sizes or none"),
        ("--expert-layout v6", "--expert-layout is v6; choose auto, hub or v5"),
        ("--tensor-model-parallel-size 2", "use --expert-model-parallel-size"),
        ("--pipeline-model-parallel-size 4", "--pipeline-model-parallel-size 4 is not supported"),
        ("--calculate-per-token-loss --calculate-per-sample-loss", "exclude each other"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises(UserError) as caught:
        _parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--train-iters {10**30}", "--train-iters is 1000000000000000000000000000000; it must be at most"),
        ("--num-workers 100000", "--num-workers is 100000; .* at most 1024"),
        ("--save=", "--save is empty"), ("--lr 1e400", "--lr is 1e400; it must be a finite number"),
        ("--micro-batch-size 9223372036854775808", "--micro-batch-size is 9223372036854775808; it must be at most 10"),
        ("--distributed-timeout-minutes 10000000000", "at least 1 and at most 1000000$"),
        ("--heartbeat-timeout 1e300", "--heartbeat-timeout is 1e300; it must be at least 0 and at most 1000000000"),
        (f"--seed {'9' * 5000}", r"--seed is 9+\.\.\.\(5000 characters\)\.\.\.9+; it must be a whole number"),
        (f"--{'x' * 5000} 1", r"unknown flag --x+\.\.\.\(5002 characters\)\.\.\.x+; --help"),
    ],
)
def test_values_out_of_all_bounds(words, message):
    with pytest.raises(UserError, match=message):
        _parse(words)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--save is empty; give it a value or leave it out"), (" ", "--save is empty"),
        ("a\nb", r"--save is 'a\\nb', with a line break"), ("a\0b", r"--save is 'a\\x00b', with"),
        ("a\udcffb", r"--save is 'a\\udcffb', with .* not UTF-8; remove it"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_paths_that_cannot_be_meant(value, message, joined):
    with pytest.raises(UserError, match=message):
        parse_args([*BASE, *([f"--save={value}"] if joined else ["--save", value])])


def test_largest_values():
    assert _parse(f"--seed {2**64 - 1} --train-iters {10**12}").seed == 2**64 - 1


def test_only_what_is_near_is_suggested():
    with pytest.raises(UserError) as caught:
        _parse("--timing-log-level x")
    assert "did you mean" not in str(caught.value) and "--help" in str(caught.value)
    with pytest.raises(UserError, match="unknown flag --num-layers; --help"):  # not --num-workers
        _parse("--num-layers 3")
    with pytest.raises(UserError, match="did you mean --save-interval"):
        _parse("--save-intervall 3")


def test_missing_flags_are_named_together():
    with pytest.raises(UserError, match="required and not given: --mm-data, --mm-model, --seq-length, --train-iters"):
        parse_args([])
    with pytest.raises(UserError, match="--use-torch-fsdp2 is missing"):
        check_flags(parse_args(BASE[:-1]))


def test_the_last_of_two_equal_flags_holds():
    assert _parse("--seed 1 --seed 2").seed == 2


def test_schedule_in_samples():
    args = _parse("--global-batch-size 16 --lr-decay-iters 100 --lr-warmup-fraction 0.125")
    assert (args.warmup_samples, args.decay_samples) == (200.0, 1600)
    assert _parse("--global-batch-size 16 --lr-warmup-iters 3").warmup_samples == 48.0


def test_global_batch_size():
    assert check_parallel(_parse("--micro-batch-size 2 --global-batch-size 24"), FSDPConfig(), world_size=4) == 24
    assert check_parallel(_parse("--micro-batch-size 3"), FSDPConfig(), world_size=4) == 12
    assert check_parallel(_parse("--context-parallel-size 2"), FSDPConfig(), world_size=4) == 2


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ("--micro-batch-size 2 --global-batch-size 10", 4,
         "global_batch_size 10 is not a multiple of micro_batch_size 2 x data-parallel size 4 = 8; choose 8 or 16"),
        ("--global-batch-size 3", 4, "choose 4"),
    ],
)
def test_sizes_that_do_not_divide(words, world_size, message):
    with pytest.raises(UserError) as caught:
        check_parallel(_parse(words), FSDPConfig(), world_size=world_size)
    assert message in str(caught.value)


def test_degrees_that_do_not_fit_the_model():
    _check_model("--context-parallel-size 8 --expert-model-parallel-size 4", world_size=8)


WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 48}
HEADS = {"text": (24, 4), "vision": (24, 24)}


@pytest.mark.parametrize(
    ("words", "facts", "message", "possible"),
    [
        ("--expert-model-parallel-size 3", {"world_size": 8}, "3 does not divide the number of ranks 8", [1, 2, 4, 8]),
        # sizes that divide one of two numbers alone are not offered
        ("--expert-model-parallel-size 16", {"world_size": 24}, "16 does not divide the number of ranks 24",
         [1, 2, 4, 8]),
        ("--expert-model-parallel-size 3", {"world_size": 24}, "3 does not divide num_experts 128", [1, 2, 4, 8]),
        ("--expert-model-parallel-size 8", {"world_size": 16, "sharding_size": 4},
         "8 does not divide sharding_size of f.yaml, 4", [1, 2, 4]),
        ("--expert-model-parallel-size 2", {"world_size": 64, "expert_widths": WIDTHS},
         "2 would cut each expert into 32 parts, which do not divide moe_intermediate_size 48",
         [1, 4, 8, 16, 32, 64]),
        ("--expert-model-parallel-size 2", {"world_size": 2, "num_experts": 0},
         "2 needs experts, and this model has none", [1]),
        ("--context-parallel-size 3", {"world_size": 24}, "3 does not divide the text attention heads 32",
         [1, 2, 4, 8]),
        ("--context-parallel-size 5", {"world_size": 8}, "5 does not divide the number of ranks 8", [1, 2, 4, 8]),
        ("--context-parallel-size 32", {"world_size": 64}, "32 does not divide the vision attention heads 16",
         [1, 2, 4, 8, 16]),
        ("--context-parallel-size 6", {"world_size": 24, "attention_heads": HEADS},
         "6 neither divides the 4 key/value heads nor is a multiple of them", [1, 2, 4, 8, 12, 24]),
    ],
)
def test_every_size_that_a_message_offers_passes(words, facts, message, possible):
    with pytest.raises(UserError) as caught:
        _check_model(words, **facts)
    assert message in str(caught.value)
    remedy = str(caught.value).rpartition("; ")[2]
    assert remedy == (f"choose one of {', '.join(map(str, possible))}" if len(possible) > 1 else "set it to 1")
    flag = words.split()[0]
    for size in range(1, facts["world_size"] + 1):
        if size in possible:
            _check_model(f"{flag} {size}", **facts)
        else:
            with pytest.raises(UserError, match=f"{size} "):
                _check_model(f"{flag} {size}", **facts)


def test_experts_are_cut_by_the_ranks_of_one_copy():
    _check_model("--expert-model-parallel-size 2", world_size=32, expert_widths=WIDTHS)
    _check_model("--expert-model-parallel-size 2", world_size=64, expert_widths=WIDTHS, sharding_size=32)


def test_sharding_size():
    args = _parse("--expert-model-parallel-size 4 --fsdp2-config-path f.yaml")
    for size in ("auto", 4):
        check_parallel(args, FSDPConfig(sharding_size=size), world_size=8)
    with pytest.raises(UserError, match="f.yaml: sharding_size 3 does not divide the number of ranks 8; set it to "
                       "auto, or choose one of 1, 2, 4, 8"):
        check_parallel(args, FSDPConfig(sharding_size=3), world_size=8)


def test_help_is_fast_and_imports_no_torch():
    script = (
        "import sys\nfrom mindspeed_mm.config.command_line import parse_args\n"
        "try: parse_args(['--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    elapsed = time.perf_counter() - started
    assert result.returncode == 0, result.stderr
    assert elapsed < 2, f"{elapsed:.2f} s"  # 0.3 s where nothing else runs
    for title in ("Optimizer, learning rate and loss:", "Checkpoints:", "Accepted without effect"):
        assert title in result.stdout


def test_loading_a_recipe_imports_no_torch():
    script = "import sys\nimport mindspeed_mm.config.job\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
