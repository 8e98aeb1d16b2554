"""The memory estimate: its list of parameters, its command, and what it says of the published model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.models.parameter_rules import apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.tools.memory.__main__ import main, read_run
from mindspeed_mm.tools.memory.advice import Device
from mindspeed_mm.tools.memory.communication import volumes
from mindspeed_mm.tools.memory.estimate import estimate
from mindspeed_mm.tools.memory.plan import checkpoint_bytes, units_of
from mindspeed_mm.tools.memory.report import GIB, verdict
from tests.helpers.mcore_model import PIXEL_NORM, part_settings
from tests.helpers.published import config_30b, published_config
from tests.helpers.tiny_config import tiny_config

DEVICE = Device(size=64 * GIB, reserve=4 * GIB)


VISION = ("vision_encoder", "vision_projector")


def published(processes: int, **changes) -> Plan:
    """The recipe for 30B: an image of 1024 patches in a sample of 1024 tokens."""
    return Plan(
        model_config=Qwen3VLConfig.from_config(config_30b()), world_size=processes, sharding_size=processes,
        **{"tokens": 1024, "patches": 1024, "target_tokens": 768, "frozen": VISION, **changes},
    )  # fmt: skip


def dense(model_config: Qwen3VLConfig, *, tied: bool) -> Qwen3VLConfig:
    text = dataclasses.replace(model_config.text, num_experts=0, tie_word_embeddings=tied)
    return dataclasses.replace(model_config, model_type="qwen3_vl", text=text)


@pytest.mark.parametrize("kind", ["moe", "dense", "tied", "published"])
@pytest.mark.parametrize("aligned", [False, True])
def test_parameters_are_the_models(kind, aligned):
    model_config = tiny_config() if kind != "published" else Qwen3VLConfig.from_config(config_30b())
    model_config = dense(model_config, tied=kind == "tied") if kind in ("dense", "tied") else model_config
    with torch.device("meta"):
        model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    apply_settings(model, part_settings(model_config, ["vision_encoder"]))
    plan = dataclasses.replace(
        published(1), model_config=model_config, frozen=VISION[:1], align_fsdp_param_groups=aligned
    )
    listed = [parameter for unit in units_of(plan) for parameter in unit.parameters]
    theirs = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    assert {p.name: (p.shape, p.trains) for p in listed} == theirs
    assert len(listed) == len(theirs)


def test_published_model_has_31_billion_parameters():
    assert sum(unit.shard() for unit in units_of(published(1))) == 31_070_754_032


def test_shards_are_padded_as_fsdp2_does():
    embedding = next(unit for unit in units_of(published(7)) if unit.kind == "embedding")
    assert embedding.shard() == -(-151936 // 7) * 2048
    spread = next(unit for unit in units_of(published(16, expert_size=8)) if unit.kind == "experts")
    # 16 of 128 experts, cut along the second axis between two processes
    assert spread.shard() == 16 * (1024 * 1536 + 384 * 2048)


def test_eight_devices_of_64_gib_do_not_hold_30b_and_16_do():
    eight, sixteen = estimate(published(8)), estimate(published(16))
    assert eight.parameters + eight.gradients + eight.optimizer > 57 * GIB
    assert not DEVICE.fits(eight) and "does not fit" in verdict(eight, DEVICE)
    assert DEVICE.fits(sixteen) and "fits, " in verdict(sixteen, DEVICE)
    offloaded = estimate(published(8, offload_to_cpu=True))
    assert DEVICE.fits(offloaded) and offloaded.host > 57 * GIB


@pytest.mark.parametrize(
    ("change", "smaller"),
    [
        ({"recompute_granularity": "full"}, True),
        ({"recompute_granularity": "selective"}, True),
        ({"tokens": 2048, "target_tokens": 1500}, False),
        ({"compute_bytes": 4}, False),
        ({"frozen": VISION[1:]}, False),
        ({"expert_size": 8}, True),
        ({"context_size": 2}, True),
        ({"activation_offload": True}, True),
        ({"frozen": ["vision_encoder", "text_decoder"]}, True),
        ({"micro_batches": 2}, False),
        ({"reshard_after_forward": False}, False),
    ],
)
def test_each_choice_moves_the_estimate_the_right_way(change, smaller):
    before, after = (estimate(published(16, **more)).peak.total for more in ({}, change))
    assert (after < before) is smaller


def test_frozen_parameters_in_bf16_save_half_of_their_bytes():
    one, two = (estimate(published(8, frozen_param_bytes=size)) for size in (4, 2))
    frozen = sum(unit.shard() - unit.shard(training_only=True) for unit in units_of(published(8)))
    assert one.parameters - two.parameters == 2 * frozen > 0 and one.gradients == two.gradients
    single = (estimate(published(1, frozen_param_bytes=size)) for size in (4, 2))  # with copies in the compute type
    one, two = (result.peak.amounts for result in single)
    whole = sum(unit.gathered() - unit.gathered(training_only=True) for unit in units_of(published(1)))
    assert (one["parameters"] - two["parameters"], one["gathered"] - two["gathered"]) == (2 * whole, 2 * whole)


@pytest.mark.parametrize(("dtype", "nbytes"), [("fp32", 8), ("bf16", 4), ("int8", 2 * (1 + 4 / 256))])
def test_moments_by_hand(dtype, nbytes):
    """All but a thousandth of the parameters are matrices; vectors, and what has no whole blocks, keep fp32."""
    plan = published(8, optimizer_state=OptimizerStateLayout(dtype))
    result = estimate(plan)
    trained = result.gradients / 4
    assert result.optimizer == pytest.approx(nbytes * trained, rel=2e-3 if dtype != "fp32" else 1e-6)
    assert result.optimizer == result.peak.amounts["optimizer"]
    by_hand = 0
    for unit in units_of(plan):
        for parameter in unit.parameters:
            is_fp32 = len(parameter.shape) < 2 or (dtype == "int8" and parameter.shape[-1] % 256)
            by_hand += parameter.trains * unit._part(parameter.shape) * (8 if is_fp32 else nbytes)
    assert result.optimizer == pytest.approx(by_hand, rel=1e-6)
    offloaded = estimate(dataclasses.replace(plan, offload_to_cpu=True))
    assert offloaded.host == result.parameters + result.gradients + result.optimizer
    whole = dataclasses.replace(plan, world_size=1, sharding_size=1)
    moments = checkpoint_bytes(whole, moments=True) - checkpoint_bytes(whole, moments=False)
    assert moments == pytest.approx(8 * result.optimizer, rel=1e-3)


def test_chunks_bound_the_logits():
    long = {"tokens": 16384, "target_tokens": 16000}
    whole, chunked = (
        estimate(dataclasses.replace(published(16, recompute_granularity="full", loss_chunk_size=chunk), **long)).peak
        for chunk in (None, 1024)
    )
    # 16,000 fp32 logits of 151,936 entries and a temporary of that size
    assert whole.when == "forward, loss head" and whole.amounts["head"] > 16000 * 151936 * 8
    assert chunked.total < whole.total - 5 * GIB


def test_volumes_by_hand():
    plan = published(8, expert_size=8, recompute_granularity="full")
    # rows x width x 2 bytes x 7/8 from others, there and back, in forward, forward again and backward of 48 layers
    assert volumes(plan)["expert_all_to_all"] == 1024 * 8 * 2048 * 2 * 7 // 8 * 2 * 3 * 48
    gradients = sum(unit.gathered(training_only=True) for unit in units_of(published(8)))
    assert volumes(published(8))["reduce_scatter"] == gradients * 4 * 7 // 8
    copies = volumes(dataclasses.replace(published(16), sharding_size=8))
    assert copies["all_reduce"] == gradients // 8 * 4
    assert volumes(published(8, micro_batches=3)) == {k: 3 * v for k, v in volumes(published(8)).items()}


@pytest.fixture
def files(tmp_path):
    """A model file whose directory holds nothing but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config_30b()))
    model = {"model_id": "qwen3_vl_moe", "init_from_hf_path": str(tmp_path)}
    (tmp_path / "model.json").write_text(json.dumps(model))
    return tmp_path


