"""The simulated operators refuse the arguments that the real ones' documentation excludes."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch_npu


def npu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="npu")


def attention(
    tokens: int = 6, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    given = {
        "query": npu(tokens, heads, 8, dtype=dtype), "key": npu(tokens, groups, 8, dtype=dtype),
        "value": npu(tokens, groups, 8, dtype=dtype), "head_num": heads, "input_layout": "TND",
        "actual_seq_qlen": [2, tokens], "actual_seq_kvlen": [2, tokens], **changes,
    }
    return torch_npu.npu_fusion_attention(**given)


def mask(size: int = 2048, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.ones(size, size, device="npu").triu(1).to(dtype)


@pytest.mark.parametrize(("changes", "message"), [
    ({"actual_seq_qlen": None}, "actual_seq_qlen"),
    ({"actual_seq_qlen": [2, 7], "actual_seq_kvlen": [2, 7]}, "ends at 7"),
    ({"actual_seq_qlen": [4, 2, 6], "actual_seq_kvlen": [4, 2, 6]}, "must not decrease"),
    ({"actual_seq_qlen": [6], "actual_seq_kvlen": [2, 6]}, "1 query sequences"),
    ({"actual_seq_qlen": [6] * 1025, "actual_seq_kvlen": [6] * 1025}, "at most 1024"),
    ({"heads": 5}, "not a multiple"),
    ({"head_num": 2}, "head_num"),
    ({"heads": 258}, "256"),
    ({"dtype": torch.float64}, "torch.float64"),
    ({"value": npu(6, 2, 8, dtype=torch.bfloat16)}, "types must be the same"),
    ({"key": npu(6, 2, 4), "value": npu(6, 2, 4)}, "different widths"),
    ({"input_layout": "NTD"}, "input_layout"),
    ({"atten_mask": mask(512), "sparse_mode": 3}, "2048"),
    ({"atten_mask": mask(dtype=torch.float32), "sparse_mode": 3}, "float32"),
    ({"atten_mask": ~mask(), "sparse_mode": 3}, "above the diagonal"),
], ids=str)
def test_attention(changes, message):
    attention()
    attention(atten_mask=mask(dtype=torch.uint8), sparse_mode=3)
    with pytest.raises(RuntimeError, match=message):
        attention(**changes)


def test_lengths_must_be_host_lists():
    with pytest.raises(RuntimeError, match="actual_seq_qlen"):
        attention(actual_seq_qlen=torch.tensor([2, 6]).npu())


def test_tokens_outside_all_sequences_are_nan():
    output = attention(actual_seq_qlen=[2, 4], actual_seq_kvlen=[2, 4])[0]
    assert output[:4].isfinite().all() and output[4:].isnan().all()


def test_without_a_mask_causal_mode_has_no_effect():
    """As documented: the mode alone masks nothing."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 2, 8, device="npu") for _ in range(3))

    def run(**options: Any) -> torch.Tensor:
        return torch_npu.npu_fusion_attention(
            query, key, value, 2, "TND", actual_seq_qlen=[6], actual_seq_kvlen=[6], **options
        )[0]

    assert torch.equal(run(sparse_mode=3), run())
    assert not torch.equal(run(sparse_mode=3, atten_mask=mask()), run())


def product(group_list: Any, tokens: int = 6, **changes: Any) -> Any:
    given = {"x": [npu(tokens, 4)], "weight": [npu(3, 4, 5)], "split_item": 3, "group_type": 0, "group_list_type": 0}
    if not isinstance(group_list, torch.Tensor):
        group_list = torch.tensor(group_list).npu()
    return torch_npu.npu_grouped_matmul(**{**given, "group_list": group_list, **changes})


@pytest.mark.parametrize(("group_list", "changes", "message"), [
    ([2, 1, 6], {}, "must not decrease"),
    ([2, 4, 5], {}, "ends at 5"),
    ([-1, 4, 6], {}, "negative"),
    ([2, 6], {}, "3 groups"),
    ([2, 2, 1], {"group_list_type": 1}, "ends at 5"),
    ([6], {"group_list_type": 1, "weight": [npu(1, 4, 5)]}, "length 1"),
    ([2, 4, 6], {"group_list_type": 2}, "group_list_type"),
    (torch.tensor([2, 4, 6], dtype=torch.int32, device="npu"), {}, "int32"),
    (torch.tensor([2, 4, 6]), {}, "cpu"),
    ([2, 4, 6], {"x": [npu(6, 4, dtype=torch.bfloat16)]}, "types must be the same"),
    ([2, 4, 6], {"x": [npu(4, 6).t()]}, "transposed"),
    ([2, 4, 6], {"weight": [npu(3, 5, 5)]}, "does not multiply"),
    ([2, 4, 6], {"weight": [npu(4, 5)]}, "3 are required"),
    ([2, 4, 6], {"split_item": 0}, "split_item"),
    ([2, 4, 6], {"group_type": None}, "group_type|groups along"),
    ([0, 0, 0], {"tokens": 0}, "empty"),
    ([2, 4, 6], {"weight": [npu(3, 4, 65536)]}, "65536"),
    ([2, 4, 6], {"group_type": 2, "x": [npu(4, 6)], "weight": [npu(6, 5)]}, "transposed matrix"),
], ids=str)
def test_grouped_matmul(group_list, changes, message):
    assert product([2, 2, 6])[0].shape == (6, 5)
    assert product([2, 0, 4], group_list_type=1)[0].shape == (6, 5)
    assert product([2, 2, 6], group_type=2, x=[npu(6, 4).t()], weight=[npu(6, 5)])[0].shape == (3, 4, 5)
    with pytest.raises(RuntimeError, match=message):
        product(group_list, **changes)


