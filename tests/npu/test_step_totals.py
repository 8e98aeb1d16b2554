"""A step's numbers on their way to the host."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.training.gradients import GradientNorm
from mindspeed_mm.training.step import StepSums, StepTotals


@pytest.mark.parametrize("place", ["npu", "cpu"])  # with offload_to_cpu gradients and optimizer are the host's
@pytest.mark.parametrize("norm", [2.5, math.inf])
def test_norm_is_where_the_gradients_are(place: str, norm: float) -> None:
    totals = StepTotals(StepSums(loss=1.5, tokens=40.0), select_backend("npu").device)
    total = torch.tensor(norm, device=place)
    finite = totals.is_finite(total)
    assert finite.device.type == place and finite.item() is math.isfinite(norm)
    result = totals.result(GradientNorm(total, []), has_router_loss=False, bad_messages=())
    assert (result.loss, result.tokens, result.grad_norm, result.skipped) == (1.5, 40, norm, not math.isfinite(norm))
