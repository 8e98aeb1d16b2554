"""The model as a GPU gets it, on the meta device: torch checks types, shapes and alignment, and computes nothing."""

from __future__ import annotations

import inspect

import pytest
import torch

from benchmarks.cost_growth import sample_of
from benchmarks.workload import PIXEL_NORM, hf_config
from mindspeed_mm.backend.kernels import attention
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions


@pytest.mark.parametrize("repeat_heads", [False, True])
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_forward_and_backward_in_bf16(monkeypatch, recompute, repeat_heads):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later")
    accepts = frozenset(inspect.signature(varlen.varlen_attn).parameters)
    called = []

    def counted(*args, **options):
        called.append(options)
        return varlen.varlen_attn(*args, **options)

    monkeypatch.setattr(attention, "find_varlen", lambda device: attention.VarlenKernel(counted, accepts, repeat_heads))
    model_config = Qwen3VLConfig.from_config(
        hf_config("30b", text={"num_hidden_layers": 2}, vision={"depth": 2, "deepstack_visual_indexes": [0, 1]})
    )
    with torch.device("meta"):
        model = build_model(
            model_config,
            ModelBuildOptions(recompute_granularity=recompute),
            pixel_norm=PIXEL_NORM,
            device="cuda",
            dtype=torch.bfloat16,
            compute_dtype=torch.bfloat16,
        )
    model.to_empty(device="meta")
    batch = collate(
        [sample_of(model_config, length=140, side=256), sample_of(model_config, length=90, side=128)],
        SPEC,
        model_config,
    )
    weight = torch.full((batch.num_target_tokens,), 1 / batch.num_target_tokens, device="meta")
    model(batch.to(torch.device("meta")), weight).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again = {None: 0, "selective": 4, "full": 4}[recompute]
    assert len(called) == 4 + again
    assert sum(options.get("window_size") == (-1, 0) for options in called) == 2 + again / 2