def test_grouped_matmul_has_no_derivative():
    weight = npu(3, 4, 5).requires_grad_()
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        product([2, 4, 6], weight=[weight])[0].sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize(("arguments", "message"), [
    ((npu(4, 8), torch.zeros(4, 2, dtype=torch.int64, device="npu")), "float32"),
    ((npu(4, 8, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int16, device="npu")), "int16"),
    ((npu(4, 8, dtype=torch.bfloat16), torch.full((4, 2), -1, device="npu")), "out of range"),
    ((npu(4, 8, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64, device="npu")), "do not belong"),
    ((npu(4, 8, dtype=torch.bfloat16), torch.zeros(4, 513, dtype=torch.int64, device="npu")), "512"),
    ((npu(0, 8, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64, device="npu")), "indices"),
])
def test_permute(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_moe_token_permute(*arguments)


def test_unpermute():
    permuted, indices = npu(8, 4, dtype=torch.bfloat16), torch.arange(8, dtype=torch.int32, device="npu")
    assert torch_npu.npu_moe_token_unpermute(permuted, indices, probs=npu(4, 2, dtype=torch.bfloat16)).shape == (4, 4)
    for changes, message in (
        ({"permuted_tokens": permuted.float()}, "float32"),
        ({"probs": npu(4, 2)}, "float32"),
        ({"probs": npu(3, 2, dtype=torch.bfloat16)}, "as many probs"),
        ({"sorted_indices": indices[:6]}, "differ in length"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch_npu.npu_moe_token_unpermute(**{"permuted_tokens": permuted, "sorted_indices": indices, **changes})


@pytest.mark.parametrize(("call", "message"), [
    (lambda: torch_npu.npu_rms_norm(npu(4, 8), npu(8, dtype=torch.bfloat16)), "types must be the same"),
    (lambda: torch_npu.npu_rms_norm(npu(8), npu(8)), "2 to 8"),
    (lambda: torch_npu.npu_rms_norm(npu(4, 8), npu(4)), "not the end"),
    (lambda: torch_npu.npu_rotary_mul(npu(4, 2, 8), npu(4, 1, 8), npu(4, 1, 8)), "axes, not 4"),
    (lambda: torch_npu.npu_rotary_mul(npu(1, 4, 2, 7), npu(1, 4, 1, 7), npu(1, 4, 1, 7)), "even"),
    (lambda: torch_npu.npu_rotary_mul(npu(1, 4, 2, 8), npu(1, 3, 1, 8), npu(1, 3, 1, 8)), "does not fit"),
    (lambda: torch_npu.npu_rotary_mul(
        npu(1, 4, 2, 8, dtype=torch.bfloat16), npu(1, 4, 1, 8), npu(1, 4, 1, 8)), "types must be the same"),
    (lambda: torch_npu.npu_rotary_mul(npu(1, 4, 2, 8), npu(1, 4, 1, 8), npu(1, 4, 1, 8), "quarter"), "rotary_mode"),
    (lambda: torch.ops.npu.npu_rotary_mul_backward(
        npu(30, 4, 40, 8), npu(30, 4, 40, 8), npu(1, 4, 1, 8), npu(1, 4, 1, 8)), "does not fit"),
    (lambda: torch_npu.npu_swiglu(npu(4, 7)), "halved"),
    (lambda: torch_npu.npu_swiglu(npu(4, 8, dtype=torch.float64)), "float64"),
])
def test_elementwise(call, message):
    torch_npu.npu_rotary_mul(npu(30, 4, 40, 8), npu(1, 4, 1, 8), npu(1, 4, 1, 8))  # without gradients it may be large
    with pytest.raises(RuntimeError, match=message):
        call()
