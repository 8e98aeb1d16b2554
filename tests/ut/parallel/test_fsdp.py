"""What each field of the FSDP2 file does to a model, seen on one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from mindspeed_mm.backend.fsdp_compat import _of_trainable
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.data.collator import collate
from mindspeed_mm.models.parameter_rules import ParameterRule, apply_settings
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.parallel.fsdp import reshard, shard_model
from mindspeed_mm.parallel.mesh import build_layout
from tests.helpers.hf_model import mixed_samples, tiny_model
from tests.helpers.mcore_model import model_like

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def hf_model():
    return tiny_model()


def sharded(hf_model, *, frozen=(), **fields):
    """(our model under an FSDP2 file with these fields, a batch)."""
    model, model_config = model_like(hf_model, frozen=frozen)
    config = FSDPConfig(**{"param_dtype": "fp32", **fields})
    shard_model(
        model,
        model.parallel_plan().wrap_units,
        layout=build_layout(device_type="cpu", sharding_size=config.sharding_size),
        config=config,
        root_group=model.parallel_plan().root_group if config.align_fsdp_param_groups else [],
    )
    return model, collate(mixed_samples(), SPEC, model_config)


def loss_of(model, batch):
    return model(batch, torch.full((batch.num_target_tokens,), 1.0 / batch.num_target_tokens)).loss


def gathered(module):
    """Names of parameters that are whole at present, in the compute type."""
    return {name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)}


def ahead(model, module, direction):
    """The modules whose gathering ``module`` starts in ``forward`` or ``backward``."""
    by_state = {m._get_fsdp_state(): m for m in model.modules() if isinstance(m, FSDPModule)}
    return [by_state[state] for state in getattr(module._get_fsdp_state(), f"_states_to_{direction}_prefetch")]


@pytest.mark.parametrize("freed", [True, False])
def test_reshard_after_forward(hf_model, freed):
    model, batch = sharded(hf_model, reshard_after_forward=freed)
    loss_of(model, batch)
    layer = model.text_decoder.layers[0]
    assert (gathered(layer) == set()) is freed
    # the loss head, where backward begins, waits for it in either case
    assert gathered(model.text_decoder.output_layer) == {"weight"}
    reshard(model)
    assert gathered(model) == set()


def test_backward_frees_everything(hf_model):
    model, batch = sharded(hf_model, reshard_after_forward=False, align_fsdp_param_groups=True)
    loss_of(model, batch).backward()
    assert gathered(model) == set()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_param_dtype(hf_model, name, dtype):
    model, batch = sharded(hf_model, param_dtype=name)
    seen = []
    model.text_decoder.layers[1].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].dtype))
    loss_of(model, batch).backward()
    assert seen == [dtype]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_reduce_dtype(hf_model, name):
    model, batch = sharded(hf_model, reduce_dtype=name)
    loss_of(model, batch).backward()
    gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
    rounded = [torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients if gradient.any()]
    assert all(rounded) if name == "bf16" else not any(rounded)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", None), ("fp32", torch.float32)])
def test_reduce_dtype_is_not_the_compute_type(hf_model, name, dtype):
    """FSDP2 notes None where the sum is taken in the gradients' own type, here bf16."""
    model, batch = sharded(hf_model, param_dtype="bf16", reduce_dtype=name)
    loss_of(model, batch).backward()
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    assert {group._reduce_dtype for group in groups if group is not None} == {dtype}


@pytest.mark.parametrize("cast", [True, False])
def test_cast_forward_inputs(hf_model, cast):
    model, batch = sharded(hf_model, param_dtype="bf16", cast_forward_inputs=cast)
    loss_of(model, batch).backward()  # FSDP2 finds its root
    head = model.image_encoder.vision_projector.merger.linear_fc1
    seen = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    states = torch.zeros(4, model.image_encoder.vision_encoder.model_config.hidden_size)
    try:
        model.image_encoder.vision_projector.merger(states)
    except RuntimeError:  # fp32 states meet bf16 weights
        assert not cast
    assert (seen == [torch.bfloat16]) is cast


@pytest.mark.parametrize(("forward", "backward"), [(0, 0), (1, 1), (2, 3)])
def test_prefetch_lists(hf_model, forward, backward):
    model, _ = sharded(hf_model, num_to_forward_prefetch=forward, num_to_backward_prefetch=backward)
    units = model.parallel_plan().wrap_units
    for index, unit in enumerate(units):
        assert ahead(model, unit, "forward") == units[index + 1 : index + 1 + forward]
        wanted = units[max(0, index - backward) : index][::-1]
        assert ahead(model, unit, "backward") == (wanted or [unit] * bool(backward))


