"""The Triton kernels of RMSNorm against the same formulas in float64.

They run in Triton's interpreter on the CPU; with TRITON_INTERPRET=0 in the environment, on the GPU.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels import triton_rms_norm as kernels  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
pytestmark = pytest.mark.usefixtures("round_to_bf16")
TYPES = [torch.float32, torch.bfloat16]
# one row, one column, whole blocks of columns or not; rows that share a program, and rows as wide as several tiles
SHAPES = [(1, 24), (5, 1), (2, 3, 128), (70, 100), (9, 2048), (3, 3, 1100), (3, 5000), (2, 20000)]
EPS = 1e-3
rms_norm = functools.partial(kernels.rms_norm, eps=EPS)


@pytest.fixture(params=[1, 3])
def programs(request, monkeypatch):
    """One program goes through all rows, or several share them."""
    monkeypatch.setattr(kernels, "PROGRAMS_PER_MULTIPROCESSOR", request.param)


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs_and_grad(shape, dtype, weight_dtype=None):
    """hidden, weight, and the gradient of the result; one row is of zeros."""
    hidden, grad = (random(*shape, dtype=dtype, seed=seed) for seed in range(2))
    hidden.view(-1, shape[-1])[0] = 0.0
    return hidden, random(shape[-1], dtype=weight_dtype or dtype, seed=2), grad


def norm(hidden, weight):
    return F.rms_norm(hidden.to(weight.dtype), (hidden.shape[-1],), weight, EPS).to(hidden.dtype)


def run(function, inputs, grads):
    """Results, and the gradients of all inputs."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, grads)
    return [*(result.detach() for result in results), *(value.grad for value in inputs)]


def relative(found, expected):
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def agree(function, formula, inputs, grads):
    """``function`` against ``formula`` in float64; in bf16 also against what torch's bf16 makes of it."""
    found = run(function, inputs, grads)
    exact = run(formula, [value.double() for value in inputs], [value.double() for value in grads])
    by_torch = run(formula, inputs, grads)
    assert len(found) == len(exact)
    for index, (ours, best, theirs) in enumerate(zip(found, exact, by_torch, strict=True)):
        assert ours.shape == best.shape and ours.dtype == theirs.dtype, index
        error = relative(ours, best)
        if torch.bfloat16 in (value.dtype for value in inputs):
            assert error <= min(1e-2, 1.5 * relative(theirs, best) + 2e-6), index
        else:
            assert error <= 2e-6, index
    return found


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype, shape):
    hidden, weight, grad = inputs_and_grad(shape, dtype)
    agree(rms_norm, norm, [hidden, weight], [grad])


def test_weight_of_another_type():
    hidden, weight, grad = inputs_and_grad((5, 300), torch.bfloat16, torch.float32)
    agree(rms_norm, norm, [hidden, weight], [grad])


@pytest.mark.parametrize("wanted", [(1, 0), (0, 1)])
def test_only_wanted_gradients(wanted):
    hidden, weight, grad = inputs_and_grad((5, 300), torch.float32)
    inputs = [value.requires_grad_(bool(want)) for value, want in zip((hidden, weight), wanted, strict=True)]
    rms_norm(*inputs).backward(grad)
    found, expected = [value.grad for value in inputs], run(norm, inputs, [grad])[1:]
    for ours, theirs, want in zip(found, expected, wanted, strict=True):
        assert relative(ours, theirs) <= 2e-6 if want else ours is None


def test_strided_tensors():
    hidden, weight, _ = inputs_and_grad((6, 200), torch.float32)
    inputs = [hidden[:, ::2], weight[::2]]
    expanded = [torch.tensor(2.0, device=DEVICE).expand(6, 100)]
    agree(rms_norm, norm, inputs, expanded)
    strided = [value.requires_grad_() for value in inputs]
    assert relative(rms_norm(*strided), run(norm, inputs, expanded)[0]) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_rows(shape):
    hidden, grad = (torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    found = run(rms_norm, [hidden, torch.ones(24, dtype=torch.bfloat16, device=DEVICE)], [grad])
    assert [value.shape for value in found] == [shape, shape, (24,)] and not found[2].any()
