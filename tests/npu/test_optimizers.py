"""Optimizers with moments in fewer bits on a device: the host's results, and no synchronisation with it."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.training.optimizers.low_precision import LowPrecisionAdamW


def run(dtype: str, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """A matrix after three steps, the second of them skipped, its state, and the device's waits for the host."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(16, 512, generator=generator).to(device))
    gradients = [torch.randn(16, 512, generator=generator).to(device) for _ in range(4)]
    flags = [torch.tensor(finite).to(device) for finite in (True, False, True, True)]
    scale = torch.tensor(0.5).to(device)
    optimizer = LowPrecisionAdamW([{"params": [parameter]}], lr=1e-2, weight_decay=0.1)
    optimizer.layout, optimizer.names = OptimizerStateLayout(dtype), {parameter: "layer.weight"}
    waits = 0
    for index, (gradient, finite) in enumerate(zip(gradients, flags, strict=True)):
        before = torch_npu._C.host_waits()
        parameter.grad = gradient
        optimizer.step_where(finite, scale=scale)
        waits += (torch_npu._C.host_waits() - before) * (index > 0)  # tables are copied to the device once
    return parameter.detach().cpu(), {key: value.cpu() for key, value in optimizer.state[parameter].items()}, waits


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_device_equals_host_without_waits(dtype):
    (host, host_state, _), (device, device_state, waits) = run(dtype, "cpu"), run(dtype, "npu")
    assert torch.equal(host, device) and host_state["step"] == 3
    torch.testing.assert_close(device_state, host_state, rtol=0, atol=0)
    assert waits == 0
