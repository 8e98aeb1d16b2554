"""AdamW (https://arxiv.org/abs/1711.05101, algorithm 2) with clipping in one pass over memory: 28 bytes a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed_mm.backend.kernels.triton_launch import on_device_of

BLOCK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["count", "index", "lr"])
def _adamw_kernel(
    parameter: tl.tensor, grad: tl.tensor, mean: tl.tensor, square: tl.tensor, corrections: tl.tensor,
    scale: tl.tensor, finite: tl.tensor, count: int, index: int, lr: float,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK values per program; WHOLE: whether BLOCK divides ``count``, since a mask would narrow all accesses."""
    if tl.load(finite) != 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = None if WHOLE else at < count
        values = tl.load(parameter + at, mask=mask)
        grads = tl.load(grad + at, mask=mask).to(tl.float32) * tl.load(scale)
        means = tl.load(mean + at, mask=mask)
        squares = tl.load(square + at, mask=mask)
        step_size = lr / tl.load(corrections + 2 * index)
        root = tl.sqrt(tl.load(corrections + 2 * index + 1))
        values -= lr * DECAY * values
        means = BETA1 * means + (1.0 - BETA1) * grads
        squares = BETA2 * squares + (1.0 - BETA2) * grads * grads
        values -= step_size * means / (tl.sqrt(squares) / root + EPS)
        tl.store(parameter + at, values, mask=mask)
        tl.store(mean + at, means, mask=mask)
        tl.store(square + at, squares, mask=mask)


def adamw(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    steps: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor,
    finite: Tensor,
) -> None:  # fmt: skip
    """One step in place, or none where ``finite`` is false.

    Args:
        parameters: fp32, contiguous, on one GPU; so are ``means`` and ``squares``, the moments of the gradient.
        grads: of any float type; they stay as they are.
        means: moments of order 1.
        squares: moments of order 2.
        steps: fp32 scalars, the number of steps done.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter that a step of learning rate 1 removes.
        scale: fp32 scalar by which gradients are multiplied.
        finite: bool scalar.
    """
    torch._foreach_add_(list(steps), finite.float())
    done = torch.stack(list(steps)).double()
    # not beta**done, for which torch copies beta to the device and waits
    logarithms = [math.log(beta) if beta > 0.0 else -math.inf for beta in betas]
    corrections = torch.stack([-torch.expm1(done * logarithm) for logarithm in logarithms], dim=1).float()
    flag = finite.to(torch.int8)
    for index, (parameter, grad, mean, square) in enumerate(zip(parameters, grads, means, squares, strict=True)):
        count = parameter.numel()
        if count == 0:
            continue
        assert parameter.is_contiguous() and mean.is_contiguous() and square.is_contiguous()
        with on_device_of(parameter):
            _adamw_kernel[(triton.cdiv(count, BLOCK),)](
                parameter, grad.contiguous(), mean, square, corrections, scale, flag, count, index, lr,
                BETA1=betas[0], BETA2=betas[1], EPS=eps, DECAY=weight_decay, BLOCK=BLOCK,
                WHOLE=count % BLOCK == 0, num_warps=NUM_WARPS)
