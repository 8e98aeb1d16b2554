"""The model as a GPU gets it, on the meta device: torch checks types, shapes and alignment, and computes nothing."""

from __future__ import annotations

import inspect

import pytest
import torch

from benchmarks.cost_growth import sample_of
from benchmarks.workload import PIXEL_NORM, hf_config
from mindspeed_mm.backend.kernels import attention
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.layers.lora import attach_adapters
from mindspeed_mm.models.lora import LoraOptions, is_adapter
from mindspeed_mm.models.parameter_rules import apply_settings
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions


def test_adapters_in_bf16(monkeypatch):
    """At the 30B model's widths, and with a rank that no kernel's alignment divides."""
    pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later")
    options = LoraOptions(targets=("all",), r=3, alpha=6, expert_r=5)

    def adapt(model, model_config):
        adapters = SPEC.adapters(model_config, options)
        attach_adapters(model, adapters, SPEC.weight_rules(model_config, expert_layout="hub"))
        apply_settings(model, SPEC.parameter_settings(model_config, lora=options))
        model.to(torch.bfloat16)

    model, _ = run_on_meta(monkeypatch, None, repeat_heads=False, adapt=adapt)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name


@pytest.mark.parametrize("repeat_heads", [False, True])
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_forward_and_backward_in_bf16(monkeypatch, recompute, repeat_heads):
    model, called = run_on_meta(monkeypatch, recompute, repeat_heads=repeat_heads)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again = {None: 0, "selective": 4, "full": 4}[recompute]
    assert len(called) == 4 + again
    assert sum(options.get("window_size") == (-1, 0) for options in called) == 2 + again / 2


def run_on_meta(monkeypatch, recompute, *, repeat_heads, adapt=lambda model, model_config: None):
    """Forward and backward of a model; returns it, and the options of each call of its attention."""
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
    adapt(model, model_config)
    model.to_empty(device="meta")
    batch = collate(
        [sample_of(model_config, length=140, side=256), sample_of(model_config, length=90, side=128)],
        SPEC,
        model_config,
    )
    weight = torch.full((batch.num_target_tokens,), 1 / batch.num_target_tokens, device="meta")
    model(batch.to(torch.device("meta")), weight).loss.backward()
    return model, called
