"""The model against ``Qwen3VLMoeForConditionalGeneration``: loss, logits and every gradient, in fp32 on CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.hf_model import mixed_samples, run_samples, tiny_model
from tests.helpers.mcore_model import model_like, relative, to_mcore

LOSS, LOGITS, GRADIENT = 1e-6, 1e-5, 1e-5


@pytest.fixture(scope="module")
def reference():
    """HF model after backward of the token mean over the samples, each run by itself without padding."""
    model, samples = tiny_model(), mixed_samples()
    return model, samples, *run_samples(model, samples)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "loop"])
def test_packed_batch_equals_hf(reference, attention, fused):
    kernels = {"text_attn_implementation": attention, "vision_attn_implementation": attention}
    equals_hf(reference, ModelBuildOptions(**kernels, fused_experts=fused))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a compiler for C++")
def test_compiled_operators_equal_hf(reference):
    """And are compiled once, not for each number of tokens."""
    model, model_config = equals_hf(reference, ModelBuildOptions(compile_small_operators=True))
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compilations > 0
    for count in (1, 3):
        batch = collate(reference[1][:count], SPEC, model_config)
        model(batch, torch.full((batch.num_target_tokens,), 1.0)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def equals_hf(reference, choices):
    """Loss, logits and gradients of the model with ``choices``; returns it and its config."""
    hf_model, samples, hf_loss, hf_logits = reference
    model, model_config = model_like(hf_model, choices)
    batch = collate(samples, SPEC, model_config)
    loss, token_losses, *_ = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))
    loss.backward()
    assert abs(float(loss) - hf_loss) <= LOSS * hf_loss
    assert abs(float(token_losses.mean()) - hf_loss) <= LOSS * hf_loss
    with torch.no_grad():
        assert relative(model(batch), hf_logits) <= LOGITS
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    errors = {name: relative(parameter.grad, theirs[name]) for name, parameter in model.named_parameters()}
    assert len(errors) == len(theirs) > 60
    assert max(errors.values()) <= GRADIENT, sorted(errors.items(), key=lambda item: -item[1])[:3]
    return model, model_config


def test_order_and_packing_change_nothing(reference):
    """Two micro-batches in another order, together, give the gradients of the one."""
    hf_model, samples, hf_loss, _ = reference
    model, model_config = model_like(hf_model)
    split = ([samples[2]], [samples[3], samples[0], samples[1]])
    parts = [collate(part, SPEC, model_config) for part in split]
    assert parts[0].vision.is_dummy
    count = sum(part.num_target_tokens for part in parts)
    total = 0.0
    for part in parts:
        loss, *_ = model(part, torch.full((part.num_target_tokens,), 1.0 / count))
        loss.backward()
        total += float(loss)
    assert abs(total - hf_loss) <= LOSS * hf_loss
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    assert max(relative(p.grad, theirs[name]) for name, p in model.named_parameters()) <= GRADIENT


def test_chunked_loss_equals_whole(reference):
    hf_model, samples, hf_loss, _ = reference
    gradients = []
    for chunk_size in (None, 4):
        model, model_config = model_like(hf_model, ModelBuildOptions(loss_chunk_size=chunk_size))
        batch = collate(samples, SPEC, model_config)
        loss, *_ = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))
        loss.backward()
        assert abs(float(loss) - hf_loss) <= LOSS * hf_loss
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert max(relative(gradients[1][name], gradients[0][name]) for name in gradients[0]) <= GRADIENT


def test_text_only_batch_leaves_zero_vision_gradients(reference):
    """The vision tower takes part in backward, with gradients of zero, where no sample has an image."""
    hf_model, samples, _, _ = reference
    model, model_config = model_like(hf_model)
    batch = collate([samples[2]], SPEC, model_config)
    model(batch, torch.ones(batch.num_target_tokens))[0].backward()
    vision = {name: p.grad for name, p in model.named_parameters() if name.startswith("image_encoder")}
    assert vision and all(gradient is not None and not gradient.any() for gradient in vision.values())


def test_batch_without_target_tokens_trains_nothing(reference):
    hf_model, samples, _, _ = reference
    model, model_config = model_like(hf_model)
    batch = collate([samples[2]], SPEC, model_config)
    empty = torch.empty(0, dtype=torch.int64)
    batch.label_index, batch.labels, batch.target_tokens_per_sample = empty, empty, [0]
    loss, *_ = model(batch, torch.empty(0))
    loss.backward()
    assert float(loss) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("projector", [True, False])
def test_frozen_parts_get_no_gradient_and_change_no_other(reference, encoder, projector):
    hf_model, samples, _, _ = reference
    frozen = [part for part, is_frozen in (("vision_encoder", encoder), ("vision_projector", projector)) if is_frozen]
    model, model_config = model_like(hf_model, frozen=frozen)
    batch = collate(samples, SPEC, model_config)
    model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))[0].backward()
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            assert parameter.grad is None, name
        else:
            assert relative(parameter.grad, theirs[name]) <= GRADIENT, name


def test_recompute_changes_no_bit(reference):
    hf_model, samples, _, _ = reference
    results = []
    for recompute in (None, "full"):
        model, model_config = model_like(hf_model, ModelBuildOptions(recompute_granularity=recompute))
        batch = collate(samples, SPEC, model_config)
        loss, *_ = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0][1], results[1][1], strict=True))
