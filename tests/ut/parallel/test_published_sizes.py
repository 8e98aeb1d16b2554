"""The published models at full size: built on the meta device and sharded as their launchers would, without memory."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.models.state_dict import mcore_shapes
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.parallelize import parallelize
from tests.helpers.mcore_model import PIXEL_NORM
from tests.helpers.published import published_config

YAML = "examples/qwen3vl/fsdp2_config.yaml"
# model: billions of parameters on its page; processes and expert parallelism of its launcher
MODELS = {
    "2B": (2.13, 8, {}), "4B": (4.44, 8, {}), "8B": (8.77, 8, {}), "32B": (33.4, 16, {}), "30B": (31.1, 8, {}),
    "235B": (236, 128, {"expert_size": 8}),
}


@pytest.mark.parametrize("name", MODELS)
def test_full_size_is_sharded_evenly(fake_process_group, name):
    billions, world_size, layout = MODELS[name]
    fake_process_group(world_size)
    model_config = Qwen3VLConfig.from_config(published_config(name))
    with torch.device("meta"):
        model = build_model(model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device="cpu")
    shapes = mcore_shapes(weight_rules(model_config, expert_layout="hub"))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes
    parallelize(model, layout=build_layout(device_type="cpu", **layout), config=load_config(YAML, FSDPConfig, flag=""))
    parameters = dict(model.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == shapes
    total = sum(parameter.numel() for parameter in parameters.values())
    assert total / 1e9 == pytest.approx(billions, rel=0.005)
    assert all(parameter.is_meta for parameter in parameters.values())
    own = sum(parameter.to_local().numel() for parameter in parameters.values())
    assert total / world_size <= own < 1.01 * total / world_size
