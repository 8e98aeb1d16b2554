"""The fused AdamW, interpreted on the CPU, against torch's in fp64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels.triton_adamw import adamw  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)], ids=str)
def test_equals_torch_and_skips_a_step_that_is_not_finite(betas):
    settings = {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
    torch.manual_seed(0)
    shapes = [(3, 700), (2048,), (1,), (0, 4), (5000,)]
    own = [torch.randn(shape, device=DEVICE) for shape in shapes]
    exact = [torch.nn.Parameter(tensor.double()) for tensor in own]
    optimizer = torch.optim.AdamW(exact, **settings)
    means, squares = ([torch.zeros_like(tensor) for tensor in own] for _ in range(2))
    steps = [torch.zeros((), device=DEVICE) for _ in own]
    for step, scale in enumerate((1.0, 0.25, 1.0, 0.5)):
        grads = [torch.randn_like(tensor) * 10.0 ** (-step) for tensor in own]
        finite = step != 2
        before = [tensor.clone() for tensor in (*own, *means, *squares, *steps)]
        adamw(own, grads, means, squares, steps, scale=torch.tensor(scale, device=DEVICE),
              finite=torch.tensor(finite, device=DEVICE), **settings)
        if not finite:
            assert all(map(torch.equal, before, (*own, *means, *squares, *steps)))
            continue
        for parameter, grad in zip(exact, grads, strict=True):
            parameter.grad = grad.double() * scale
        optimizer.step()
        for parameter, tensor in zip(exact, own, strict=True):
            assert (parameter - tensor).norm() <= 2e-7 * parameter.norm()
    for parameter, mean, square in zip(exact, means, squares, strict=True):
        state = optimizer.state[parameter]
        assert (state["exp_avg"] - mean).norm() <= 1e-6 * state["exp_avg"].norm()
        assert (state["exp_avg_sq"] - square).norm() <= 1e-6 * state["exp_avg_sq"].norm()
    assert [float(step) for step in steps] == [3.0] * len(shapes)
