"""Counted operations against those that torch counts in a real forward and backward pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.flops import FlopCount
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.hf_model import mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like

CASES = {
    "all trains": ([], {}, {}),
    "frozen vision": (["vision_encoder", "vision_projector"], {}, {}),
    "projector alone": (["vision_encoder", "text_decoder"], {}, {}),
    "dense, recompute": ([], {"recompute_granularity": "full"}, {"dense": True}),
}


def counted(model, batch) -> float:
    """By torch, which sees every product that is run."""
    with FlopCounterMode(display=False) as counter:
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


def test_frozen_experts_have_no_weight_gradients():
    _, model_config = model_like(tiny_model())
    lengths = {"tokens": [20], "patches": [], "target_tokens": 5}
    text = model_config.text
    all_trains, frozen = (FlopCount(model_config=model_config, train_experts=trains) for trains in (True, False))
    one = 2 * 20 * text.num_experts_per_token * 3 * text.hidden_size * text.moe_intermediate_size * text.num_layers
    assert all_trains.of_lengths(**lengths) - frozen.of_lengths(**lengths) == pytest.approx(one / 1e12)
