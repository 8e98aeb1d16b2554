"""Recomputation, offloading and waiting change what is kept and when, and no bit of the gradients."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.backend import activation_offload
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.layers import activation_checkpoint
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions
from tests.helpers.hf_model import mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like

WAYS = {
    "full": {"recompute_granularity": "full"},
    "full, 2 layers at a time": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "full, the first 2 layers": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "full, more layers than there are": {"recompute_granularity": "full", "recompute_num_layers": 9},
    "selective": {"recompute_granularity": "selective"},
    "offload": {"activation_offload": True},
    "full and offload": {"recompute_granularity": "full", "activation_offload": True},
    "selective and offload": {"recompute_granularity": "selective", "activation_offload": True},
    "waiting": {"text_synchronize_per_layer": True, "vision_synchronize_per_layer": True},
}


def run(hf_model, *, seen=None, **choices):
    """(loss with the routers' part, gradients) of a mixed batch; ``seen`` collects what autograd keeps."""
    options = ModelBuildOptions(router_load=True, text_attn_implementation="eager", **choices)
    model, model_config = model_like(hf_model, options)
    batch = collate(mixed_samples(), SPEC, model_config)

    def pack(tensor):
        if seen is not None:
            seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens))
        loss = output.loss
        if output.router_load is not None:
            price = output.router_load.choices.float() / output.router_load.choices.sum() ** 2
            loss = loss + (price * output.router_load.probabilities).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=["moe", "dense"])
def plain(request):
    torch.set_num_threads(1)
    hf_model = tiny_model(dense=request.param == "dense", tied=request.param == "dense")
    return hf_model, *run(hf_model)


@pytest.mark.parametrize("way", WAYS)
def test_same_bits(plain, way):
    hf_model, loss, gradients = plain
    ours, theirs = run(hf_model, **WAYS[way])
    assert torch.equal(ours, loss)
    assert [name for name in gradients if not torch.equal(gradients[name], theirs[name])] == []


def kept_bytes(hf_model, **choices):
    seen = []
    run(hf_model, seen=seen, **choices)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}.values())


def test_each_way_keeps_less(plain):
    hf_model, *_ = plain
    everything = kept_bytes(hf_model)
    selective = kept_bytes(hf_model, recompute_granularity="selective")
    first = kept_bytes(hf_model, recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
    full = kept_bytes(hf_model, recompute_granularity="full")
    assert full < 0.6 * everything and full < first < everything and selective < everything


def test_groups_of_layers():
    def groups(**policy):
        return [(list(indices), again) for indices, again in ActivationCheckpointPolicy(**policy).groups(5)]

    alone = [[0], [1], [2], [3], [4]]
    assert groups() == [(group, False) for group in alone] == groups(recompute_granularity="selective")
    assert groups(recompute_granularity="full") == [(group, True) for group in alone]
    assert groups(recompute_granularity="full", recompute_num_layers=2) == [([0, 1], True), ([2, 3], True), ([4], True)]
    block = groups(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    assert block == [(group, group[0] < 2) for group in alone]


def test_offload_moves_activations_and_leaves_weights():
    layer = torch.nn.Linear(6, 4)
    hidden = torch.randn(5, 6, requires_grad=True)
    moved = []
    store = activation_offload._OnHost.store

    def counting(tensor, *, pinned):
        moved.append(tuple(tensor.shape))
        return store(tensor, pinned=pinned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_offload._OnHost, "store", counting)
        with activation_offload.host_offload(device="cpu")([layer]):
            result = (layer(hidden * 2) @ layer.weight).square().sum()
    result.backward()
    assert (5, 6) in moved and (4, 6) not in moved and (6, 4) not in moved
    offloaded = hidden.grad
    hidden.grad = None
    (layer(hidden * 2) @ layer.weight).square().sum().backward()
    assert torch.equal(offloaded, hidden.grad)


@pytest.mark.parametrize(
    ("choices", "waits"),
    [({}, 0), ({"text_synchronize_per_layer": True}, 3), ({"vision_synchronize_per_layer": True}, 3),
     ({"text_synchronize_per_layer": True, "vision_synchronize_per_layer": True}, 6)],
)
def test_waits_after_each_layer(monkeypatch, choices, waits):
    calls = []
    monkeypatch.setattr(activation_checkpoint, "synchronizer", lambda *, device: lambda: calls.append(device))
    model, model_config = model_like(tiny_model(), ModelBuildOptions(**choices))
    batch = collate(mixed_samples(), SPEC, model_config)
    with torch.no_grad():
        model(batch, torch.ones(batch.num_target_tokens))
    assert calls == ["cpu"] * waits


def test_routers_hold_nothing_after_backward(plain):
    """A router that kept its part of the graph would keep a whole layer's activations until the next step."""
    hf_model, *_ = plain
    model, model_config = model_like(hf_model, ModelBuildOptions(router_load=True, recompute_granularity="full"))
    batch = collate(mixed_samples(), SPEC, model_config)
    model(batch, torch.ones(batch.num_target_tokens)).loss.backward()
    layers = model.text_decoder.moe_layers()
    assert all(layer.take_load(1) == () and layer.router.take_probabilities(1) is None for layer in layers)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 4), torch.randn(3, 4).t(), torch.randn(3, 8)[:, 2:5], torch.randn(3, 1).expand(3, 5),
     torch.randn(2, 1, 6)[:, :, ::2].expand(2, 4, 3), torch.tensor(1.5), torch.empty(0, 3)],
)
def test_offloaded_tensor_comes_back_as_it_was(tensor):
    back = activation_offload._OnHost.store(tensor, pinned=False).restore()
    assert torch.equal(back, tensor)
    significant = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    assert [back.stride(axis) for axis in significant] == [tensor.stride(axis) for axis in significant]
