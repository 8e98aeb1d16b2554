"""The memory estimate of LoRA runs: parameters against the model's and against a count by hand, and the command."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.parameter_rules import ParameterRule, apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.tools.memory.__main__ import main, read_run
from mindspeed_mm.tools.memory.communication import volumes
from mindspeed_mm.tools.memory.estimate import estimate
from mindspeed_mm.tools.memory.plan import checkpoint_bytes, units_of
from mindspeed_mm.tools.memory.report import GIB
from tests.helpers.mcore_model import PIXEL_NORM
from tests.helpers.published import config_30b
from tests.helpers.tiny_config import tiny_config

PUBLISHED = Qwen3VLConfig.from_config(config_30b())
FREEZE_VISION = [ParameterRule(pattern="image_encoder.*", source="test", trainable=False)]


def lora_plan(model_config: Qwen3VLConfig, *targets: str, ranks: int = 1, r: int = 16, **changes) -> Plan:
    """A run with a bf16 base that adapts ``targets`` and trains nothing else."""
    return Plan(
        model_config=model_config, world_size=ranks, sharding_size=ranks, frozen=tuple(SPEC.parts),
        frozen_names=frozenset(SPEC.parameter_settings(model_config)),
        adapters=SPEC.adapters(model_config, LoraOptions(targets=targets, r=r, alpha=32, expert_r=r)),
        **{"tokens": 4096, "patches": 1024, "target_tokens": 3840, "recompute_granularity": "full",
           "loss_chunk_size": 1024, "frozen_param_bytes": 2, **changes},
    )  # fmt: skip


def test_parameters_gradients_and_moments_by_hand():
    model_config = tiny_config()
    text, r = model_config.text, 4
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    width, inner, experts = text.hidden_size, text.moe_intermediate_size, text.num_experts
    attention = r * (2 * (width + query) + 2 * (width + key))
    of_experts = experts * r * ((width + 2 * inner) + (inner + width))
    adapted = text.num_layers * (attention + of_experts)
    tensors = text.num_layers * (4 + 2) * 2
    base = sum(setting.size for setting in SPEC.parameter_settings(model_config).values())
    plan = lora_plan(model_config, "attention", "experts", r=r)
    found = estimate(plan)
    assert found.parameters == 2 * base + 4 * adapted
    assert (found.gradients, found.optimizer) == (4 * adapted, 8 * adapted + 4 * tensors)
    # what trains alone is copied to the compute type
    assert found.after_forward.amounts["gathered"] == 2 * adapted
    # both moments of what trains, and the adapters once more as a PEFT directory
    assert checkpoint_bytes(plan, moments=True, trainable_only=True) == (12 + 4) * adapted
    assert checkpoint_bytes(plan, moments=False) == (4 + 4) * adapted + 2 * base


@pytest.mark.parametrize(
    ("targets", "expert_r", "dense", "mixed"),
    [
        (("attention",), 4, False, False),
        (("experts", "linear_fc2", "merger"), 2, False, False),
        (("all",), 4, False, True),
        (("all",), 4, True, False),
    ],
)
def test_parameters_are_the_models(targets, expert_r, dense, mixed):
    model_config = tiny_config()
    if dense:
        text = dataclasses.replace(model_config.text, num_experts=0)
        model_config = dataclasses.replace(model_config, model_type="qwen3_vl", text=text)
    parts = ("vision_encoder", "vision_projector") if mixed else None
    options = LoraOptions(targets=targets, r=4, alpha=8, expert_r=expert_r, parts=parts)
    adapters, settings = SPEC.adapters(model_config, options), SPEC.parameter_settings(model_config, lora=options)
    with torch.device("meta"):
        model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    attach_adapters(model, adapters, SPEC.weight_rules(model_config, expert_layout="hub"))
    apply_settings(model, settings)
    base = SPEC.parameter_settings(model_config)
    frozen = [name for name in SPEC.parts if not mixed or name != "text_decoder"]
    plan = dataclasses.replace(
        lora_plan(model_config, "all"), adapters=adapters, frozen=frozen,
        frozen_names=[name for name in base if not settings[name].trainable],
    )  # fmt: skip
    listed = [parameter for unit in units_of(plan) for parameter in unit.parameters]
    theirs = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    assert {p.name: (p.shape, p.trains) for p in listed} == theirs and len(listed) == len(theirs)


def test_experts_factors_are_cut_along_their_widths_under_expert_parallelism():
    plan = lora_plan(PUBLISHED, "experts", ranks=16, expert_size=8)
    unit = next(unit for unit in units_of(plan) if unit.kind == "experts")
    # 16 of 128 experts, cut along the second axis between two ranks
    assert unit.shard(training_only=True) == 16 * 16 * (2048 + 1536 + 768 + 2048) // 2
    assert unit.shard() - unit.shard(training_only=True) == 16 * (1024 * 1536 + 384 * 2048)
    layer = next(unit for unit in units_of(plan) if unit.experts is not None)
    assert layer.experts.name == unit.name and layer.experts.shard() == unit.shard()
    reduced = sum(adapter.size for adapter in plan.adapters) // 8
    assert volumes(plan)["reduce_scatter"] == 4 * reduced // 2


@pytest.mark.parametrize(
    ("targets", "first"),
    [
        (["attention"], "decoder layer 0"),
        (["*layers.47.self_attn.q_proj"], "decoder layer 47"),
        (["vision"], "vision block 0"),
        (["merger"], "merger 0"),
    ],
)
def test_backward_begins_where_something_is_adapted(targets, first):
    units = [unit for unit in units_of(lora_plan(PUBLISHED, *targets)) if unit.kind != "embedding"]
    begins = next(unit for unit in units if unit.runs_backward)
    assert begins.name == first
    assert all(unit.runs_backward for unit in units[units.index(begins):])


def test_30b_with_experts_fits_where_full_fine_tuning_does_not():
    eight, one = (estimate(lora_plan(PUBLISHED, "attention", "experts", ranks=ranks)) for ranks in (8, 1))
    assert eight.peak.total < 16 * GIB and one.peak.total < 76 * GIB
    assert 4 * GIB < one.peak.total - estimate(lora_plan(PUBLISHED, "attention")).peak.total < 12 * GIB
    full = dataclasses.replace(lora_plan(PUBLISHED, "attention", ranks=8), adapters=(), frozen=(), frozen_names=())
    assert estimate(full).peak.total > 57 * GIB


@pytest.mark.parametrize("changes", [{"r": 32}, {"recompute_granularity": None}, {"frozen_param_bytes": 4}])
def test_each_choice_needs_more(changes):
    before, after = (
        estimate(lora_plan(PUBLISHED, "attention", "experts", ranks=8, **{"r": 16, **more})).peak.total
        for more in ({}, changes)
    )
    assert after > before


def test_activations_are_kept_for_adapters_only_where_there_are_some():
    """Of a decoder layer, per token, without recomputation."""
    def kept(*targets: str, r: int = 16) -> tuple[int, int]:
        plan = lora_plan(PUBLISHED, *targets, r=r, recompute_granularity=None)
        layer = next(unit for unit in units_of(plan) if unit.name == "decoder layer 0")
        return layer.activations.attention, layer.activations.mlp

    tokens, c = 4096, 2
    (attention, mlp), (with_attention, same) = kept("experts"), kept("experts", "attention")
    factors = 16 * (3 * 2048 + 4096 + 2 * 512 + 4096 + 2048)
    # q, k and v share what enters them; o's input is the output that the core attention keeps anyway
    assert with_attention - attention == c * (tokens * (2048 + 4 * 16) + factors) and same == mlp
    # x A of both products of the experts, padded to 16 bytes; padded factors are copies
    assert mlp - kept("attention")[1] == c * tokens * 8 * 2 * 16
    copies = 128 * 8 * (2048 + 1536 + 768 + 2048)
    assert kept("experts", r=4)[1] - kept("attention")[1] == c * (tokens * 8 * 2 * 8 + copies)


@pytest.fixture
def model_file(tmp_path):
    """A model file whose directory holds nothing but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config_30b()))
    (tmp_path / "model.json").write_text(json.dumps({"model_id": "qwen3_vl_moe", "init_from_hf_path": str(tmp_path)}))
    return tmp_path / "model.json"


