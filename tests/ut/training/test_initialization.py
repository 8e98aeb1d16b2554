"""Random initial weights depend on seed and name, not on the layout, the shard or the dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.checkpoint.shards import local_shard
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.models.parameter_rules import apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from mindspeed_mm.training import initialization
from mindspeed_mm.training.initialization import initialize
from tests.helpers.hf_model import tiny_config
from tests.helpers.mcore_model import PIXEL_NORM, part_settings

CONFIG = Qwen3VLConfig.from_config(tiny_config().to_dict())
LAYOUTS = {
    "one": (1, {}), "FSDP": (2, {}), "HSDP": (4, {"sharding_size": 2}), "EP2": (2, {"expert_size": 2}),
    "EP2 of 4": (4, {"expert_size": 2}),
}


@pytest.fixture
def as_rank():
    """Makes this process one rank of so many, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank, world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def initialized(*, seed=5, layout=None, frozen_dtype="fp32", **degrees):
    with torch.device("meta"):
        model = build_model(CONFIG, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    apply_settings(model, part_settings(CONFIG, ["vision_encoder"], dtype=frozen_dtype))
    if layout:
        parallelize(model, layout=build_layout(device_type="cpu", **degrees), config=FSDPConfig())
    model.to_empty(device="cpu")
    initialize(model, lambda name, shape: SPEC.initial_distribution(CONFIG, name, shape), seed=seed)
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def whole():
    return {name: parameter.detach() for name, parameter in initialized().items()}


def test_distribution(whole):
    for name, parameter in whole.items():
        if name.endswith(".bias") or parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith(".bias") else 1.0], name
        else:
            assert float(parameter.std()) == pytest.approx(CONFIG.text.initializer_range, rel=0.1), name
            assert abs(float(parameter.mean())) < 0.2 * float(parameter.std()), name


def test_names_and_seeds_differ(whole):
    one, other = (whole[f"text_decoder.layers.{layer}.self_attention.linear_proj.weight"] for layer in (0, 1))
    assert one.shape == other.shape and not torch.equal(one, other)
    again, differently = initialized(), initialized(seed=6)
    for name, parameter in whole.items():
        assert torch.equal(again[name], parameter), name
        assert torch.equal(differently[name], parameter) is (parameter.dim() == 1), name


@pytest.mark.parametrize("block", [initialization.BLOCK_ELEMENTS, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(monkeypatch, whole, as_rank, name, block):
    world_size, degrees = LAYOUTS[name]
    monkeypatch.setattr(initialization, "BLOCK_ELEMENTS", block)
    whole = whole if block > 1000 else initialized()  # the blocks are part of the definition
    held = dict.fromkeys(whole, 0)
    for rank in range(world_size):
        as_rank(rank, world_size)
        for key, parameter in initialized(layout=name, **degrees).items():
            local, region = local_shard(parameter)
            assert torch.equal(local, whole[key][tuple(slice(*bounds) for bounds in region)]), (key, rank)
            held[key] += local.numel()
        dist.destroy_process_group()
    copies = world_size // degrees.get("sharding_size", world_size)
    assert held == {key: copies * math.prod(value.shape) for key, value in whole.items()}


def test_bf16_is_rounded(whole):
    for name, parameter in initialized(frozen_dtype="bf16").items():
        assert torch.equal(parameter, whole[name].to(parameter.dtype)), name
        assert (parameter.dtype == torch.bfloat16) is name.startswith("image_encoder.vision_encoder."), name
