"""torch_npu's fused operators: attention, RMSNorm, rotary embedding, SwiGLU, experts, token permutation.

Arguments and limits are those of torch_npu's own documentation (``torch_npu/_op_plugin_docs.py``), for 2.7.1 to 2.13.
torch_npu is imported when a kernel runs, so that this module loads on any machine.

Legend: T tokens, N permuted tokens (sorted by expert), E experts, k experts per token, H hidden, I intermediate width,
Hq query heads, Hkv key/value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.attention import Segments
from mindspeed_mm.backend.kernels.experts import ExpertAdapters
from mindspeed_mm.backend.kernels.permutation import TokenPermuter

MAX_SEGMENTS = 1024  # sequences of one attention call in the packed layout
_CAUSAL = 3  # sparse_mode: the mask's diagonal ends at the lower right corner of each sequence
_MASK_SIZE = 2048  # edge of the compressed mask, which serves causal masks of any size
_SINGLE_OUTPUT = 3  # split_item of the grouped product: one result
_GROUPED_M, _GROUPED_K = 0, 2  # group_type: which axis of x [M, K] @ weight [K, N] the groups divide
_CUMULATIVE = 0  # group_list_type: where each group ends; the only one that may hold a single group


@functools.cache
def _causal_mask(device: torch.device) -> Tensor:
    """bool [2048, 2048], True where a key is hidden."""
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu_(1)


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """See :class:`mindspeed_mm.backend.kernels.attention.AttentionKernel`; takes the lengths as host lists."""
    ends = segments.cu_seqlens_host[1:]
    if len(ends) <= MAX_SEGMENTS:
        return _attend(query, key, value, ends, causal=causal, scale=scale)
    outputs, start = [], 0
    for first in range(0, len(ends), MAX_SEGMENTS):
        part = ends[first : first + MAX_SEGMENTS]
        tokens = slice(start, part[-1])
        relative = [end - start for end in part]
        outputs.append(_attend(query[tokens], key[tokens], value[tokens], relative, causal=causal, scale=scale))
        start = part[-1]
    return torch.cat(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, ends: list[int], *, causal: bool, scale: float) -> Tensor:
    """query [T, Hq, D], key and value [T, Hkv, D]; ``ends``: cumulative lengths, up to T."""
    import torch_npu

    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        atten_mask=_causal_mask(query.device) if causal else None,  # no mask: full attention
        scale=scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=_CAUSAL if causal else 0,
    )[0]


def npu_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rms_norm`; both of one type, hidden of 2 to 8 axes."""
    import torch_npu

    return torch_npu.npu_rms_norm(hidden, weight, epsilon=eps)[0]


def npu_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`mindspeed_mm.backend.kernels.elementwise.torch_rotary`.

    The operator takes four axes and one type: [1, T, heads, D] with [1, T, 1, D], in the wider of the two types.
    """
    import torch_npu

    dtype = torch.promote_types(tensor.dtype, cos.dtype)
    rotated = torch_npu.npu_rotary_mul(
        tensor.unsqueeze(0).to(dtype), cos.unsqueeze(0).to(dtype), sin.unsqueeze(0).to(dtype)
    )
    return rotated.squeeze(0).to(tensor.dtype)


def npu_swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2I] (gate columns, then up columns) -> silu(gate) * up [..., I]."""
    import torch_npu

    return torch_npu.npu_swiglu(gate_up, dim=-1)


def _grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, *, group_type: int) -> Tensor:
    import torch_npu

    return torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=ends, split_item=_SINGLE_OUTPUT, group_type=group_type, group_list_type=_CUMULATIVE
    )[0]


class _GroupedMatmul(torch.autograd.Function):
    """tokens [N, K] @ weight [E, K, M] by group; torch_npu's operator has no derivative, so both gradients are here."""

    @staticmethod
    def forward(ctx: Any, permuted: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(permuted, weight, ends)
        return _grouped_matmul(permuted, weight, ends, group_type=_GROUPED_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permuted, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_permuted = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_permuted = _grouped_matmul(grad, weight.transpose(1, 2), ends, group_type=_GROUPED_M)
        if ctx.needs_input_grad[1]:
            # one [K, M] matrix for each group of tokens, over which the product sums
            grad_weight = _grouped_matmul(permuted.t(), grad, ends, group_type=_GROUPED_K)
        return grad_permuted, grad_weight, None


def npu_grouped_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, *,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """See :class:`mindspeed_mm.backend.kernels.experts.ExpertKernel`; the token counts stay on the device."""
    if permuted.shape[0] == 0:
        # The operators need at least one token. The experts still take part in backward, with zero gradients.
        tensors = (gate_up, down, *(adapters or ())[:-1])
        return permuted + sum(tensor[:0].sum() for tensor in tensors).to(permuted.dtype)
    ends = tokens_per_expert.cumsum(0)

    def project(rows: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
        output = _GroupedMatmul.apply(rows, weight, ends)
        if not factors:
            return output
        lora_a, lora_b = factors
        thin = _GroupedMatmul.apply(rows, lora_a, ends)
        return torch.add(output, _GroupedMatmul.apply(thin, lora_b.transpose(1, 2), ends), alpha=adapters.scale)

    first, second = ((), ()) if adapters is None else (adapters[:2], adapters[2:4])
    return project(npu_swiglu(project(permuted, gate_up, first)), down, second)


class _SortedIndices(NamedTuple):
    """int32 [N], the place among the permuted tokens of each of the T * k choices."""

    sorted_indices: Tensor


class NpuTokenPermuter:
    """A ``TokenPermuter`` by ``npu_moe_token_permute`` and ``npu_moe_token_unpermute``.

    Both are documented for bfloat16 and at least one token; other inputs go to ``default``.
    """

    def __init__(self, default: TokenPermuter) -> None:
        self._default = default

    def count(self, experts: Tensor, num_experts: int) -> Tensor:
        """int64 [E]."""
        if experts.numel() == 0:
            return self._default.count(experts, num_experts)
        return torch.histc(experts.flatten(), bins=num_experts, min=0, max=num_experts).to(torch.int64)

    def permute(self, tokens: Tensor, experts: Tensor) -> tuple[Tensor, Any]:
        """[T, H] -> [N, H]."""
        if tokens.dtype is not torch.bfloat16 or experts.numel() == 0:
            return self._default.permute(tokens, experts)
        import torch_npu

        permuted, sorted_indices = torch_npu.npu_moe_token_permute(tokens, experts)
        return permuted, _SortedIndices(sorted_indices)

    def unpermute(self, permuted: Tensor, routing: Any, weights: Tensor | None = None) -> Tensor:
        """[N, H] -> [T, H]."""
        if not isinstance(routing, _SortedIndices):
            return self._default.unpermute(permuted, routing, weights)
        import torch_npu

        return torch_npu.npu_moe_token_unpermute(permuted, routing.sorted_indices, probs=weights)