def test_command_takes_flags_or_lora_args(model_file, capsys):
    start = ["--nproc", "8", "--mm-model", str(model_file)]
    flags = ["--lora-target-modules", "attention", "experts", "--lora-r", "32", "--lora-expert-r", "16"]
    plan = read_run([*start, *flags])[0].plan
    assert plan.frozen == {"vision_encoder", "vision_projector", "text_decoder"} and plan.frozen_param_bytes == 2
    assert sum(adapter.size for adapter in plan.adapters) == 2 * 13_369_344 + 629_145_600
    assert main([*start, *flags]) == 0
    text = capsys.readouterr().out
    assert "0.66 B of them trained" in text and "--lora-target-modules" not in text and "fits, " in text
    content = json.loads(model_file.read_text())
    settings = {"lora_target_modules": ["attention", "experts"], "lora_r": 32, "lora_expert_r": 16}
    model_file.write_text(json.dumps({**content, "lora_args": settings}))
    assert read_run(start)[0].plan == plan
    fp32 = read_run([*start, "--frozen-param-dtype", "fp32"])[0].plan
    assert estimate(fp32).parameters - estimate(plan).parameters == pytest.approx(2 * 31_070_754_032 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-r", "16"], "--lora-r has no effect without LoRA; add --lora-target-modules"),
        (["--lora-target-modules", "vision"], "--lora-target-modules vision matches only weights that the model file"),
        (["--lora-target-modules", "mlp"], "--lora-target-modules mlp matches nothing"),
        (["--lora-target-modules", "all", "--lora-dropout", "0.1"], "--lora-dropout"),
    ],
)
def test_mistakes_are_one_line(model_file, capsys, flags, message):
    assert main(["--nproc", "8", "--mm-model", str(model_file), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_mixed_training_has_weights_and_adapters(model_file):
    words = ["--nproc", "8", "--mm-model", str(model_file), "--lora-target-modules", "all", "--lora-mixed-training",
             "--lora-apply-modules", "text_decoder"]  # fmt: skip
    content = json.loads(model_file.read_text())
    trains = {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": False}}
    model_file.write_text(json.dumps({**content, "image_encoder": trains}))
    plan = read_run(words)[0].plan
    assert plan.frozen == {"vision_encoder", "text_decoder"} and plan.adapters
    settings = SPEC.parameter_settings(PUBLISHED)
    projector = sum(one.size for one in settings.values() if one.part == "vision_projector")
    adapted = sum(math.prod(shape) for adapter in plan.adapters for shape in adapter.shapes.values())
    trained = sum(unit.shard(training_only=True) for unit in units_of(dataclasses.replace(
        plan, world_size=1, sharding_size=1)))  # fmt: skip
    assert trained == projector + adapted
