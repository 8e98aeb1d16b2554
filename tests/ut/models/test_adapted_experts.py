"""Experts with adapters: every kernel against the reference loop, and bf16 against folded weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.backend.kernels.experts import (
    ExpertAdapters,
    grouped_experts,
    padded_bucket_experts,
    reference_experts,
)

KERNELS = {"padded_bucket": padded_bucket_experts}
if hasattr(F, "grouped_mm"):
    KERNELS["grouped_mm"] = grouped_experts
COUNTS = ([3, 0, 17, 5], [0, 0, 0, 25], [0, 0, 0, 0])
HIDDEN, INNER = 24, 16


def tensors_of(counts, rank, dtype=torch.float32):
    torch.manual_seed(3)
    number = len(counts)
    shapes = [(sum(counts), HIDDEN), (number, HIDDEN, 2 * INNER), (number, INNER, HIDDEN),
              (number, HIDDEN, rank), (number, 2 * INNER, rank), (number, INNER, rank), (number, HIDDEN, rank)]
    return [torch.randn(shape, dtype=dtype).div_(shape[1] ** 0.5).requires_grad_(index not in (1, 2))
            for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("rank", [4, 3, 16])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_the_loop(name, rank, counts):
    grad = torch.randn(sum(counts), HIDDEN)
    results = []
    for kernel in (reference_experts, KERNELS[name]):
        rows, gate_up, down, *factors = tensors_of(counts, rank)
        output = kernel(rows, gate_up, down, torch.tensor(counts), adapters=ExpertAdapters(*factors, 1.7))
        output.backward(grad)
        assert gate_up.grad is None and down.grad is None
        results.append([output.detach(), rows.grad, *(factor.grad for factor in factors)])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_small_updates_survive_bf16(name):
    """What an adapter adds right after its first steps, which rounding to bf16 weights loses for the most part."""
    counts, rank, scale = [64, 64], 8, 2.0
    rows, gate_up, down, a_1, b_1, a_2, b_2 = (t.detach() for t in tensors_of(counts, rank))
    factors = a_1, b_1.mul_(1e-4 / b_1.abs().mean()), a_2, b_2.mul_(1e-4 / b_2.abs().mean())
    rows, gate_up, down, *factors = (t.bfloat16().double() for t in (rows, gate_up, down, *factors))

    def run(kernel, dtype, first, second, adapters):
        tensors = (t.to(dtype) for t in (rows, first, second))
        adapters = None if adapters is None else ExpertAdapters(*(f.to(dtype) for f in adapters), scale)
        return kernel(*tensors, torch.tensor(counts), adapters=adapters).double()

    folded = [w + scale * a @ b.transpose(1, 2) for w, a, b in ((gate_up, *factors[:2]), (down, *factors[2:]))]
    exact = run(reference_experts, torch.float64, *folded, None) - run(
        reference_experts, torch.float64, gate_up, down, None
    )
    zeros = [*map(torch.zeros_like, factors)]

    def error(first, second, adapters):
        """Of the change of the output, as a mean over many roundings of it: along the exact change."""
        base = run(KERNELS[name], torch.float32, gate_up, down, zeros)
        change = run(KERNELS[name], torch.float32, first, second, adapters) - base
        return float((change - exact).norm() / exact.norm())

    rounded = [w.bfloat16().double() for w in folded]
    assert error(gate_up, down, [f.bfloat16().double() for f in factors]) < 0.01
    assert error(*rounded, zeros) > 0.3
