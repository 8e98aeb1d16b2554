"""The Triton kernels between the joint projection and attention against the same formulas in float64.

They run in Triton's interpreter on the CPU; with TRITON_INTERPRET=0 in the environment, on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from mindspeed_mm.backend.kernels.elementwise import torch_rotary  # noqa: E402
from mindspeed_mm.backend.kernels.triton_rotary import norm_rotary_split  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
TYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
# tokens, groups, queries per group, width: the model's two kinds of head; few tokens; halves that are no power of two
SHAPES = [(17, 2, 8, 128), (17, 4, 1, 72), (1, 1, 1, 2), (40, 3, 2, 24), (9, 5, 2, 30)]


def random(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs_of(shape, dtype, *, norm=True, angle_dtype=None):
    """mixed, the weights, cosines and sines; these of no real angles, so that a wrong half does not go unnoticed."""
    tokens, groups, queries, width = shape
    weights = [random(width, dtype=dtype, seed=seed) if norm else None for seed in (1, 2)]
    angles = [random(tokens, 1, width, dtype=angle_dtype or dtype, seed=seed) for seed in (3, 4)]
    return [random(tokens, groups * (queries + 2) * width, dtype=dtype), *weights, *angles]


def grads_of(shape, dtype):
    tokens, groups, queries, width = shape
    return [random(tokens, count, width, dtype=dtype, seed=5 + count) for count in (groups * queries, groups, groups)]


def ours(shape, mixed, query_weight, key_weight, cos, sin):
    _, groups, queries, width = shape
    return norm_rotary_split(
        mixed, query_weight, key_weight, cos, sin,
        eps=EPS, num_query_groups=groups, queries_per_group=queries, head_dim=width,
    )  # fmt: skip


def theirs(shape, mixed, query_weight, key_weight, cos, sin):
    """megatron-core's split, and one operator after the other."""
    tokens, groups, queries, width = shape
    by_group = mixed.view(tokens, groups, (queries + 2) * width)
    query, key, value = torch.split(by_group, [queries * width, width, width], dim=2)
    query = query.reshape(tokens, groups * queries, width)
    if query_weight is not None:
        query = F.rms_norm(query, (width,), query_weight, EPS)
        key = F.rms_norm(key, (width,), key_weight, EPS)
    return torch_rotary(query, cos, sin), torch_rotary(key, cos, sin), value


def step(function, shape, inputs, grads, learned=(0, 1, 2)):
    """Results of ``function`` and gradients of the learned ones of ``inputs``, None for what has none."""
    inputs = [
        value.detach().clone().requires_grad_() if index in learned and value is not None else value
        for index, value in enumerate(inputs)
    ]
    results = function(shape, *inputs)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    gradients = [value.grad for value in inputs[:3] if value is not None]
    return [*(result.detach() for result in results), *gradients]


def relative(found, expected):
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference else 0.0


def in_bf16(tensor):
    """As a kernel stores it: Triton's interpreter cuts off the bits that do not fit, a GPU rounds to nearest."""
    if DEVICE == "cpu":
        return (tensor.float().view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
    return tensor.bfloat16()


def agree(shape, inputs, grads, learned=(0, 1, 2)):
    """Against float64; in bf16 also against what torch's operators make of it."""
    found = step(ours, shape, inputs, grads, learned)
    by_torch = step(theirs, shape, inputs, grads, learned)
    exact = step(theirs, shape, [None if value is None else value.double() for value in inputs],
                 [None if grad is None else grad.double() for grad in grads], learned)  # fmt: skip
    dtype = inputs[0].dtype
    for index, (one, best, other) in enumerate(zip(found, exact, by_torch, strict=True)):
        if best is None:
            assert one is None or not one.any(), index
            continue
        assert one.shape == best.shape and one.dtype == dtype, index
        limit = 2e-6
        if dtype == torch.bfloat16:
            limit = min(1e-2, 1.5 * max(relative(other, best), relative(in_bf16(best), best)))
        assert relative(one, best) <= limit, index


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, norm, dtype):
    agree(shape, inputs_of(shape, dtype, norm=norm), grads_of(shape, dtype))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
