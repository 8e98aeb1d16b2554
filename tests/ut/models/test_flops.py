"""Counted operations against those that torch counts in a real forward and backward pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.parameter_rules import apply_settings
from mindspeed_mm.models.qwen3_vl.flops import FlopCount
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.models.state_dict import Shape
from tests.helpers.hf_model import mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like

CASES = {
    "all trains": ([], {}, {}),
    "frozen vision": (["vision_encoder", "vision_projector"], {}, {}),
    "projector alone": (["vision_encoder", "text_decoder"], {}, {}),
    "dense, recompute": ([], {"recompute_granularity": "full"}, {"dense": True}),
}


def in_place_addmm(output: Shape, left: Shape, right: Shape, **_: object) -> int:
    """By which adapters are added, and which torch does not count."""
    return 2 * left[0] * left[1] * right[1]


def counted(model, batch) -> float:
    """By torch, which sees every product that is run."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_addmm}) as counter:
        loss = model(batch, torch.full((batch.num_target_tokens,), 0.01)).loss
        loss.backward()
    return counter.get_total_flops() / 1e12


@pytest.mark.parametrize("case", CASES)
def test_every_product_is_counted(case):
    frozen, choices, kind = CASES[case]
    plain = {"text_attn_implementation": "eager", "vision_attn_implementation": "eager", "fused_experts": False}
    model, model_config = model_like(tiny_model(**kind), ModelBuildOptions(**plain, **choices), frozen=frozen)
    batch = collate(mixed_samples(), SPEC, model_config)
    count = SPEC.flop_counter(model_config, frozen=frozen)
    text = model_config.text
    lengths = [end - start for start, end in itertools.pairwise(batch.cu_seqlens_host)]
    # eager attention also multiplies what causality then hides
    hidden_pairs = sum(length * (length - 1) // 2 for length in lengths)
    backward = 2 if count.train_text or count.train_projector else 0
    hidden = 2 * 2 * text.num_heads * text.head_dim * hidden_pairs * text.num_layers * (1 + backward) / 1e12
    found = counted(model, batch) - hidden
    if choices.get("recompute_granularity") != "full":
        assert count(batch) == pytest.approx(found, rel=1e-6)
    else:
        assert count(batch) < 0.85 * found  # what runs again is not counted


LORA_CASES = {
    "attention": (["attention"], 4, [], {}),
    "the last layer alone": (["*layers.1.self_attn.o_proj", "*layers.1.self_attn.v_proj"], 4, [], {}),
    "all": (["all"], 3, [], {}),
    "mergers, and text in full": (["merger"], 4, ["text_decoder"], {}),
    "dense": (["all"], 4, [], {"dense": True}),
}


@pytest.mark.parametrize("case", LORA_CASES)
def test_adapters_add_their_products_and_replace_weight_gradients(case):
    targets, expert_r, in_full, kind = LORA_CASES[case]
    plain = {"text_attn_implementation": "eager", "vision_attn_implementation": "eager", "fused_experts": False}
    model, model_config = model_like(tiny_model(**kind), ModelBuildOptions(**plain))
    parts = tuple(part for part in SPEC.parts if part not in in_full)
    options = LoraOptions(targets=tuple(targets), r=4, alpha=8, expert_r=expert_r, parts=parts)
    adapters, rules = SPEC.adapters(model_config, options), SPEC.weight_rules(model_config, expert_layout="hub")
    attach_adapters(model, adapters, rules)
    apply_settings(model, SPEC.parameter_settings(model_config, lora=options))
    for adapter in adapters:
        for name in adapter.names:
            torch.nn.init.normal_(model.get_parameter(name), std=0.02)
    batch = collate(mixed_samples(), SPEC, model_config)
    count = SPEC.flop_counter(model_config, frozen=parts, adapters=adapters)
    lengths = [end - start for start, end in itertools.pairwise(batch.cu_seqlens_host)]
    found = counted(model, batch)
    text = model_config.text
    pairs = sum(length * (length - 1) // 2 for length in lengths)  # as above; not through layers before adapted ones
    layers = text.num_layers + 2 * sum(
        any(a.base.startswith(f"text_decoder.layers.{index}.self_attention.linear_qkv") for a in adapters)
        or case in ("all", "dense", "mergers, and text in full") or index > 0 for index in range(text.num_layers)
    )
    found -= 2 * 2 * text.num_heads * text.head_dim * pairs * layers / 1e12
    # B of weights that are held in one parameter is computed as one matrix of blocks, most of them zeros
    for rule in rules:
        group = [a for a in adapters if a.base == rule.target and not a.is_experts]
        if len(rule.sources) > 1:
            zeros = sum(a.rank for a in group) * rule.target_shape[0] - sum(a.rank * a.source[1][0] for a in group)
            found -= 3 * 2 * sum(lengths) * zeros / 1e12
    assert count(batch) == pytest.approx(found, rel=1e-6)


def test_frozen_experts_have_no_weight_gradients():
    _, model_config = model_like(tiny_model())
    lengths = {"tokens": [20], "patches": [], "target_tokens": 5}
    text = model_config.text
    all_trains, frozen = (FlopCount(model_config=model_config, train_experts=trains) for trains in (True, False))
    one = 2 * 20 * text.num_experts_per_token * 3 * text.hidden_size * text.moe_intermediate_size * text.num_layers
    assert all_trains.of_lengths(**lengths) - frozen.of_lengths(**lengths) == pytest.approx(one / 1e12)