def test_command_takes_the_launchers_flags(files, capsys):
    flags = ["--mm-model", str(files / "model.json"), "--micro-batch-size", "2", "--seq-length", "512", "--lr", "1e-5",
             "--global-batch-size", "64", "--expert-model-parallel-size", "4", "--log-tps", "--use-torch-fsdp2"]
    run, device, _ = read_run(["--nproc", "16", *flags])
    plan = run.plan
    assert (plan.tokens, plan.patches, plan.target_tokens) == (1024, 2048, 512)
    assert (plan.micro_batches, plan.expert_size, plan.sharding_size) == (2, 4, 16)
    assert device == DEVICE
    assert main(["--nproc", "16", *flags]) == 0
    text = capsys.readouterr().out
    assert "31.07 B parameters, 30.53 B of them trained" in text and "fits, " in text
    assert "all-to-all of tokens" in text and "with one change" in text


def test_report_names_the_moments(files, capsys):
    assert main(["--nproc", "8", "--mm-model", str(files / "model.json"), "--moment-dtype", "int8"]) == 0
    assert "AdamW's two moments, int8, this rank's shards" in capsys.readouterr().out


def test_either_spelling_of_a_value_and_the_former_name_of_an_option(files):
    start = ["--nproc", "16", "--mm-model", str(files / "model.json")]
    apart, joined = ([*start, *words] for words in (["--seq-length", "512"], ["--seq-length=512"]))
    assert read_run(apart)[0].plan == read_run(joined)[0].plan and read_run(joined)[0].plan.tokens == 512
    assert read_run(start)[0].plan.tokens == 1024
    for option in ("--target-tokens", "--supervised"):
        assert read_run([*joined, option, "5"])[0].plan.target_tokens == 5


