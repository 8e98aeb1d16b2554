"""The Triton kernels around the experts against the same formulas in float64.

They run in Triton's interpreter on the CPU; with TRITON_INTERPRET=0 in the environment, on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels import triton_moe as kernels  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
pytestmark = pytest.mark.usefixtures("round_to_bf16")
TYPES = [torch.float32, torch.bfloat16]
WEIGHTS_TYPES = [None, torch.float32, torch.bfloat16]
# rows that are one block, whole blocks, blocks with idle columns; in one or in several turns of the kernels' loops
SHAPES = [(1, 24), (3, 1), (7, 768), (5, 300), (6, 1280), (2, 1100)]


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_routing(tokens, top_k, seed=5):
    """Indices [T, k] with each of the T * k rows once."""
    return torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(seed)).view(tokens, top_k).to(DEVICE)


def relative(found, expected):
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def agree(found, formula, *inputs):
    """``found`` against ``formula`` of the inputs in float64; in bf16 also against what torch's bf16 makes of it."""

    def is_float(value):
        return torch.is_tensor(value) and value.is_floating_point()

    exact = formula(*(value.double() if is_float(value) else value for value in inputs))
    by_torch = formula(*inputs)
    assert len(found) == len(exact) == len(by_torch)
    for index, (ours, best, theirs) in enumerate(zip(found, exact, by_torch, strict=True)):
        assert ours.shape == best.shape, index
        error = relative(ours, best)
        if ours.dtype == torch.bfloat16:
            assert error <= min(1e-2, 1.5 * relative(theirs.to(ours.dtype), best)), index
        else:
            assert error <= 2e-6, index


def swiglu(gate_up, weights):
    gate, up = gate_up.chunk(2, dim=-1)
    result = F.silu(gate) * up
    return result if weights is None else (result * weights.unsqueeze(-1)).to(gate_up.dtype)


def sums(rows, indices, weights):
    chosen = rows[indices]
    return (chosen if weights is None else chosen * weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


def gradients(function, grad, *inputs):
    """The result of ``function`` and the gradients of all floating-point inputs, by torch's autograd."""
    inputs = [
        value.detach().clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for value in inputs
    ]
    result = function(*inputs)
    result.backward(grad)
    return [result.detach(), *(value.grad for value in inputs if torch.is_tensor(value) and value.requires_grad)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_TYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_swiglu(dtype, weights_dtype, count, width):
    gate_up, grad = random(count, 2 * width, dtype=dtype), random(count, width, dtype=dtype, seed=1)
    weights = None if weights_dtype is None else random(count, dtype=weights_dtype, seed=2)
    result = kernels.weighted_swiglu(gate_up, weights)
    again, grad_gate_up, grad_weights = kernels.weighted_swiglu_backward(gate_up, weights, grad)
    assert result.dtype == grad_gate_up.dtype == dtype and torch.equal(result, again)
    found = [result, grad_gate_up]
    if weights is None:
        assert grad_weights is None
    else:
        assert grad_weights.dtype == torch.float32
        found.append(grad_weights)
    agree(found, lambda grad, *inputs: gradients(swiglu, grad, *inputs), grad, gate_up, weights)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_TYPES)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 24), (5, 3, 300), (3, 8, 2048), (2, 2, 1)])
def test_sum_rows(dtype, weights_dtype, tokens, top_k, width):
    rows, indices = random(tokens * top_k, width, dtype=dtype), random_routing(tokens, top_k)
    weights = None if weights_dtype is None else random(tokens, top_k, dtype=weights_dtype, seed=1)
    found = kernels.sum_rows(rows, indices, weights)
    assert found.dtype == dtype
    agree([found], lambda *inputs: [sums(*inputs)], rows, indices, weights)


def test_sum_rows_takes_rows_more_than_once():
    rows, indices = random(4, 24, dtype=torch.float32), torch.tensor([[1, 1], [3, 0], [1, 2]], device=DEVICE)
    agree([kernels.sum_rows(rows, indices, None)], lambda *inputs: [sums(*inputs)], rows, indices, None)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_TYPES[1:])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 24), (5, 3, 300), (3, 8, 2048), (2, 2, 1)])
def test_gradients_of_sum_rows(dtype, weights_dtype, tokens, top_k, width):
    rows, indices = random(tokens * top_k, width, dtype=dtype), random_routing(tokens, top_k)
    weights = random(tokens, top_k, dtype=weights_dtype, seed=1)
    grad = random(tokens, width, dtype=dtype, seed=2)
    found = kernels.sum_rows_backward(grad, rows, indices, weights)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    agree(found, lambda grad, *inputs: gradients(sums, grad, *inputs)[1:], grad, rows, indices, weights)


@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_need_not_be_contiguous(dtype):
    gate_up, weights = random(600, 5, dtype=dtype).t(), random(5, 2, dtype=dtype)[:, 0]
    expanded = torch.ones((), dtype=dtype, device=DEVICE).expand(5, 300)
    found = kernels.weighted_swiglu_backward(gate_up, weights, expanded)
    agree(found, lambda grad, *inputs: gradients(swiglu, grad, *inputs), expanded, gate_up, weights)
    torch.testing.assert_close(kernels.weighted_swiglu(gate_up, weights), found[0], rtol=0, atol=0)

    rows, indices, weights = random(48, 6, dtype=dtype).t(), random_routing(2, 3).t(), random(2, 3, dtype=dtype).t()
    expanded = expanded[:3, :48]
    agree([kernels.sum_rows(rows, indices, weights)], lambda *inputs: [sums(*inputs)], rows, indices, weights)
    found = kernels.sum_rows_backward(expanded, rows, indices, weights)
    agree(found, lambda grad, *inputs: gradients(sums, grad, *inputs)[1:], expanded, rows, indices, weights)


def test_no_rows():
    gate_up, grad = torch.empty(0, 48, device=DEVICE), torch.empty(0, 24, device=DEVICE)
    weights, index = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert kernels.weighted_swiglu(gate_up, weights).shape == (0, 24)
    shapes = [value.shape for value in kernels.weighted_swiglu_backward(gate_up, weights, grad)]
    assert shapes == [(0, 24), (0, 48), (0,)]
    assert kernels.weighted_swiglu_backward(gate_up, None, grad)[2] is None
    choices = index.view(0, 2)
    assert kernels.sum_rows(grad, choices, None).shape == (0, 24)
    shapes = [value.shape for value in kernels.sum_rows_backward(grad, grad, choices, weights.view(0, 2))]
    assert shapes == [(0, 24), (0, 2)]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_gates_stay_finite():
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 2.0, 3.0]], device=DEVICE)
    grad = torch.ones(1, 3, device=DEVICE)
    found = kernels.weighted_swiglu_backward(gate_up, None, grad)[:2]
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 400.0, 0.0]], device=DEVICE))
    torch.testing.assert_close(found[1], torch.tensor([[0.0, 2.0, 1.5, 0.0, 200.0, 0.0]], device=DEVICE))
