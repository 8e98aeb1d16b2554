"""The weight map: exact both ways, and complete against real transformers models."""

from __future__ import annotations

import random

import pytest
import torch

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.state_dict import hf_shapes, mcore_shapes
from tests.ut.checkpoint.tiny import build_hf_model, random_config

CASES = 12


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern at all, NaN and infinities included: values are moved, so nothing may be normalised."""
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize("seed", range(CASES))
def test_round_trip_is_exact(seed: int, layout: str) -> None:
    model_config = Qwen3VLConfig.from_config(random_config(random.Random(seed)))
    generator = torch.Generator().manual_seed(seed)
    dtype = [torch.bfloat16, torch.float32, torch.float16][seed % 3]
    for rule in weight_rules(model_config, expert_layout=layout):
        sources = [_random_bits(shape, dtype, generator) for _, shape in rule.sources]
        target = rule.to_mcore(sources)
        assert tuple(target.shape) == rule.target_shape and target.is_contiguous()
        back = rule.to_hf(target)
        assert len(back) == len(sources)
        for before, after, (name, shape) in zip(sources, back, rule.sources, strict=True):
            assert tuple(after.shape) == shape and after.is_contiguous(), name
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["hub", "v5"])
@pytest.mark.parametrize("seed", range(CASES))
def test_row_ranges_agree_with_the_whole(seed: int, layout: str) -> None:
    model_config = Qwen3VLConfig.from_config(random_config(random.Random(seed)))
    generator = torch.Generator().manual_seed(seed)
    for rule in weight_rules(model_config, expert_layout=layout):
        if not rule.row_wise:
            continue
        ((_, shape),) = rule.sources
        source = _random_bits(shape, torch.int16, generator)
        target = rule.to_mcore([source])
        middle = shape[0] // 2
        for rows in (slice(0, middle), slice(middle, shape[0])):
            assert torch.equal(rule.to_mcore([source[rows]]), target[rows])
            assert torch.equal(rule.to_hf(target[rows])[0], source[rows])


@pytest.mark.parametrize("seed", range(CASES))
def test_names_and_shapes_are_those_of_transformers(seed: int) -> None:
    config = random_config(random.Random(seed))
    model_config = Qwen3VLConfig.from_config(config)
    state = build_hf_model(config, device="meta").state_dict()
    if model_config.text.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    actual = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # transformers 4.57 holds the published layout in memory, 5 the other one.
    expected = [hf_shapes(weight_rules(model_config, expert_layout=layout)) for layout in ("hub", "v5")]
    assert actual in expected


def test_names_occur_once() -> None:
    rules = weight_rules(Qwen3VLConfig.from_config(random_config(random.Random(3))), expert_layout="hub")
    assert len(mcore_shapes(rules)) == len(rules)
    assert len(hf_shapes(rules)) == sum(len(rule.sources) for rule in rules)


def test_fused_qkv_rows_are_grouped_by_key_value_head() -> None:
    config = random_config(random.Random(0), text={"num_attention_heads": 4, "num_key_value_heads": 2})
    model_config = Qwen3VLConfig.from_config(config)
    rule = next(r for r in weight_rules(model_config, expert_layout="hub") if r.target.endswith("linear_qkv.weight"))
    width, head_dim = model_config.text.hidden_size, model_config.text.head_dim
    q = torch.arange(4).repeat_interleave(head_dim)[:, None].expand(-1, width)
    k = torch.arange(10, 12).repeat_interleave(head_dim)[:, None].expand(-1, width)
    v = torch.arange(20, 22).repeat_interleave(head_dim)[:, None].expand(-1, width)
    fused = rule.to_mcore([q, k, v])[::head_dim, 0].tolist()
    assert fused == [0, 1, 10, 20, 2, 3, 11, 21]


def test_vision_qkv_rows_are_grouped_by_head() -> None:
    model_config = Qwen3VLConfig.from_config(
        random_config(random.Random(0), vision={"num_heads": 2, "hidden_size": 16})
    )
    rule = next(
        r
        for r in weight_rules(model_config, expert_layout="hub")
        if r.target.startswith("image_encoder") and r.target.endswith("linear_qkv.bias")
    )
    rows = torch.arange(6).repeat_interleave(8)  # q0 q1 k0 k1 v0 v1
    assert rule.to_mcore([rows])[::8].tolist() == [0, 2, 4, 1, 3, 5]


def test_wrong_shapes_are_refused() -> None:
    model_config = Qwen3VLConfig.from_config(random_config(random.Random(0)))
    rule = weight_rules(model_config, expert_layout="hub")[0]
    with pytest.raises(ValueError, match="must have shape"):
        rule.to_mcore([torch.zeros(3)])
    with pytest.raises(ValueError, match="made of 1 tensors"):
        rule.to_mcore([])
    with pytest.raises(ValueError, match="choose hub or v5"):
        weight_rules(model_config, expert_layout="auto")
