"""The Triton kernel of the cross-entropy against the same formula in float64.

It runs in Triton's interpreter on the CPU; with TRITON_INTERPRET=0 in the environment, on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels.triton_cross_entropy import cross_entropy_in_place  # noqa: E402

# exp(-inf) = 0 is meant where a thread has found nothing yet; numpy, in the interpreter, warns of it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
pytestmark = pytest.mark.usefixtures("round_to_bf16")
TYPES = [torch.float32, torch.bfloat16]
# one row, one column, whole vectors or not, one turn of the kernel's loops or several; the real vocabulary
SHAPES = [(1, 24), (3, 1), (5, 301), (2, 8192), (3, 16385), (2, 40000), (2, 151936)]


def random_inputs(count, width, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(count * width)
    logits = (torch.randn(count, width, generator=generator) * scale).to(dtype)
    labels = torch.randint(width, (count,), generator=generator)
    loss_weight = torch.rand(count, generator=generator)
    return logits.to(DEVICE), labels.to(DEVICE), loss_weight.to(DEVICE)


def reference(logits, labels, loss_weight):
    """Losses, and the gradient by torch's autograd, in the type of the logits."""
    logits = logits.detach().clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses * loss_weight.to(losses.dtype)).sum().backward()
    return losses.detach(), logits.grad


def relative(found, expected):
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def check(logits, labels, loss_weight, tolerance=2e-6):
    losses, grad = reference(logits.double(), labels, loss_weight)
    kept = logits.clone()
    for found in (
        cross_entropy_in_place(logits, labels, loss_weight, with_gradient=False),
        cross_entropy_in_place(kept, labels, loss_weight, with_gradient=True),
    ):
        assert found.dtype == torch.float32 and relative(found, losses) <= tolerance
    if logits.dtype == torch.bfloat16:
        by_torch = relative(reference(logits, labels, loss_weight)[1], grad)
        assert relative(kept, grad) <= min(1e-2, 1.5 * by_torch)
    else:
        assert relative(kept, grad) <= tolerance


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_losses_and_gradient(dtype, count, width):
    logits, labels, loss_weight = random_inputs(count, width, dtype)
    before = logits.clone()
    check(logits, labels, loss_weight)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_column_can_be_the_label(dtype):
    width = 77
    logits, _, _ = random_inputs(1, width, dtype)
    check(logits.expand(width, width).contiguous(), torch.arange(width, device=DEVICE), torch.ones(width).to(DEVICE))


@pytest.mark.parametrize("dtype", TYPES)
def test_great_logits(dtype):
    # the spacing of fp32 numbers near 1e4 is 1e-3, which the losses inherit
    logits, labels, loss_weight = random_inputs(6, 20000, dtype)
    logits[0, 5], logits[1, 19999], logits[2] = 1e4, 1e4, logits[2] + 1e4
    logits[3] -= 1e4
    logits[4, 7] = logits[4, 19000] = 3e38
    logits[5], labels[0], labels[4] = torch.finfo(dtype).min, 5, 7
    check(logits, labels, loss_weight, tolerance=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_infinite_logits(dtype):
    logits, labels, loss_weight = random_inputs(4, 20000, dtype)
    labels = torch.tensor([3, 19999, 0, 11], device=DEVICE)
    logits[0, 4:] = float("-inf")  # whole threads, and whole turns after the first
    logits[1, :19000] = float("-inf")  # whole turns before the last
    logits[2, 1:] = float("-inf")  # all but the label
    logits[3, ::2] = float("-inf")
    check(logits, labels, loss_weight)
    logits[0] = 0.0
    logits[0, labels[0]] = float("-inf")
    assert cross_entropy_in_place(logits, labels, loss_weight, with_gradient=True)[0] == float("inf")
    assert logits[0, labels[0]] == -loss_weight[0].to(dtype) and logits.isfinite().all()


@pytest.mark.parametrize("column", [0, 9, 19999])
def test_nan_is_not_lost(column):
    logits, labels, loss_weight = random_inputs(2, 20000, torch.bfloat16)
    logits[1, column] = float("nan")
    losses = cross_entropy_in_place(logits, labels, loss_weight, with_gradient=True)
    assert losses.isnan().tolist() == [False, True]
    assert logits[0].isfinite().all() and logits[1].isnan().all()


def test_weight_zero_and_negative():
    logits, labels, _ = random_inputs(3, 50, torch.float32)
    weights = torch.tensor([0.0, -2.0, 1.0], device=DEVICE)
    check(logits, labels, weights)


def test_strided_labels_and_weights():
    logits, _, _ = random_inputs(4, 50, torch.bfloat16)
    labels = torch.tensor([[3, -1], [0, -1], [49, -1], [8, -1]], device=DEVICE)[:, 0]
    check(logits, labels, torch.tensor(0.5, device=DEVICE).expand(4))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_rows(with_gradient):
    logits, labels, loss_weight = random_inputs(0, 24, torch.bfloat16)
    losses = cross_entropy_in_place(logits, labels, loss_weight, with_gradient=with_gradient)
    assert losses.shape == (0,) and losses.dtype == torch.float32


def test_logits_that_cannot_be_overwritten():
    logits, labels, loss_weight = random_inputs(4, 4, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_in_place(logits.t(), labels, loss_weight, with_gradient=True)
