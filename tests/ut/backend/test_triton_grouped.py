"""The fused weight gradient, interpreted on the CPU, against fp64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels import triton_grouped  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.mark.parametrize("add", [True, False], ids=["added", "overwritten"])
@pytest.mark.parametrize(("width_a", "width_b"), [(48, 32), (128, 256), (160, 24)])
def test_equals_the_products(add, width_a, width_b):
    """With an expert without tokens, one with a single token, and more tokens than a block has rows.

    In fp16, since the interpreter's products of bf16 are wrong.
    """
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 130, 1, 64])
    ends = counts.cumsum(0).to(torch.int32)
    left, right = torch.randn(200, width_a).half(), torch.randn(200, width_b).half()
    result = torch.randn(5, width_a, width_b)
    expected = result.double().clone() if add else torch.zeros(5, width_a, width_b, dtype=torch.float64)
    for index, (one, other) in enumerate(zip(left.split(counts.tolist()), right.split(counts.tolist()), strict=True)):
        expected[index] += one.double().t() @ other.double()
    own = result.to(DEVICE)
    triton_grouped.add_weight_gradient(left.to(DEVICE), right.to(DEVICE), ends.to(DEVICE), own, add=add)
    assert float((own.cpu() - expected).norm() / expected.norm()) < 1e-6
