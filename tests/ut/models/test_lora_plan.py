"""Which weights LoRA adapts: by words, by names of either model, and what is refused."""

from __future__ import annotations

import math

import pytest

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import LoraOptions, describe, is_adapter
from mindspeed_mm.models.parameter_rules import ParameterRule
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.helpers import hf_model
from tests.helpers.tiny_config import tiny_config

MOE = tiny_config()
DENSE = Qwen3VLConfig.from_config(hf_model.tiny_config(dense=True).to_dict())


def options_of(*targets: str, **more) -> LoraOptions:
    experts = 2 if any(word in target for target in targets for word in ("all", "experts", ".layers.1.")) else 4
    return LoraOptions(**{"targets": targets, "r": 4, "alpha": 8, "expert_r": experts, **more})


def modules(*targets, config=MOE, rules=(), **more) -> list[str]:
    return [adapter.module for adapter in SPEC.adapters(config, options_of(*targets, **more), rules)]


def kinds(*targets, **keywords) -> set[str]:
    return {name.rpartition(".")[2] for name in modules(*targets, **keywords)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], "q_proj k_proj v_proj o_proj"),
        (["experts"], "gate_up_proj down_proj"),
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "gate_up_proj down_proj"),
        (["vision"], "qkv proj linear_fc1 linear_fc2"),
        (["merger"], "linear_fc1 linear_fc2"),
        (["q_proj", "v_proj"], "q_proj v_proj"),
        (["linear_qkv"], "q_proj k_proj v_proj qkv"),
        (["text_decoder.layers.0.self_attention.linear_proj"], "o_proj"),
        (["model.visual.blocks.1.attn"], "qkv proj"),
        (["*.deepstack_merger_list.*.linear_fc1"], "linear_fc1"),
    ],
    ids=str,
)
def test_targets(targets, expected):
    assert kinds(*targets) == set(expected.split())