def test_angles_in_fp32_with_heads_in_bf16(norm):
    shape = SHAPES[1]
    inputs = inputs_of(shape, torch.bfloat16, norm=norm, angle_dtype=torch.float32)
    agree(shape, inputs, grads_of(shape, torch.bfloat16))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_results_without_gradient(used, norm):
    shape = SHAPES[3]
    grads = [grad if index in used else None for index, grad in enumerate(grads_of(shape, torch.float32))]
    agree(shape, inputs_of(shape, torch.float32, norm=norm), grads)


@pytest.mark.parametrize("learned", [(0,), (1, 2), (0, 2), (1,)], ids=str)
def test_inputs_without_gradient(learned):
    shape = SHAPES[3]
    grads = grads_of(shape, torch.float32)
    # what has no history in the reference
    grads = [grad if 0 in learned or index + 1 in learned else None for index, grad in enumerate(grads)]
    agree(shape, inputs_of(shape, torch.float32), grads, learned)


@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_need_not_be_contiguous(dtype):
    shape = SHAPES[4]
    grads = grads_of(shape, dtype)
    grads[0] = torch.ones((), dtype=dtype, device=DEVICE).expand(grads[0].shape)
    grads[1] = grads[1].transpose(0, 1).contiguous().transpose(0, 1)
    grads[2] = grads[2].expand(2, *grads[2].shape).movedim(0, 3)[..., 0]
    mixed, *rest = inputs_of(shape, dtype)
    agree(shape, [mixed, *rest], grads)
    strided = [torch.stack((value, value), dim=-1)[..., 0] for value in (mixed, *rest)]
    for one, other in zip(ours(shape, *strided), ours(shape, mixed, *rest), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
def test_no_tokens(norm):
    shape = (0, 2, 3, 24)
    inputs, grads = inputs_of(shape, torch.float32, norm=norm), grads_of(shape, torch.float32)
    query, key, value, *grads = step(ours, shape, inputs, grads)
    assert (query.shape, key.shape, value.shape) == ((0, 6, 24), (0, 2, 24), (0, 2, 24))
    assert grads[0].shape == (0, 240)
    assert [grad.tolist() for grad in grads[1:]] == ([[0.0] * 24] * 2 if norm else [])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
def test_what_is_kept_for_backward(norm):
    shape = SHAPES[1]
    mixed, *rest = inputs_of(shape, torch.float32, norm=norm)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen = ours(shape, mixed, *rest)
        assert not kept and all(result.grad_fn is None for result in frozen)
        mixed.requires_grad_()
        query, key, value = ours(shape, mixed, *rest)
    expected = [*([mixed] if norm else []), *(tensor for tensor in rest if tensor is not None)]
    assert kept == [tensor.data_ptr() for tensor in expected]
    # a value that is part of mixed would keep it
    assert (value.untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr()) == norm
    assert query.is_contiguous() and key.is_contiguous() and value.stride(2) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    shape = SHAPES[3]
    inputs, grads = inputs_of(shape, torch.float32), grads_of(shape, torch.float32)

    def checkpointed(shape, *inputs):
        return checkpoint(lambda *values: ours(shape, *values), *inputs, use_reentrant=use_reentrant)

    for one, other in zip(step(checkpointed, shape, inputs, grads), step(ours, shape, inputs, grads), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_both_norms_or_none():
    shape = SHAPES[2]
    mixed, query_weight, _, cos, sin = inputs_of(shape, torch.float32)
    with pytest.raises(ValueError, match="a norm each"):
        ours(shape, mixed, query_weight, None, cos, sin)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "rotation"])
def test_bf16_is_fp32_rounded_once(norm):
    shape = SHAPES[4]
    inputs, grads = inputs_of(shape, torch.bfloat16, norm=norm), grads_of(shape, torch.bfloat16)
    in_fp32 = step(ours, shape, [None if value is None else value.float() for value in inputs],
                   [grad.float() for grad in grads])  # fmt: skip
    # without the gradients of weights, which are summed in another order; a GPU may also sum columns in another
    for one, other in zip(step(ours, shape, inputs, grads)[:4], in_fp32[:4], strict=True):
        assert relative(one, in_bf16(other)) <= (0 if DEVICE == "cpu" else 1e-4)
