"""The model on a GPU: against Hugging Face in fp32 on the CPU; in bf16 as close to it as Hugging Face's own is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.single_device import apply_mixed_precision, cached_compute_weights
from tests.helpers.hf_model import hf_inputs
from tests.helpers.mcore_model import model_like, relative, to_mcore
from tests.ut.models.test_parity import GRADIENT, LOGITS, LOSS, reference  # noqa: F401  a fixture

DEVICE = torch.device("cuda")


def step(
    hf_model: Any, samples: list[Any], *, dtype: torch.dtype = torch.float32, **choices: Any
) -> tuple[Any, float, dict[str, torch.Tensor]]:
    """(model, loss, gradients) of a packed micro-batch."""
    model, model_config = model_like(hf_model, ModelBuildOptions(**choices), device="cuda", compute_dtype=dtype)
    model = model.to(dtype)
    model.reset_buffers()
    loss = backward(model, samples, model_config)
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return model, loss, gradients


def backward(model: Any, samples: list[Any], model_config: Any) -> float:
    """The loss of a packed micro-batch, after its backward pass."""
    batch = collate(samples, SPEC, model_config).to(DEVICE)
    weight = torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens, device=DEVICE)
    loss, *_ = model(batch, weight)
    loss.backward()
    return float(loss.detach())


def distance(gradients: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    square = sum(float((gradients[name] - theirs[name]).square().sum()) for name in theirs)
    return (square / sum(float(theirs[name].square().sum()) for name in theirs)) ** 0.5


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize(("attention", "fused"), [(None, True), ("eager", False), ("sdpa", True)])
def test_packed_batch_equals_hf(reference, attention, fused, triton):  # noqa: F811
    hf_model, samples, hf_loss, hf_logits = reference
    choices = {"text_attn_implementation": attention, "vision_attn_implementation": attention, "fused_experts": fused,
               "triton_kernels": triton}
    model, loss, gradients = step(hf_model, samples, **choices)
    model_config = model_like(hf_model)[1]
    with torch.no_grad():
        logits = relative(model(collate(samples, SPEC, model_config).to(DEVICE)).cpu(), hf_logits)
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    errors = sorted(((relative(gradients[name], theirs[name]), name) for name in theirs), reverse=True)
    assert len(errors) > 60
    print(f"loss {abs(loss - hf_loss) / hf_loss:.1e}, logits {logits:.1e}, gradients {errors[:3]}")
    assert abs(loss - hf_loss) <= LOSS * hf_loss
    assert logits <= LOGITS
    assert errors[0][0] <= GRADIENT, errors[:3]


@pytest.fixture(scope="module")
def bf16_bounds(reference) -> tuple[dict[str, torch.Tensor], float]:  # noqa: F811
    """(exact gradients, the distance to them of Hugging Face's own model in bf16 on the GPU)."""
    hf_model, samples, _, _ = reference
    model_config = model_like(hf_model)[1]
    exact = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    in_bf16 = copy.deepcopy(hf_model).to(DEVICE, torch.bfloat16)
    in_bf16.zero_grad()
    count = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    for sample in samples:
        inputs = {name: tensor.to(DEVICE) for name, tensor in hf_inputs(sample).items()}
        labels = inputs.pop("labels")[0, 1:]
        wanted = labels != -100
        predicted = in_bf16(**inputs).logits[0, :-1][wanted]
        (F.cross_entropy(predicted.float(), labels[wanted], reduction="sum") / count).backward()
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in in_bf16.named_parameters()})
    return exact, distance({name: gradient.float().cpu() for name, gradient in theirs.items()}, exact)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_bf16_is_as_close_to_fp32_as_hugging_face(reference, bf16_bounds, triton):  # noqa: F811
    hf_model, samples, hf_loss, _ = reference
    exact, theirs = bf16_bounds
    _, loss, gradients = step(hf_model, samples, dtype=torch.bfloat16, triton_kernels=triton)
    print(f"gradients' distance to fp32: ours {distance(gradients, exact):.4f}, Hugging Face's {theirs:.4f}")
    assert abs(loss - hf_loss) <= 2e-3 * hf_loss
    assert distance(gradients, exact) <= 1.5 * theirs


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_mixed_precision_sums_micro_batches_in_fp32(reference, bf16_bounds, triton):  # noqa: F811
    """As in training on one device: fp32 parameters, compute in bf16, gradients of three micro-batches summed."""
    hf_model, samples, _, _ = reference
    exact, theirs = bf16_bounds
    model, model_config = model_like(
        hf_model, ModelBuildOptions(triton_kernels=triton), device="cuda", compute_dtype=torch.bfloat16)
    apply_mixed_precision(model, model.parallel_plan().wrap_units, FSDPConfig())
    model.reset_buffers()
    with cached_compute_weights(model):
        for _ in range(3):
            backward(model, samples, model_config)
    gradients = {name: parameter.grad.cpu() / 3 for name, parameter in model.named_parameters()}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    print(f"gradients' distance to fp32: ours {distance(gradients, exact):.4f}, Hugging Face's {theirs:.4f}")
    assert distance(gradients, exact) <= 1.5 * theirs


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_no_bit(reference, recompute):  # noqa: F811
    hf_model, samples, _, _ = reference
    plain = step(hf_model, samples)[1:]
    again = step(hf_model, samples, recompute_granularity=recompute)[1:]
    assert plain[0] == again[0] and all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])