def test_all_is_everything_but_router_embeddings_and_head():
    adapted = set(modules("all"))
    matrices = {
        name.removesuffix(".weight") for rule in SPEC.weight_rules(MOE, expert_layout="hub")
        for name, shape in rule.sources if len(shape) > 1
    }
    assert adapted < matrices
    others = {name.rpartition(".")[2] for name in matrices - adapted}
    assert others == {"gate", "embed_tokens", "lm_head", "proj", "pos_embed"}
    assert [name for name in matrices - adapted if name.endswith("proj")] == ["model.visual.patch_embed.proj"]
    assert kinds("mlp", config=DENSE) == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "config", "message"),
    [
        (["mlp"], MOE, "--lora-target-modules mlp matches nothing: the feed-forward layers of this model are routed"),
        (["all-linear"], MOE, "all-linear is PEFT's word; use all, which adapts the experts, too"),
        (["experts"], DENSE, "experts matches nothing: this model has no such weights; choose of attention, mlp"),
        (["gate_proj"], MOE, "gate_proj matches nothing: .*; use the word experts in place of mlp, gate_proj, up_proj"),
        (["down_proj"], MOE, "down_proj matches nothing: the feed-forward layers of this model are routed experts"),
        (["router"], MOE, "router matches text_decoder.layers.0.mlp.router.weight, which is not a linear layer"),
        (["lm_head"], MOE, "lm_head matches lm_head.weight, which is not a linear layer that can be adapted"),
        (["q_porj"], MOE, r"q_porj matches nothing in this model; did you mean q_proj\?"),
        (["mlp.experts.down_proj"], MOE, "adapts .*0.mlp.experts.down_proj without .*experts.gate_up_proj: PEFT"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(targets, config, message):
    with pytest.raises(UserError, match=message):
        modules(*targets, config=config)


def test_what_is_frozen_is_not_adapted():
    rules = [
        ParameterRule(pattern=pattern, source="model.json: freeze", trainable=False)
        for pattern in ("image_encoder.vision_encoder.*", "model.language_model.layers.0")
    ]
    adapted = modules("all", rules=rules)
    assert adapted and not [name for name in adapted if ".blocks." in name or ".layers.0." in name]
    with pytest.raises(UserError, match="vision matches only weights that the model file freezes or .*, such as image_"
                                        ".*; set that part's freeze to false, or leave the target out"):
        modules("vision", rules=rules)


def test_a_rank_of_experts_without_experts_is_refused():
    with pytest.raises(UserError, match="--lora-expert-r 3 has no effect: no experts are adapted; leave it out, or"):
        SPEC.parameter_settings(MOE, lora=options_of("attention", expert_r=3))


def test_names_and_shapes():
    (adapter,) = SPEC.adapters(MOE, options_of("*.layers.1.self_attn.k_proj", expert_r=4))
    base = "text_decoder.layers.1.self_attention.linear_qkv"
    assert adapter.base == f"{base}.weight"
    assert adapter.shapes == {f"{base}.adapters.k_proj.lora_A": (4, 48), f"{base}.adapters.k_proj.lora_B": (32, 4)}
    gate_up, down = SPEC.adapters(MOE, options_of("*.layers.1.mlp.experts.*"))
    assert list(gate_up.shapes.values()) == [(8, 48, 2), (8, 40, 2)] and gate_up.base.endswith("experts.gate_up_proj")
    assert list(down.shapes.values()) == [(8, 20, 2), (8, 48, 2)]
    assert all(map(is_adapter, gate_up.names)) and not is_adapter(gate_up.base)
    assert (adapter.scale, gate_up.scale) == (2, 4)
    stabilized = options_of("all", use_rslora=True)
    assert (stabilized.scale(4), stabilized.scale(2)) == (4, 8 / math.sqrt(2))


def test_settings():
    options = options_of("attention", "merger", lr_ratio=16.0)
    rules = [
        ParameterRule(pattern="image_encoder.vision_projector.*", source="--projector-lr", lr_scale=0.5),
        ParameterRule(pattern="*", source="--frozen-param-dtype bf16", frozen_only=True, dtype="bf16"),
        ParameterRule(pattern="*", source="--save-trainable-only", frozen_only=True, saved=False),
    ]
    settings = SPEC.parameter_settings(MOE, rules, lora=options)
    for name, setting in settings.items():
        assert setting.adapter == is_adapter(name)
        assert (setting.trainable, setting.saved) == (is_adapter(name),) * 2
        assert setting.dtype == ("fp32" if is_adapter(name) else "bf16")
        if is_adapter(name):
            part = 0.5 if setting.part == "vision_projector" else 1.0
            assert setting.lr_scale == part * (16 if name.endswith("lora_B") else 1)


def test_mixed_training():
    options = options_of("all", parts=("text_decoder",))
    settings = SPEC.parameter_settings(MOE, lora=options)
    assert {(s.part, s.adapter) for s in settings.values() if s.trainable} == {
        ("text_decoder", True), ("vision_encoder", False), ("vision_projector", False)
    }
    with pytest.raises(UserError, match="--lora-apply-modules vision is unknown; choose of vision_encoder"):
        SPEC.parameter_settings(MOE, lora=options_of("all", parts=("vision",)))


def test_start_up_lines():
    rules = SPEC.weight_rules(MOE, expert_layout="hub")
    adapters = SPEC.adapters(MOE, options_of("attention", "q_proj"))
    lines = describe(adapters, rules, SPEC.adapter_groups)
    count = sum(math.prod(shape) for adapter in adapters for shape in adapter.shapes.values())
    what = "8 weights (q_proj, k_proj, v_proj, o_proj), rank 4, scale 2"
    assert lines[0] == f"LoRA: attention: {what}, {count:,} parameters"
    assert lines[1:4] == [f"LoRA: {group}: NOT adapted" for group in ("experts", "vision", "merger")]
    assert lines[4].startswith(f"LoRA: {count:,} parameters in adapters, ")