@pytest.mark.parametrize("expert_size", [1, 8])
def test_freeze_list_of_the_model_file(files, expert_size):
    path = files / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "freeze": ["*.mlp.experts.*"]}))
    run, *_ = read_run(["--nproc", "8", "--mm-model", str(path), "--expert-model-parallel-size", str(expert_size)])
    plan = run.plan
    units = units_of(dataclasses.replace(plan, world_size=1, sharding_size=1, expert_size=1))
    experts = 48 * 128 * 3 * 2048 * 768
    whole, trained = (sum(unit.shard(training_only=only) for unit in units) for only in (False, True))
    assert whole - trained == experts + 538_631_408  # and vision, which is frozen by default
    units = {unit.name: unit for unit in units_of(plan)}
    assert all(unit.experts is units[unit.experts.name] for unit in units.values() if unit.experts is not None)
    assert estimate(plan).peak.total < estimate(dataclasses.replace(plan, frozen_names=())).peak.total / 2


def test_json(files, capsys):
    words = ["--nproc", "8", "--mm-model", str(files / "model.json"), "--json", "--memory-gb", "32", "--tokens", "600"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False and report["received"]["all_gather"] > 0
    assert report["peak"]["total"] == sum(v for k, v in report["peak"].items() if k not in ("when", "total"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mm-model", "m"], "--nproc"),
        (["--nproc", "0", "--mm-model", "m"], "--nproc 0 is out of range"),
        (["--nproc", "1", "--mm-model", "m", "--reserve-gb", "nan"], "--reserve-gb nan is out of range"),
        (["--nproc", "1", "--mm-model", "m", "--tokens", "9" * 20], "is out of range"),
        (["--nproc", "8"], "--mm-model"),
        (["--nproc", "24", "--mm-model", "MODEL", "--expert-model-parallel-size", "3"],
         "3 does not divide num_experts 128; set it to 1\n"),
        (["--nproc", "8", "--mm-model", "MODEL", "--hf-config", "nowhere"],
         "nowhere/config.json does not exist; download the model's config.json, without the weights"),
        (["--nproc", "8", "--mm-model", "MODEL", "--vision-lr", "1"], "--vision-lr 1.0: "),
        (["--nproc", "8", "--mm-model", "MODEL", "--tokns", "5"], "--tokns"),
        (["--nproc", "8", "--mm-model", "MODEL", "--memory-gb", "-1"], "--memory-gb"),
    ],
)
def test_mistakes_are_one_line(files, capsys, words, message):
    assert main([str(files / "model.json") if word == "MODEL" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1", "3", "1.5", "1e308", "-1e-320", "9" * 30, "-" + "9" * 30, "9" * 5000,
           "0x10", "1_0", "\u0663", "\u00bd", "true"]  # fmt: skip
TEXTS = ["", " ", "\0", "a\nb", "\udcff", "x" * 5000, "--nproc"]
PATHS = ["fifo", "binary", "empty", "directory", "loop", "null", "holds a fifo", "holds bytes", "holds a directory"]
OPTIONS = ("--nproc", "--memory-gb", "--reserve-gb", "--tokens", "--patches", "--target-tokens", "--imbalance",
           "--kernels", "--hf-config", "--mm-model", "--mm-data", "--fsdp2-config-path", "--seq-length",
           "--micro-batch-size", "--global-batch-size", "--expert-model-parallel-size", "--context-parallel-size",
           "--recompute-granularity", "--recompute-num-layers")  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_any_value_is_an_answer_or_one_line(tmp_path, capsys, option):
    config = json.dumps(published_config("30B", layers=2, blocks=2))
    (tmp_path / "config.json").write_text(config)
    model = {"model_id": "qwen3_vl_moe", "init_from_hf_path": str(tmp_path)}
    (tmp_path / "model.json").write_text(json.dumps(model))
    for name in ("directory", "holds a fifo", "holds bytes", "holds a directory/config.json"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("fifo", "holds a fifo/config.json"):
        os.mkfifo(tmp_path / name)
    for name in ("binary", "holds bytes/config.json"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to(os.devnull)
    wrong = 0
    for value in (*NUMBERS, *TEXTS, *(str(tmp_path / name) for name in PATHS)):
        for given in ([option, value], [f"{option}={value}"]):
            status = main(["--nproc", "8", "--mm-model", str(tmp_path / "model.json"), *given])
            out, error = capsys.readouterr()
            assert (status, out, error) in ((0, out, ""), (2, "", error)), given
            if status:
                wrong += 1
                assert error.startswith("error: ") and error[:-1].isprintable() and len(error) < 700, given
            else:
                assert "with one change" in out and not re.search(r"\b(nan|inf)\b", out), given
    assert wrong > len(TEXTS) + len(PATHS)


def test_it_needs_no_torch():
    script = "import sys\nimport mindspeed_mm.tools.memory.__main__\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("words", ["--help", "--nproc 8 --mm-model MODEL"])
def test_a_reader_that_leaves_early(files, words):
    command = [sys.executable, "-m", "mindspeed_mm.tools.memory",
               *(str(files / "model.json") if word == "MODEL" else word for word in words.split())]
    reader, writer = os.pipe()
    os.close(reader)  # as a head that has ended
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0 if words == "--help" else 141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk(files):
    command = [sys.executable, "-m", "mindspeed_mm.tools.memory", "--nproc", "8", "--mm-model",
               str(files / "model.json")]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"
