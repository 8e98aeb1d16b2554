"""Deferred host read of a step's metrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.training.metrics import StepMetrics


@pytest.mark.parametrize("place", ["npu", "cpu"])  # with offload_to_cpu gradients and optimizer are the host's
@pytest.mark.parametrize("norm", [2.5, math.inf])
def test_metrics_of_host_and_device_travel_together(place: str, norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    device = select_backend("npu").device
    metrics = StepMetrics(device)
    metrics.add("tokens", 40)
    metrics.add("loss", torch.tensor(1.0, device=device))
    metrics.add("loss", torch.tensor(0.5, device=device))
    metrics.reduce()
    total = torch.tensor(norm, device=place)
    finite = metrics["loss"].isfinite().to(total.device) & total.isfinite()
    assert finite.device.type == place and finite.item() is math.isfinite(norm)
    metrics.set("grad_norm", total)
    metrics.set("skipped_step", ~finite)
    metrics.send()
    skipped = float(not math.isfinite(norm))
    assert metrics.read() == {"loss": 1.5, "tokens": 40.0, "grad_norm": norm, "skipped_step": skipped}
