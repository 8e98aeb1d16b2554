"""One process without FSDP2 computes what FSDP2 on one process does, to the bit."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.parameter_rules import apply_settings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from mindspeed_mm.parallel.fsdp import shard_model
from mindspeed_mm.parallel.mesh import build_layout
from mindspeed_mm.parallel.single_device import apply_mixed_precision, cached_compute_weights
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.optimizers.adamw import AdamW
from tests.helpers.hf_model import mixed_samples, step_samples, tiny_model
from tests.helpers.mcore_model import model_like, part_settings


@pytest.fixture(scope="module")
def layout(process_group):
    return build_layout(device_type="cpu")


def train(model, model_config):
    """Losses and gradients of two micro-batches, and the parameters after a step."""
    optimizer = AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-2}])
    losses = []
    with cached_compute_weights(model):
        for samples in (mixed_samples(0)[:2], step_samples(0, 4)):
            batch = collate(samples, SPEC, model_config)
            loss = model(batch, torch.full((batch.num_target_tokens,), 0.01)).loss
            loss.backward()
            losses.append(loss.detach())
    gradients = {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return losses, gradients, {name: local(p.detach()) for name, p in model.named_parameters()}


CASES = {
    "bf16": ({}, {}, "bf16"),
    "fp32": ({}, {}, "fp32"),
    "selective recompute": ({"recompute_granularity": "selective"}, {}, "bf16"),
    "frozen vision": ({}, {}, "bf16"),
    "dense, tied, recompute": ({"recompute_granularity": "full"}, {"dense": True, "tied": True}, "bf16"),
}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_fsdp(layout, case):
    (choices, kind, precision), frozen = CASES[case], ["vision_encoder"] * (case == "frozen vision")
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), "param_dtype": precision})
    results = []
    for whole in (True, False):
        model, model_config = model_like(tiny_model(**kind), ModelBuildOptions(**choices), frozen=frozen)
        if whole:
            apply_mixed_precision(model, model.parallel_plan().wrap_units, config)
        else:
            shard_model(model, model.parallel_plan().wrap_units, layout=layout, config=config)
        results.append(train(model, model_config))
    (losses, gradients, parameters), (wanted_losses, wanted_gradients, wanted_parameters) = results
    assert all(map(torch.equal, losses, wanted_losses))
    assert gradients.keys() == wanted_gradients.keys()
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    for name, gradient in gradients.items():
        assert torch.equal(gradient, wanted_gradients[name]), name
        assert torch.equal(parameters[name], wanted_parameters[name]), name


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_parameters_in_bf16_change_no_bit(layout, whole):
    """Where their values are bf16's, as those of published weights are."""
    frozen, config = ["vision_encoder", "vision_projector"], FSDPConfig()
    results = []
    for dtype in ("fp32", "bf16"):
        model, model_config = model_like(tiny_model())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        apply_settings(model, part_settings(model_config, frozen, dtype=dtype))
        if whole:
            apply_mixed_precision(model, model.parallel_plan().wrap_units, config)
        else:
            shard_model(model, model.parallel_plan().wrap_units, layout=layout, config=config)
        results.append(train(model, model_config))
        kept = {parameter.dtype for parameter in results[-1][2].values()}
        assert kept == {torch.float32} | ({torch.bfloat16} if dtype == "bf16" else set())
    (losses, gradients, parameters), (their_losses, their_gradients, their_parameters) = results
    assert all(map(torch.equal, losses, their_losses))
    assert gradients.keys() == their_gradients.keys() and len(gradients) < len(parameters)
    assert all(torch.equal(gradient, their_gradients[name]) for name, gradient in gradients.items())
    assert all(torch.equal(parameter, their_parameters[name].float()) for name, parameter in parameters.items())


def test_parameters_are_back_after_each_pass():
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), "param_dtype": "bf16"})
    model, model_config = model_like(tiny_model())
    parameters = dict(model.named_parameters())
    apply_mixed_precision(model, model.parallel_plan().wrap_units, config)
    batch = collate(mixed_samples(), SPEC, model_config)
    weight = torch.full((batch.num_target_tokens,), 0.01)

    def same() -> bool:
        return all(parameter is parameters[name] for name, parameter in model.named_parameters())

    with torch.no_grad():
        first = model(batch, weight).loss
    assert same()
    loss = model(batch, weight).loss
    assert not same()  # backward still needs the copies: recomputation looks for them
    loss.backward()
    assert same()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(0.5)
        assert model(batch, weight).loss != first  # copies follow the parameters


def test_copies_follow_the_optimizer():
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), "param_dtype": "bf16"})
    model, model_config = model_like(tiny_model())
    apply_mixed_precision(model, model.parallel_plan().wrap_units, config)
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 1e-2}])
    batch = collate(mixed_samples(), SPEC, model_config)
    weight = torch.full((batch.num_target_tokens,), 0.01)
    losses = []
    for _ in range(3):
        loss = model(batch, weight).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]


def test_copies_are_made_once_while_parameters_rest(monkeypatch):
    config = FSDPConfig.model_construct(**{**FSDPConfig().model_dump(), "param_dtype": "bf16"})
    model, model_config = model_like(tiny_model())
    apply_mixed_precision(model, model.parallel_plan().wrap_units, config)
    made, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: made.append(copy(*args)))
    batch = collate(mixed_samples(), SPEC, model_config)
    weight = torch.full((batch.num_target_tokens,), 0.01)

    def loss() -> float:
        with torch.no_grad():
            return model(batch, weight).loss.item()

    with cached_compute_weights(model):
        first = [loss(), loss()]
    assert len(made) == 1 and first[0] == first[1]
    with torch.no_grad():
        next(model.text_decoder.parameters()).mul_(0.5)
    with cached_compute_weights(model):
        second = [loss(), loss()]
    assert len(made) == 2 and second[0] == second[1] != first[0]
    assert loss() == loss() and len(made) == 4


def test_rest_of_a_model_without_copies_is_nothing():
    model = torch.nn.Linear(2, 2)
    with cached_compute_weights(model):
        model(torch.ones(1, 2))