def test_backward_prefetches_nothing_that_is_frozen(hf_model):
    frozen = ["vision_encoder", "vision_projector"]
    model, batch = sharded(hf_model, frozen=frozen, num_to_backward_prefetch=2)
    decoder = model.text_decoder
    assert ahead(model, decoder.layers[1], "backward") == [decoder.layers[0], decoder.embedding]
    assert ahead(model, decoder.layers[0], "backward") == [decoder.embedding]
    assert ahead(model, decoder.embedding, "backward") == [decoder.embedding]
    loss_of(model, batch).backward()
    assert gathered(model) == set()


@pytest.mark.parametrize("offload", [True, False])
def test_offload_to_cpu(hf_model, offload):
    model, _ = sharded(hf_model, offload_to_cpu=offload)
    parameters = model.text_decoder.layers[0]._get_fsdp_state()._fsdp_param_group.fsdp_params
    assert {parameter.offload_to_cpu for parameter in parameters} == {offload}


@pytest.mark.parametrize("aligned", [True, False])
def test_align_fsdp_param_groups(hf_model, aligned):
    """A layer gathers matrices alone, the root what is left of it, and the numbers are the same to the bit."""
    model, batch = sharded(hf_model, align_fsdp_param_groups=aligned)
    names = [name for name, _ in model.named_parameters()]
    layer = model.text_decoder.layers[1]
    loss = loss_of(model, batch)
    loss.backward()
    layer.unshard()
    small = {name for name, _ in layer.named_parameters() if "norm" in name or "router" in name}
    assert len(small) == 5
    assert {name for name, _ in layer.named_parameters()} - gathered(layer) == (small if aligned else set())
    if aligned:
        model.unshard()  # the root alone
        assert {name for name, _ in layer.named_parameters()} == gathered(layer)
    reshard(model)

    plain, _ = sharded(hf_model)
    theirs = loss_of(plain, batch)
    theirs.backward()
    assert torch.equal(loss, theirs) and names == [name for name, _ in plain.named_parameters()]
    gradients = dict(plain.named_parameters())
    assert [n for n, p in model.named_parameters() if not torch.equal(p.grad, gradients[n].grad)] == []


def test_what_was_gathered_in_vain_is_dropped(hf_model):
    """Under torch 2.7 on a machine without an accelerator FSDP2 asked for one to wait for it."""
    model, batch = sharded(hf_model)
    loss_of(model, batch).backward()
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    group = next(group for group in groups if group is not None)
    group.unshard()
    group.finalize_backward()
    assert group._all_gather_result is None


def test_frozen_dtype_under_torch_2_7(monkeypatch, hf_model):
    """torch 2.7 compares the dtypes of all parameters of a wrap unit; later versions those of the trainable ones."""

    def compare_all(group):
        for parameter in group.fsdp_params:
            parameter.init_dtype_attrs(group.mp_policy)
        (group._orig_dtype,) = {parameter.orig_dtype for parameter in group.fsdp_params}
        (group._reduce_dtype,) = {parameter.reduce_dtype for parameter in group.fsdp_params}

    def run():
        model, model_config = model_like(hf_model)
        rule = ParameterRule(pattern="*.self_attention.*", source="test", trainable=False, dtype="bf16")
        apply_settings(model, SPEC.parameter_settings(model_config, [rule]))
        layout = build_layout(device_type="cpu")
        shard_model(model, model.parallel_plan().wrap_units, layout=layout, config=FSDPConfig())
        loss_of(model, collate(mixed_samples(), SPEC, model_config)).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = run()
    monkeypatch.setattr(FSDPParamGroup, "_init_mp_dtypes", compare_all)
    with pytest.raises(ValueError, match="too many values"):
        run()
    monkeypatch.setattr(FSDPParamGroup, "_init_mp_dtypes", _of_trainable(compare_all))
    assert all(map(torch.equal, expected, run()))


def test_root_group_alone_can_train(hf_model):
    """Then no wrap unit has a backward prefetch list."""
    model, model_config = model_like(hf_model)
    rules = [
        ParameterRule(pattern="*", source="test", trainable=False),
        ParameterRule(pattern="text_decoder.final_layernorm", source="test", trainable=True),
    ]
    apply_settings(model, SPEC.parameter_settings(model_config, rules))
    plan = model.parallel_plan()
    shard_model(model, plan.wrap_units, layout=build_layout(device_type="cpu"), config=FSDPConfig())
    loss_of(model, collate(mixed_samples(), SPEC, model_config)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["text_decoder.final_layernorm.weight"]
