"""Every NPU kernel against the reference on the CPU: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch_npu

from mindspeed_mm.backend.kernels import npu
from mindspeed_mm.backend.kernels.attention import Segments, eager_attention
from mindspeed_mm.backend.kernels.elementwise import torch_rms_norm, torch_rotary
from mindspeed_mm.backend.kernels.experts import ExpertAdapters, reference_experts
from mindspeed_mm.backend.kernels.registry import (
    attention_kernel,
    expert_kernel,
    expert_kernel_name,
    rms_norm_kernel,
    rotary_kernel,
    token_permuter,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter
from tests.helpers.npu_environment import host_synchronisations

TOLERANCE = 2e-6  # fp32, another summation order


def pairs(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Leaves with the same values on the host and on the device."""
    host = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    return host, [tensor.detach().npu().requires_grad_(tensor.is_floating_point()) for tensor in tensors]


def check(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.device.type == "npu" and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference = (ours.detach().cpu().float() - theirs.detach().float()).norm()
    assert difference <= tolerance * theirs.detach().float().norm(), float(difference)


def check_gradients(device: list[torch.Tensor], host: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(device, host, strict=True):
        check(ours.grad, theirs.grad, tolerance)


def segments(lengths: list[int], device: str) -> Segments:
    offsets = [0, *itertools.accumulate(lengths)]
    return Segments(torch.tensor(offsets, dtype=torch.int32, device=device), offsets, max(lengths))


@pytest.mark.parametrize("causal", [True, False], ids=["text", "vision"])
@pytest.mark.parametrize("lengths", [[5], [3, 1, 4, 0, 2]], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (8, 1, 16), (3, 3, 72)])
def test_attention(causal, lengths, heads, groups, width):
    torch.manual_seed(0)
    total = sum(lengths)
    host, device = pairs(*(torch.randn(total, count, width) for count in (heads, groups, groups)))
    weight = torch.randn(total, heads, width)
    kept = [length for length in lengths if length]
    theirs = eager_attention(*host, segments=segments(kept, "cpu"), causal=causal, scale=width**-0.5)
    ours = attention_kernel(None, device="npu")(
        *device, segments=segments(lengths, "npu"), causal=causal, scale=width**-0.5
    )
    check(ours, theirs)
    (theirs * weight).sum().backward()
    (ours * weight.npu()).sum().backward()
    check_gradients(device, host)


def test_attention_over_more_segments_than_one_call(monkeypatch):
    torch.manual_seed(1)
    lengths = [1 + index % 3 for index in range(npu.MAX_SEGMENTS + 5)]
    host, device = pairs(*(torch.randn(sum(lengths), 2, 4) for _ in range(3)))
    calls, real = [], torch_npu.npu_fusion_attention
    monkeypatch.setattr(
        torch_npu, "npu_fusion_attention", lambda *args, **keywords: calls.append(1) or real(*args, **keywords)
    )
    theirs = eager_attention(*host, segments=segments(lengths, "cpu"), causal=True, scale=0.5)
    ours = npu.npu_fusion_attention(*device, segments=segments(lengths, "npu"), causal=True, scale=0.5)
    assert len(calls) == 2
    check(ours, theirs)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    check_gradients(device, host)


def test_attention_names():
    fused = attention_kernel(None, device="npu")
    assert attention_kernel("npu_fusion_attention", device="npu") is fused
    assert attention_kernel("flash_attention_2", device="npu") is fused  # the name in the recipe's files
    assert attention_kernel("sdpa", device="npu") is not fused
    with pytest.raises(UserError, match="not available on cpu; choose one of eager, "):
        attention_kernel("npu_fusion_attention", device="cpu")


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [10, 0, 0, 0], [0, 0, 0, 1], [6]], ids=str)
def test_grouped_experts(counts):
    torch.manual_seed(2)
    experts, hidden, inner = len(counts), 8, 12
    host, device = pairs(
        torch.randn(sum(counts), hidden), torch.randn(experts, hidden, 2 * inner), torch.randn(experts, inner, hidden)
    )
    weight = torch.randn(sum(counts), hidden)
    theirs = reference_experts(*host, torch.tensor(counts))
    name = expert_kernel_name(
        fused=True, hidden_size=hidden, intermediate_size=inner, device="npu", dtype=torch.bfloat16
    )
    assert name == "npu_grouped_matmul"
    before = host_synchronisations()
    ours = expert_kernel(name, device="npu")(*device, torch.tensor(counts).npu())
    (ours * weight.npu()).sum().backward()
    assert host_synchronisations() == before  # the counts stay on the device
    (theirs * weight).sum().backward()
    check(ours, theirs)
    check_gradients(device, host)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0]], ids=str)
def test_grouped_experts_with_adapters(counts):
    torch.manual_seed(2)
    experts, hidden, inner, rank = len(counts), 8, 12, 3
    widths = [(hidden, 2 * inner), (inner, hidden), (hidden, rank), (2 * inner, rank), (inner, rank), (hidden, rank)]
    host, device = pairs(torch.randn(sum(counts), hidden), *(torch.randn(experts, *shape) for shape in widths))
    weight = torch.randn(sum(counts), hidden)
    theirs = reference_experts(*host[:3], torch.tensor(counts), adapters=ExpertAdapters(*host[3:], 0.5))
    before = host_synchronisations()
    kernel = expert_kernel("npu_grouped_matmul", device="npu")
    ours = kernel(*device[:3], torch.tensor(counts).npu(), adapters=ExpertAdapters(*device[3:], 0.5))
    (ours * weight.npu()).sum().backward()
    assert host_synchronisations() == before
    (theirs * weight).sum().backward()
    check(ours, theirs)
    check_gradients(device, host)


