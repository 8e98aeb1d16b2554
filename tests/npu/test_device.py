"""The simulated NPU behaves like a device: its own tensors, generators, pinned memory, streams."""

from __future__ import annotations

import io
import time

import pytest
import torch
import torch_npu

from mindspeed_mm.backend.transfer import DeferredHostRead, DeviceEvent


def test_results_are_the_cpus_and_devices_do_not_mix():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal((a.npu() @ b.npu()).cpu(), a @ b)
    with pytest.raises(RuntimeError, match="same device"):
        a.npu() @ b
    with pytest.raises(RuntimeError, match="same device"):
        a.npu()[torch.tensor([0])] + b[:1, :4]
    assert (a.npu() + torch.tensor(1.0)).device.type == "npu"  # a scalar may be on the host


def test_views_and_writes_reach_the_same_memory():
    base = torch.zeros(4, 6, device="npu")
    base.t()[1].fill_(3)
    base.view(24)[0] = 7
    base[1:3].add_(1)
    expected = torch.zeros(4, 6)
    expected.t()[1].fill_(3)
    expected.view(24)[0] = 7
    expected[1:3].add_(1)
    assert torch.equal(base.cpu(), expected)
    out = torch.empty(0, device="npu")
    torch.add(base, base, out=out)
    assert torch.equal(out.cpu(), expected * 2)
    storage = base.untyped_storage()
    storage.resize_(0)
    storage.resize_(96)
    base.fill_(2)
    assert base.sum().item() == 48


def test_random_numbers_are_the_devices_own():
    torch.manual_seed(3)
    first = torch.randn(5, device="npu")
    host = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="npu"))
    assert torch.equal(host, torch.get_rng_state())
    state = torch.npu.get_rng_state()
    second = torch.randn(5, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(second, torch.randn(5, device="npu"))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="npu", generator=torch.Generator())
    assert torch.randn(2, device="npu", generator=torch.Generator(device="npu").manual_seed(1)).device.type == "npu"


def test_seconds_between_events():
    device = torch.device("npu")
    first, read = DeviceEvent(device), DeferredHostRead(torch.full((2,), 3.0, device=device))
    time.sleep(0.02)
    last = DeviceEvent(device)
    assert read.tolist() == [3.0, 3.0]
    assert 0.02 <= last.seconds_since(first) < 5.0
    assert last.seconds_since(first) == pytest.approx(last.seconds_since(read.ready) + read.ready.seconds_since(first))


def test_pinned_memory_streams_and_synchronisation():
    assert torch.empty(4, pin_memory=True).is_pinned()
    assert not torch.empty(4).is_pinned()
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        event = stream.record_event()
    assert torch.npu.current_stream() == torch.npu.default_stream()
    torch.npu.current_stream().wait_event(event)
    torch.npu.current_stream().wait_stream(stream)
    before = torch_npu._C.host_waits()
    tensor = torch.ones(3, device="npu")
    tensor.record_stream(stream)
    torch.empty(3, pin_memory=True).copy_(tensor, non_blocking=True)
    assert torch_npu._C.host_waits() == before
    tensor.sum().item()
    tensor.cpu()
    assert torch_npu._C.host_waits() == before + 2


def test_memory_is_counted():
    before = torch.npu.memory_allocated()
    tensor = torch.empty(1000, device="npu")
    assert torch.npu.memory_allocated() == before + 4000
    double = tensor + tensor
    assert torch.npu.memory_allocated() >= before + 8000
    torch.npu.reset_peak_memory_stats()
    del tensor, double
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() >= before + 8000


def test_autograd_and_fused_adamw():
    host, device = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).npu()
    device.load_state_dict(host.state_dict())
    data = torch.randn(6, 4)
    for module, inputs in ((host, data), (device, data.npu())):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        torch.nn.functional.gelu(module(inputs)).sum().backward()
        optimizer.step()
    assert torch.equal(device.weight.detach().cpu(), host.weight.detach())


def test_saving_and_loading():
    file = io.BytesIO()
    tensor = torch.randn(3, device="npu")
    torch.save(tensor, file)
    file.seek(0)
    assert torch.load(file).device.type == "npu"
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu"), tensor.cpu())
