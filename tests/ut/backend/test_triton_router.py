"""The fused router, interpreted on the CPU, against torch in fp64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels.triton_router import top_k_softmax  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 128, 8), (1, 7, 3), (5, 8, 8), (6, 33, 1)])
def test_equals_torch(tokens, experts, top_k):
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=DEVICE).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    probabilities, chosen = exact.softmax(-1).topk(top_k)
    expected = probabilities / probabilities.sum(-1, keepdim=True)
    weights, found = top_k_softmax(logits, top_k, torch.float32)
    assert torch.equal(found, chosen)
    assert float((weights - expected).norm() / expected.norm()) < 1e-6
    grad = torch.randn(tokens, top_k, device=DEVICE)
    expected.backward(grad.double())
    weights.backward(grad)
    assert float((logits.grad - exact.grad).norm()) <= 1e-6 * float(exact.grad.norm()) + 1e-7


def test_bf16_logits_are_computed_in_fp32():
    logits = torch.randn(5, 16, device=DEVICE).bfloat16()
    weights, found = top_k_softmax(logits, 4, torch.float32)
    expected, chosen = top_k_softmax(logits.float(), 4, torch.float32)
    assert torch.equal(weights, expected) and torch.equal(found, chosen)
    assert top_k_softmax(logits, 4, torch.bfloat16)[0].dtype == torch.bfloat16


def test_equals_are_taken_in_their_order():
    """No expert is taken twice, whatever the logits are; a NaN reaches the loss."""
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1, 1:] = float("-inf")
    logits[2] = float("nan")
    weights, experts = top_k_softmax(logits, 3, torch.float32)
    assert experts.tolist() == [[0, 1, 2]] * 3
    assert weights[:2].tolist() == [pytest.approx([1 / 3] * 3), [1.0, 0.0, 0.0]] and weights[2].isnan().all()


def test_no_tokens():
    logits = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    weights, found = top_k_softmax(logits, 2, torch.bfloat16)
    weights.sum().backward()
    assert weights.shape == found.shape == (0, 2) and logits.grad.shape == (0, 8)