def test_experts_without_tokens_get_zero_gradients():
    _, device = pairs(torch.empty(0, 8), torch.randn(4, 8, 24), torch.randn(4, 12, 8))
    counts = torch.zeros(4, dtype=torch.int64).npu()
    output = expert_kernel("npu_grouped_matmul", device="npu")(*device, counts)
    assert output.shape == (0, 8)
    output.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in device)


def test_frozen_experts_get_no_gradient():
    _, device = pairs(torch.randn(5, 8), torch.randn(2, 8, 24), torch.randn(2, 12, 8))
    for weight in device[1:]:
        weight.requires_grad_(False)
    expert_kernel("npu_grouped_matmul", device="npu")(*device, torch.tensor([2, 3]).npu()).sum().backward()
    assert device[0].grad is not None and device[1].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_permutation(dtype, top_k):
    """Small integers, whose sums are exact in bf16 too, so the results are equal bit for bit."""
    torch.manual_seed(3)
    tokens, weights = (torch.randint(-2, 3, shape).to(dtype) for shape in ((9, 8), (9, top_k)))
    experts = torch.stack([torch.randperm(6)[:top_k] for _ in range(9)])
    factor = torch.randint(-2, 3, (9, 8)).to(dtype)
    plain, fused = IndexPermuter(), token_permuter(IndexPermuter(), fused=True, device="npu")
    assert isinstance(fused, npu.NpuTokenPermuter)
    results = []
    before = host_synchronisations()
    for permuter, values in zip((plain, fused), pairs(tokens, weights), strict=True):
        own = values[0].device
        permuted, routing = permuter.permute(values[0], experts.to(own))
        output = permuter.unpermute(permuted * 2, routing, values[1])
        (output * factor.to(own)).sum().backward()
        results.append([permuted, output, values[0].grad, values[1].grad, permuter.count(experts.to(own), 6)])
    assert host_synchronisations() == before
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.device.type == "npu" and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpermute_inverts_permute(dtype):
    """As expert parallelism does with tokens from other ranks."""
    tokens = torch.arange(24, dtype=torch.float32).view(6, 4).to(dtype).npu().requires_grad_()
    permuter = token_permuter(IndexPermuter(), fused=True, device="npu")
    permuted, routing = permuter.permute(tokens, torch.tensor([[2], [0], [1], [0], [2], [0]]).npu())
    assert permuted[:, 0].tolist() == [4, 12, 20, 8, 0, 16]
    back = permuter.unpermute(permuted, routing)
    assert torch.equal(back, tokens)
    (back * tokens.detach()).sum().backward()
    assert torch.equal(tokens.grad, tokens.detach())


def test_permutation_of_no_tokens():
    permuter = token_permuter(IndexPermuter(), fused=True, device="npu")
    tokens = torch.empty(0, 4, dtype=torch.bfloat16, device="npu", requires_grad=True)
    experts = torch.empty(0, 1, dtype=torch.int64, device="npu")
    permuted, routing = permuter.permute(tokens, experts)
    assert permuter.count(experts, 3).tolist() == [0, 0, 0]
    permuter.unpermute(permuted, routing).sum().backward()
    assert tokens.grad.shape == (0, 4)


def test_reference_experts_use_no_fused_operator():
    plain = IndexPermuter()
    assert (
        token_permuter(plain, fused=False, device="npu") is plain
        and token_permuter(plain, fused=True, device="cpu") is plain
    )
    assert (
        expert_kernel_name(fused=False, hidden_size=8, intermediate_size=8, device="npu", dtype=torch.bfloat16)
        == "reference"
    )


@pytest.mark.parametrize("shape", [(6, 16), (6, 1, 16), (6, 4, 16)], ids=str)
def test_rms_norm(shape):
    torch.manual_seed(4)
    host, device = pairs(torch.randn(shape), torch.randn(16))
    factor = torch.randn(shape)
    theirs, ours = torch_rms_norm(*host, 1e-6), rms_norm_kernel(device="npu")(*device, 1e-6)
    check(ours, theirs)
    (theirs * factor).sum().backward()
    (ours * factor.npu()).sum().backward()
    check_gradients(device, host)


@pytest.mark.parametrize(
    ("tensor_type", "angle_type"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("width", [8, 72])
def test_rotary(tensor_type, angle_type, width):
    torch.manual_seed(5)
    (tensor,), (ours,) = pairs(torch.randn(7, 3, width).to(tensor_type))
    angles = torch.randn(7, 1, width)
    cos, sin = angles.cos().to(angle_type), angles.sin().to(angle_type)
    factor = torch.randn(7, 3, width).to(tensor_type)
    expected, result = torch_rotary(tensor, cos, sin), rotary_kernel(device="npu")(ours, cos.npu(), sin.npu())
    # with bf16 angles the CPU rounds each product, the operator only the sum
    tolerance = 1e-2 if angle_type is torch.bfloat16 else 4e-3 if tensor_type is torch.bfloat16 else TOLERANCE
    check(result, expected, tolerance)
    (expected * factor).sum().backward()
    (result * factor.npu()).sum().backward()
    check_gradients([ours], [tensor], tolerance)
