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
TYPES = [torch.float32, torch.bfloat16]
# one row, one column, whole blocks of columns or not; rows that share a program, and rows as wide as several tiles
SHAPES = [(1, 24), (5, 1), (2, 3, 128), (70, 100), (9, 2048), (3, 3, 1100), (3, 5000), (2, 20000)]
EPS = 1e-3
rms_norm = functools.partial(kernels.rms_norm, eps=EPS)
add_rms_norm = functools.partial(kernels.add_rms_norm, eps=EPS)


@pytest.fixture(autouse=True)
def round_to_bf16(monkeypatch):
    """The interpreter truncates to bf16; devices round."""
    if DEVICE != "cpu":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture(params=[1, 3])
def programs(request, monkeypatch):
    """One program goes through all rows, or several share them."""
    monkeypatch.setattr(kernels, "PROGRAMS_PER_MULTIPROCESSOR", request.param)


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs_and_grads(shape, dtype, weight_dtype=None):
    """hidden, residual, weight, and gradients of normed and of the sum; one row is of zeros."""
    hidden, residual, grad, grad_sum = (random(*shape, dtype=dtype, seed=seed) for seed in range(4))
    hidden.view(-1, shape[-1])[0], residual.view(-1, shape[-1])[0] = 0.0, 0.0
    return hidden, residual, random(shape[-1], dtype=weight_dtype or dtype, seed=4), grad, grad_sum


def norm(hidden, weight):
    return F.rms_norm(hidden.to(weight.dtype), (hidden.shape[-1],), weight, EPS).to(hidden.dtype)


def add_norm(hidden, residual, weight):
    total = hidden + residual
    return norm(total, weight), total


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
    hidden, _, weight, grad, _ = inputs_and_grads(shape, dtype)
    agree(rms_norm, norm, [hidden, weight], [grad])


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(dtype, shape):
    hidden, residual, weight, grad, grad_sum = inputs_and_grads(shape, dtype)
    # the sum in float64 is not rounded: here it needs no rounding
    hidden, residual = hidden.bfloat16().to(dtype), residual * 0.0
    residual[..., ::2] = -0.5 * hidden[..., ::2]
    inputs = [hidden, residual, weight]
    found = agree(add_rms_norm, add_norm, inputs, [grad, grad_sum])
    assert torch.equal(found[1], hidden + residual) and torch.equal(found[2], found[3])


def test_the_rounded_sum_is_normed():
    hidden, residual, weight, grad, grad_sum = inputs_and_grads((5, 300), torch.bfloat16)
    total = hidden + residual
    found = run(add_rms_norm, [hidden, residual, weight], [grad, grad_sum])
    assert torch.equal(found[1], total)
    alone = run(rms_norm, [total, weight], [grad])
    assert relative(found[0], alone[0]) <= 1e-3 and relative(found[4], alone[2]) <= 1e-3
    assert relative(found[2], alone[1].double() + grad_sum.double()) <= 4e-3


def test_weight_of_another_type():
    hidden, residual, weight, grad, grad_sum = inputs_and_grads((5, 300), torch.bfloat16, torch.float32)
    agree(rms_norm, norm, [hidden, weight], [grad])
    residual = torch.zeros_like(residual)
    agree(add_rms_norm, add_norm, [hidden, residual, weight], [grad, grad_sum])


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_unused(used):
    hidden, residual, weight, grad, _ = inputs_and_grads((5, 300), torch.float32)
    inputs = [value.requires_grad_() for value in (hidden, residual, weight)]
    found = torch.autograd.grad(add_rms_norm(*inputs)[used], inputs, grad, allow_unused=True)
    expected = torch.autograd.grad(add_norm(*inputs)[used], inputs, grad, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or relative(ours, theirs) <= 2e-6


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_only_wanted_gradients(wanted):
    hidden, residual, weight, grad, grad_sum = inputs_and_grads((5, 300), torch.float32)
    inputs = [value.requires_grad_(bool(want)) for value, want in zip((hidden, residual, weight), wanted, strict=True)]
    torch.autograd.backward(add_rms_norm(*inputs), [grad, grad_sum])
    found, expected = [value.grad for value in inputs], run(add_norm, inputs, [grad, grad_sum])[2:]
    for ours, theirs, want in zip(found, expected, wanted, strict=True):
        assert relative(ours, theirs) <= 2e-6 if want else ours is None
    for value, index in ((hidden, 0), (weight, 2)):
        value.grad = None
        if wanted[index]:
            rms_norm(hidden, weight).backward(grad)
            expected = run(norm, [hidden, weight], [grad])[1 + index // 2]
            assert relative(value.grad, expected) <= 2e-6


def test_strided_tensors():
    hidden, residual, weight, _, _ = inputs_and_grads((6, 200), torch.float32)
    inputs = [hidden[:, ::2], residual.t()[:100].t(), weight[::2]]
    expanded = [torch.tensor(2.0, device=DEVICE).expand(6, 100), torch.ones(1, 100, device=DEVICE).expand(6, 100)]
    agree(add_rms_norm, add_norm, inputs, expanded)
    strided = [value.requires_grad_() for value in inputs]
    expected = run(add_norm, inputs, expanded)
    for ours, theirs in zip(add_rms_norm(*strided), expected[:2], strict=True):
        assert relative(ours, theirs) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_rows(shape):
    hidden, residual, weight, grad, grad_sum = (
        torch.zeros(shape if index != 2 else 24, dtype=torch.bfloat16, device=DEVICE) for index in range(5)
    )
    found = run(rms_norm, [hidden, weight], [grad])
    assert [value.shape for value in found] == [shape, shape, (24,)] and not found[2].any()
    found = run(add_rms_norm, [hidden, residual, weight], [grad, grad_sum])
    assert [value.shape for value in found] == [shape, shape, shape, shape, (24,)] and not found[4].any()


def test_residual_of_another_shape_or_type():
    hidden, residual, weight, _, _ = inputs_and_grads((6, 200), torch.float32)
    with pytest.raises(ValueError, match=r"\[6, 200\], but residual torch.float32 \[1, 200\]"):
        add_rms_norm(hidden, residual[:1], weight)
    with pytest.raises(ValueError, match="bfloat16"):
        kernels.add_rms_norm(hidden, residual.bfloat16(), weight, EPS)
