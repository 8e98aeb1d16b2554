"""Custom autograd functions and kernels against torch's autograd: values and every gradient."""

from __future__ import annotations

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.backend.kernels import compiled, elementwise, experts, permutation, registry
from mindspeed_mm.backend.kernels.attention import (
    MATH_MAX_SEQLEN,
    Segments,
    VarlenKernel,
    _matches_reference,
    _varlen_reference,
    eager_attention,
    math_attention,
    sdpa_attention,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter
from tests.helpers.mcore_model import relative

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
TYPES = list(BOUND)


def outcome(function, *inputs):
    """The result and the gradients of all floating-point inputs, for one fixed gradient of the result."""
    inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    result = function(*inputs)
    result.backward(torch.rand(result.shape, generator=torch.Generator().manual_seed(9)).to(result.dtype) - 0.3)
    return [result, *(value.grad for value in inputs if value.requires_grad)]


def agree(ours, theirs, dtype, *inputs):
    found, expected = (
        outcome(ours, *inputs),
        outcome(theirs, *(value.float() if value.is_floating_point() else value for value in inputs)),
    )
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert relative(one.float(), other) <= BOUND[dtype], index


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 16), (0, 24)])
def test_rms_norm(dtype, shape):
    hidden, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    if shape[0] == 0:
        assert elementwise.autograd_rms_norm(hidden, weight, 1e-6).shape == hidden.shape
        return
    agree(
        lambda x, w: elementwise.autograd_rms_norm(x, w, 1e-3),
        lambda x, w: elementwise.torch_rms_norm(x, w, 1e-3),
        dtype,
        hidden,
        weight,
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("angles", TYPES)
def test_rotary(dtype, angles):
    tensor = random(6, 3, 8, dtype=dtype)
    cos, sin = (random(6, 1, 8, dtype=angles, seed=seed) for seed in (1, 2))  # both halves differ
    found = outcome(lambda x: elementwise.autograd_rotary(x, cos, sin), tensor)
    expected = outcome(lambda x: elementwise.torch_rotary(x, cos.float(), sin.float()), tensor.float())
    assert all(relative(one.float(), other) <= BOUND[dtype] for one, other in zip(found, expected, strict=True))
    assert found[0].dtype == dtype
    inverse = outcome(lambda x: elementwise.autograd_rotary(x, cos, -sin), tensor)
    assert relative(inverse[1].float(), expected[1]) > 0.1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0]])
@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_experts(dtype, counts):
    inputs = random(10, 16, dtype=dtype), random(4, 16, 48, dtype=dtype, seed=1), random(4, 24, 16, dtype=dtype, seed=2)
    per_expert = torch.tensor(counts)
    agree(
        lambda *args: experts.grouped_experts(*args, per_expert),
        lambda *args: experts.reference_experts(*args, per_expert),
        dtype,
        *inputs,
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_swiglu(dtype):
    gate_up, grad = random(10, 48, dtype=dtype), random(10, 24, dtype=dtype, seed=1)
    swiglu = registry.swiglu_kernel(compiled=True)
    agreed = (
        [swiglu.forward(gate_up), *swiglu.backward(gate_up, grad)],
        [elementwise.eager_swiglu(gate_up), *elementwise.eager_swiglu_backward(gate_up, grad)],
    )
    for one, other in zip(*agreed, strict=True):
        assert one.dtype == dtype and relative(one.float(), other.float()) <= BOUND[dtype]


def test_missing_compiler_is_refused(monkeypatch):
    with pytest.raises(UserError, match="an NPU has fused operators"):
        compiled.check_compiler(device="npu")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="no g\\+\\+ or clang"):
        compiled.check_compiler(device="cpu")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 37, 18, 5], [40, 3, 0, 17], [1, 1, 1, 57], [60, 0, 0, 0]])
def test_padded_bucket_experts(dtype, counts):
    """Before an expert's tokens there are none, fewer than its span covers, or tokens of several experts."""
    inputs = (
        random(sum(counts), 16, dtype=dtype),
        random(4, 16, 48, dtype=dtype, seed=1),
        random(4, 24, 16, dtype=dtype, seed=2),
    )
    per_expert = torch.tensor(counts)
    agree(
        lambda *args: experts.padded_bucket_experts(*args, per_expert),
        lambda *args: experts.reference_experts(*args, per_expert),
        dtype,
        *inputs,
    )


