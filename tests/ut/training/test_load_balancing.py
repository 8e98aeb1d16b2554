"""The routers' balancing loss against Hugging Face's ``load_balancing_loss_func`` over the step in one batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.training.load_balancing import LoadBalancingLoss, max_load
from tests.helpers.hf_model import hf_inputs, hf_router_logits, mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like, relative, to_mcore

COEFFICIENT, LOSS, GRADIENT = 0.5, 1e-6, 1e-5


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module", params=[{}, {"mlp_only_layers": [1]}], ids=["all sparse", "one dense layer"])
def reference(request):
    """(HF model with the gradients of cross-entropy plus balancing loss, samples, cross-entropy, balancing loss)."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    model, samples = tiny_model(**request.param), mixed_samples()
    count = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    loss, by_sample = 0.0, []
    with hf_router_logits(model) as logits:
        for sample in samples:
            inputs = hf_inputs(sample)
            labels = inputs.pop("labels")[0, 1:]
            predicted = model(**inputs).logits[0, :-1]
            loss = loss + F.cross_entropy(predicted, labels, reduction="sum", ignore_index=-100) / count
            by_sample.append(list(logits))
            logits.clear()
    layers = tuple(torch.cat(of_layer) for of_layer in zip(*by_sample, strict=True))
    assert len(layers) == 3 - len(request.param.get("mlp_only_layers", []))
    balance = load_balancing_loss_func(layers, num_experts=8, top_k=3)
    (loss + COEFFICIENT * balance).backward()
    return model, samples, float(loss.detach()), float(balance.detach())


@pytest.mark.parametrize("parts", [[4], [1, 3], [2, 1, 1]])
@pytest.mark.parametrize(
    "choices", [{}, {"recompute_granularity": "full", "recompute_num_layers": 2}], ids=["kept", "recomputed"]
)
def test_equals_hf_whatever_the_micro_batches(reference, parts, choices):
    hf_model, samples, hf_loss, hf_balance = reference
    model, model_config = model_like(hf_model, ModelBuildOptions(router_load=True, **choices))
    edges = [sum(parts[:index]) for index in range(len(parts) + 1)]
    batches = [collate(samples[start:end], SPEC, model_config) for start, end in zip(edges, edges[1:], strict=False)]
    count = sum(batch.num_target_tokens for batch in batches)
    balance = LoadBalancingLoss(COEFFICIENT, top_k=model_config.text.num_experts_per_token)
    for _ in range(2):  # a step leaves nothing behind for the next
        model.zero_grad()
        with torch.no_grad():
            later = [model(batch, torch.ones(batch.num_target_tokens)).router_load for batch in batches[1:]]
        balance.start_step(later)
        losses = torch.zeros(2)
        for batch in batches:
            output = model(batch, torch.full((batch.num_target_tokens,), 1.0 / count))
            addition = balance.loss(output.router_load)
            (output.loss + addition).backward()
            losses += torch.stack((output.loss.detach(), addition.detach()))
    assert abs(losses[0].item() - hf_loss) <= LOSS * hf_loss
    assert abs(losses[1].item() - COEFFICIENT * hf_balance) <= LOSS * hf_balance
    theirs = to_mcore(model_config, {name: parameter.grad for name, parameter in hf_model.named_parameters()})
    errors = {name: relative(parameter.grad, theirs[name]) for name, parameter in model.named_parameters()}
    assert max(errors.values()) <= GRADIENT, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_balancing_loss_is_not_a_mean_over_micro_batches(reference):
    """The reason for the counting pass: balancing each micro-batch for itself gives another loss."""
    hf_model, samples, _, hf_balance = reference
    model, model_config = model_like(hf_model, ModelBuildOptions(router_load=True))
    balance, apart = LoadBalancingLoss(1.0, top_k=3), 0.0
    for sample in samples:
        batch = collate([sample], SPEC, model_config)
        balance.start_step([])
        apart += balance.loss(model(batch, torch.ones(batch.num_target_tokens)).router_load).item() / len(samples)
    assert abs(apart - hf_balance) > 1e-3 * hf_balance


def test_padding_is_not_counted(reference):
    hf_model, samples, _, _ = reference
    model, model_config = model_like(hf_model, ModelBuildOptions(router_load=True))
    batch = collate(samples, SPEC, model_config)
    tokens = batch.input_ids.shape[0]
    batch.padding = 5
    load = model(batch, torch.ones(batch.num_target_tokens)).router_load
    layers = sum(model_config.text.is_moe_layer(layer) for layer in range(model_config.text.num_layers))
    assert load.choices.sum() == layers * 3 * (tokens - 5)
    assert load.probabilities.sum().item() == pytest.approx(layers * (tokens - 5), rel=1e-5)


@pytest.mark.parametrize("granularity", [None, "selective", "full"])
def test_choices_of_each_layer_are_hf_s(reference, granularity):
    """Counted once for each forward pass: also where backward runs the layers again."""
    hf_model, samples, _, _ = reference
    expected = []
    with hf_router_logits(hf_model) as logits:
        for sample in samples:
            inputs = hf_inputs(sample)
            inputs.pop("labels")
            hf_model(**inputs)
            expected.append([of_layer.topk(3).indices.flatten().bincount(minlength=8) for of_layer in logits])
            logits.clear()
    model, model_config = model_like(hf_model, ModelBuildOptions(recompute_granularity=granularity))
    batch = collate(samples, SPEC, model_config)
    for _ in range(2):
        output = model(batch, torch.ones(batch.num_target_tokens))
        output.loss.backward()
        choices = output.router_load.choices
        assert torch.equal(choices, torch.stack([torch.stack(counts) for counts in expected]).sum(dim=0))


def test_max_load():
    choices = torch.tensor([[2, 2, 2, 2], [1, 5, 1, 1]])
    assert max_load(choices).item() == 2.5
    assert max_load(choices[:1]).item() == 1.0
    assert max_load(torch.tensor([[8, 0, 0, 0]])).item() == 4.0
    assert max_load(torch.zeros(2, 4)).item() == 0.0


def test_probabilities_are_not_kept_unless_asked_for(reference):
    hf_model, samples, _, _ = reference
    model, model_config = model_like(hf_model)
    batch = collate(samples, SPEC, model_config)
    assert model(batch, torch.ones(batch.num_target_tokens)).router_load.probabilities is None
