"""Adapters against Hugging Face with PEFT: loss, logits and every adapter's gradient, in fp32 on CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.lora import LoraOptions, is_adapter
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.training.initialization import initialize_adapters
from tests.helpers.hf_model import mixed_samples, run_samples, tiny_model
from tests.helpers.lora import adapted_by_peft, adapted_like, factors_of, gradients_of
from tests.helpers.mcore_model import model_like, relative

LOSS, LOGITS, GRADIENT = 1e-6, 1e-5, 1e-5


def options_of(*targets: str, r: int = 4, alpha: float = 8, expert_r: int = 4, **more: bool) -> LoraOptions:
    return LoraOptions(targets=targets, r=r, alpha=alpha, expert_r=expert_r, **more)


CASES = {
    "attention": options_of("attention"),
    "q and v": options_of("q_proj", "v_proj"),
    "vision": options_of("vision"),
    "mergers": options_of("merger"),
    "experts": options_of("experts"),
    "one layer": options_of("*.layers.1.*"),
    "all": options_of("all"),
    "odd ranks": options_of("all", r=3, expert_r=5),
    "rsLoRA, rank of experts": options_of("all", r=5, alpha=2, expert_r=1, use_rslora=True),
}


@pytest.fixture(scope="module", params=list(CASES))
def reference(request):
    options, base, samples = CASES[request.param], tiny_model(), mixed_samples()
    model = adapted_by_peft(copy.deepcopy(base), options)
    loss, logits = run_samples(model, samples)
    return base, model, options, samples, loss, logits


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "loop"])
def test_adapters_equal_peft(reference, fused):
    equals_peft(*reference, ModelBuildOptions(fused_experts=fused))


def equals_peft(base, peft_model, options, samples, peft_loss, peft_logits, choices):
    adapters = SPEC.adapters(adapted_like(base, {}, options)[1], options)
    model, model_config = adapted_like(base, factors_of(peft_model, adapters), options, choices)
    batch = collate(samples, SPEC, model_config)
    loss, *_ = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))
    loss.backward()
    assert abs(float(loss) - peft_loss) <= LOSS * peft_loss
    with torch.no_grad():
        assert relative(model(batch), peft_logits) <= LOGITS
    theirs = gradients_of(peft_model, adapters)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name in ours if is_adapter(name)} == theirs.keys() and theirs
    errors = {name: relative(ours[name], gradient) for name, gradient in theirs.items()}
    assert max(errors.values()) <= GRADIENT, sorted(errors.items(), key=lambda item: -item[1])[:3]
    assert all(gradient is None for name, gradient in ours.items() if not is_adapter(name))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_dense_model_equals_peft(tied):
    options, base = options_of("all", r=3, expert_r=3), tiny_model(dense=True, tied=tied)
    model = adapted_by_peft(copy.deepcopy(base), options)
    loss, logits = run_samples(model, mixed_samples())
    equals_peft(base, model, options, mixed_samples(), loss, logits, ModelBuildOptions())


def test_new_adapters_change_nothing():
    """The loss of the first step is the base's, to the bit."""
    options, base = options_of("all"), tiny_model()
    plain, model_config = model_like(base)
    adapted, _ = adapted_like(base, {}, options)
    initialize_adapters(adapted, SPEC.adapters(model_config, options), seed=0)
    batch = collate(mixed_samples(), SPEC, model_config)
    weights = torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens)
    with torch.no_grad():
        assert torch.equal(plain(batch, weights).loss, adapted(batch, weights).loss)