def test_buckets_are_few():
    sizes = [experts._bucket_size(count) for count in range(1, 4097)]
    assert all(count <= size < count + max(16, count / 8) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 90


def test_expert_kernel_by_device_and_type():
    def name(device, dtype, fused=True):
        sizes = {"hidden_size": 16, "intermediate_size": 24}
        return registry.expert_kernel_name(fused=fused, **sizes, device=device, dtype=dtype)

    grouped = "grouped_mm" if hasattr(torch.nn.functional, "grouped_mm") else "reference"
    assert [name("cpu", torch.float32), name("cuda", torch.bfloat16)] == [grouped] * 2
    assert name("cpu", torch.bfloat16) == "padded_bucket"
    assert name("cpu", torch.bfloat16, fused=False) == name("cuda", torch.bfloat16, fused=False) == "reference"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("combine", [permutation.embedding_bag_combine, permutation.gather_combine])
def test_permute_and_unpermute(dtype, combine):
    experts_of = torch.tensor([[2, 0], [1, 2], [0, 3], [2, 1], [3, 2]])
    tokens, weights = random(5, 12, dtype=dtype), torch.rand(5, 2).to(dtype)
    permuter = IndexPermuter(combine)

    def through_permuter(tokens, weights):
        permuted, routing = permuter.permute(tokens, experts_of)
        assert torch.equal(permuter.count(experts_of, 4), torch.tensor([2, 2, 4, 2]))
        return permuter.unpermute(permuted * torch.arange(10)[:, None], routing, weights)

    def reference(tokens, weights):
        order = experts_of.flatten().argsort(stable=True)
        moved = tokens[order // 2] * torch.arange(10)[:, None] * weights.flatten()[order][:, None]
        return torch.zeros_like(tokens).index_add(0, order // 2, moved)

    agree(through_permuter, reference, dtype, tokens, weights)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [4, 4], [32, 40], [3, MATH_MAX_SEQLEN + 1]], ids=str)
@pytest.mark.parametrize("kernel", [math_attention, sdpa_attention])
def test_attention(kernel, lengths, causal, dtype):
    offsets = [0, *itertools.accumulate(lengths)]
    segments = Segments(torch.tensor(offsets, dtype=torch.int32), offsets, max(lengths))
    inputs = random(offsets[-1], 4, 8, dtype=dtype), *(random(offsets[-1], 2, 8, dtype=dtype, seed=i) for i in (1, 2))
    options = {"segments": segments, "causal": causal, "scale": 0.3}
    agree(lambda *args: kernel(*args, **options), lambda *args: eager_attention(*args, **options), dtype, *inputs)


def test_attention_names_on_a_cpu(caplog):
    names = (None, "math", "products")  # products is an alias
    assert {registry.attention_kernel(name, device="cpu") for name in names} == {math_attention}
    with pytest.raises(UserError, match="attn_implementation 'varlen' is not available on cpu; choose one of eager, "):
        registry.attention_kernel("varlen", device="cpu")
    with caplog.at_level("INFO"):  # the recipe's name for exact attention over packed sequences
        assert registry.attention_kernel("flash_attention_2", device="cpu") is math_attention
    assert "attn_implementation flash_attention_2: this cpu has no such kernel; math computes" in caplog.text


def varlen_of(version):
    """``varlen_attn`` with the signature of one torch version, in plain arithmetic."""
    seen = SimpleNamespace(options={})

    def function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        seen.options = options
        causal = options.get("window_size") == (-1, 0) or options.get("is_causal", False)
        assert causal and set(options) <= version
        if "enable_gqa" in version and query.shape[1] != key.shape[1]:
            assert options["enable_gqa"]
        return _varlen_reference(query, key, value, cu_seq_q, max_q, causal=True, scale=options.get("scale", 0.125))

    return function, seen


@pytest.mark.parametrize("version", ["is_causal", "scale window_size", "scale window_size enable_gqa"])
@pytest.mark.parametrize("repeat_heads", [False, True])
def test_varlen_is_called_with_each_torch_signature(version, repeat_heads):
    options = frozenset(version.split())
    function, seen = varlen_of(options)
    with torch.device("meta"):  # as during model building
        assert _matches_reference(VarlenKernel(function, options, repeat_heads), "cpu")
    assert ("enable_gqa" in seen.options) == ("enable_gqa" in options and not repeat_heads)


def test_wrong_or_failing_varlen_is_not_used():
    def without_causality(query, key, value, offsets, _, longest, __, **options):
        segments = Segments(offsets, offsets.tolist(), longest)
        return eager_attention(query, key, value, segments=segments, causal=False, scale=0.125)

    def failing(*_, **__):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    for function in (without_causality, failing):
        assert not _matches_reference(VarlenKernel(function, frozenset({"window_size", "scale"})), "cpu")
