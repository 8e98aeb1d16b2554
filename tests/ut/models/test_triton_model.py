"""The model with Triton's kernels, interpreted on the CPU: against Hugging Face, and experts that weigh their rows."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "0", reason="tests/cuda has the model on a GPU")

from mindspeed_mm.backend.kernels import registry  # noqa: E402
from mindspeed_mm.backend.kernels.attention import sdpa_attention  # noqa: E402
from mindspeed_mm.backend.kernels.experts import reference_experts  # noqa: E402
from mindspeed_mm.backend.kernels.triton_experts import weighted_experts  # noqa: E402
from mindspeed_mm.backend.kernels.triton_moe import sum_rows, sum_rows_backward  # noqa: E402
from mindspeed_mm.backend.kernels.triton_rotary import norm_rotary_split  # noqa: E402
from mindspeed_mm.models.layers import specs  # noqa: E402
from mindspeed_mm.models.layers.attention import PackedSelfAttention  # noqa: E402
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter, LocalDispatcher  # noqa: E402
from mindspeed_mm.models.spec import ModelBuildOptions  # noqa: E402
from tests.helpers.hf_model import mixed_samples, run_samples, tiny_model  # noqa: E402
from tests.helpers.lora import adapted_by_peft  # noqa: E402
from tests.ut.models.test_lora_parity import equals_peft, options_of  # noqa: E402
from tests.ut.models.test_parity import equals_hf, reference  # noqa: E402, F401  the latter a fixture


@pytest.fixture
def with_triton(monkeypatch):
    for module in (registry, specs):
        monkeypatch.setattr(module, "use_triton", lambda device: True)
    monkeypatch.setattr(specs, "expert_kernel_name", lambda **_: "triton_grouped_mm")


def test_adapters_equal_peft(with_triton):
    base, options = tiny_model(), options_of("all", r=3, alpha=4, expert_r=4)
    peft_model = adapted_by_peft(copy.deepcopy(base), options)
    loss, logits = run_samples(peft_model, mixed_samples())
    choices = ModelBuildOptions(text_attn_implementation="sdpa")
    model = equals_peft(base, peft_model, options, mixed_samples(), loss, logits, choices)
    assert {layer.experts.kernel for layer in model.text_decoder.moe_layers()} == {weighted_experts}


def test_packed_batch_equals_hf(reference, with_triton):  # noqa: F811
    model, _ = equals_hf(reference, ModelBuildOptions(text_attn_implementation="sdpa"))
    attention = [module for module in model.modules() if isinstance(module, PackedSelfAttention)]
    assert {module.split_kernel for module in attention} == {norm_rotary_split}
    assert {module.core_attention.kernel for module in attention} >= {sdpa_attention}
    assert {layer.experts.kernel for layer in model.text_decoder.moe_layers()} == {weighted_experts}


@pytest.mark.parametrize("summed", [False, True], ids=["returned", "summed"])
def test_experts_that_weigh_equal_weights_afterwards(summed):
    """Values and every gradient; twice, so that what is summed in place is summed."""
    torch.manual_seed(0)
    tokens, weights = torch.randn(11, 24), torch.rand(11, 3)
    experts = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    experts[experts == 3] = 4  # an expert without tokens
    gate_up, down, grad = torch.randn(5, 24, 32), torch.randn(5, 16, 24), torch.randn(11, 24)

    def run(kernel, dispatcher):
        leaves = [tensor.clone().requires_grad_() for tensor in (tokens, weights, gate_up, down)]
        sums = [torch.full_like(leaf, float("nan")) for leaf in leaves[2:]]
        in_place = summed and kernel is weighted_experts
        for leaf, total in zip(leaves[2:], sums, strict=True):
            if in_place:
                leaf.gradient_sum = _Sum(total)

        def function(permuted, counts, *row_weights):
            return kernel(permuted, leaves[2], leaves[3], counts, *row_weights)

        for _ in range(2):
            output = dispatcher(leaves[0], leaves[1], experts, function, IndexPermuter().count(experts, 5))
            output.backward(grad)
        if in_place:
            assert leaves[2].grad is None and leaves[3].grad is None
            return [output, leaves[0].grad, leaves[1].grad, *sums]
        return [output, *(leaf.grad for leaf in leaves)]

    expected = run(reference_experts, LocalDispatcher(IndexPermuter()))
    found = run(weighted_experts, LocalDispatcher(IndexPermuter(sum_rows, sum_rows_backward), True))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    # and with the weights afterwards, as under expert parallelism
    after = run(reference_experts, LocalDispatcher(IndexPermuter(sum_rows, sum_rows_backward)))
    for one, other in zip(after, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("result", [RuntimeError("no C compiler"), torch.zeros(2, 2)], ids=["fails", "wrong"])
def test_a_gpu_without_a_working_triton_gets_torchs_kernels(result, monkeypatch, caplog):
    def sum_rows(*_):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    arange, tensor = torch.arange, torch.tensor
    monkeypatch.setattr(torch, "arange", lambda *args, device=None: arange(*args))
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None: tensor(*args))
    monkeypatch.setattr("mindspeed_mm.backend.kernels.triton_moe.sum_rows", sum_rows)
    registry.use_triton.cache_clear()
    try:
        assert not registry.use_triton("cuda")
    finally:
        registry.use_triton.cache_clear()
    (warning,) = caplog.messages
    assert "replaced by torch's" in warning


class _Sum:
    """Where a gradient is accumulated; what it holds at first is not added to."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total, self.used = total, False

    def __call__(self) -> tuple[torch.Tensor, bool]:
        add, self.used = self.used, True
        return self.total, add
