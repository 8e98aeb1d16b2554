"""The model with the NPU's kernels: against Hugging Face in fp32; in bf16 as close to it as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.kernels import npu as npu_kernels
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.layers.attention import CoreAttention, PackedSelfAttention
from mindspeed_mm.models.layers.moe import MoELayer
from mindspeed_mm.models.layers.norm import RMSNorm
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.mcore_model import model_like, relative, to_mcore
from tests.helpers.npu_environment import host_synchronisations
from tests.ut.models.test_parity import GRADIENT, LOGITS, LOSS, reference  # noqa: F401  a fixture

BACKEND = select_backend("npu")


def step(
    hf_model: Any, samples: list[Any], *, device: str = "npu", dtype: torch.dtype = torch.float32, **choices: Any
) -> tuple[Any, float, dict[str, torch.Tensor]]:
    """(model, loss, gradients) of a packed micro-batch."""
    model, model_config = model_like(hf_model, ModelBuildOptions(**choices), device=device)
    model = model.to(dtype)
    model.reset_buffers()
    batch = collate(samples, SPEC, model_config).to(torch.device(device))
    weight = torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens, device=device)
    before = host_synchronisations()
    loss, *_ = model(batch, weight)
    loss.backward()
    assert host_synchronisations() == before or not choices.get("fused_experts", True)
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return model, float(loss), gradients


@pytest.mark.parametrize("attention", [None, "flash_attention_2", "sdpa", "eager"])
@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "reference"])
def test_packed_batch_equals_hf(reference, attention, fused):  # noqa: F811
    hf_model, samples, hf_loss, hf_logits = reference
    choices = {"text_attn_implementation": attention, "vision_attn_implementation": attention, "fused_experts": fused}
    model, loss, gradients = step(hf_model, samples, **choices)
    assert abs(loss - hf_loss) <= LOSS * hf_loss
    model_config = model_like(hf_model)[1]
    with torch.no_grad():
        assert relative(model(collate(samples, SPEC, model_config).to(BACKEND.device)).cpu(), hf_logits) <= LOGITS
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    errors = {name: relative(gradients[name], theirs[name]) for name in theirs}
    assert len(errors) > 60
    assert max(errors.values()) <= GRADIENT, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_bf16_is_as_close_to_fp32_as_on_the_cpu(reference):  # noqa: F811
    """In bf16 permutation uses the fused operator, whose rounding differs, so the bound is the CPU's own error."""
    hf_model, samples, hf_loss, _ = reference
    theirs = to_mcore(
        model_like(hf_model)[1], {name: parameter.grad for name, parameter in hf_model.named_parameters()}
    )

    def distance(gradients: dict[str, torch.Tensor]) -> float:
        square = sum(float((gradients[name] - theirs[name]).square().sum()) for name in theirs)
        return (square / sum(float(theirs[name].square().sum()) for name in theirs)) ** 0.5

    errors = {}
    for device in ("cpu", "npu"):
        _, loss, gradients = step(hf_model, samples, device=device, dtype=torch.bfloat16)
        errors[device] = distance(gradients)
        assert abs(loss - hf_loss) <= 1e-3 * hf_loss
    # rounding may route a token to another expert, so errors vary; a wrong kernel's error is about 1
    assert errors["npu"] <= 1.5 * errors["cpu"] < 0.1


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_bit(reference, recompute):  # noqa: F811
    hf_model, samples, _, _ = reference
    plain = step(hf_model, samples)[1:]
    again = step(hf_model, samples, recompute_granularity=recompute)[1:]
    assert plain[0] == again[0] and all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


def test_offloaded_activations_change_no_bit(reference):  # noqa: F811
    hf_model, samples, _, _ = reference
    plain, offloaded = step(hf_model, samples)[1:], step(hf_model, samples, activation_offload=True)[1:]
    assert plain[0] == offloaded[0] and all(torch.equal(plain[1][name], offloaded[1][name]) for name in plain[1])


def test_specs_have_the_fused_kernels(reference):  # noqa: F811
    model, _ = model_like(reference[0], device="npu")

    def kernels(kind: type, read: Callable[[Any], Any]) -> set[Any]:
        return {read(module) for module in model.modules() if isinstance(module, kind)}

    assert kernels(CoreAttention, lambda module: module.kernel) == {npu_kernels.npu_fusion_attention}
    assert kernels(PackedSelfAttention, lambda module: module.rotary_kernel) == {npu_kernels.npu_rotary}
    assert kernels(RMSNorm, lambda module: module.kernel) == {npu_kernels.npu_rms_norm}
    assert kernels(MoELayer, lambda module: module.experts.kernel) == {npu_kernels.npu_grouped_experts}
    assert kernels(MoELayer, lambda module: type(module.permuter)) == {npu_kernels.NpuTokenPermuter}
