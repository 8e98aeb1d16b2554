"""npu_moe_token_permute, npu_moe_token_unpermute and npu_grouped_matmul.

Legend: T tokens, k experts per token, H width, R = T * k permuted tokens, E groups, M rows, K and N axes of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_npu._operators.checks import FLOATS, demand, demand_same_type, demand_type

LARGEST_INDEX = 16777215
INNER_LIMIT = 65536
MOST_GROUPS = 1024


def permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens sorted by expert, and for each of the T * k choices its place among them."""
    demand(not padded_mode, "padded_mode only supports False")
    demand_type("tokens", tokens, (torch.bfloat16,))
    demand_type("indices", indices, (torch.int64, torch.int32))
    demand(tokens.dim() == 2, f"The dims of input tokens should be 2 dimensional, but got {tokens.dim()}-dimensional.")
    demand(indices.dim() in (1, 2), f"indices has {indices.dim()} axes; 1 or 2 are supported")
    demand(indices.shape[0] == tokens.shape[0], f"indices {indices.shape} do not belong to tokens {tokens.shape}")
    demand(0 < indices.numel() < LARGEST_INDEX, f"{indices.numel()} indices; 1 to {LARGEST_INDEX - 1} are supported")
    demand(0 <= int(indices.min()) and int(indices.max()) < LARGEST_INDEX, "an index is out of range")
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    demand(top_k <= 512, f"top-k is {top_k}; at most 512 is supported")
    order = indices.flatten().argsort(stable=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(order.numel(), dtype=torch.int32)
    requested = 0 if num_out_tokens is None else num_out_tokens
    kept = min(requested, order.numel()) if requested > 0 else order.numel() + requested
    return tokens[order[:kept] // top_k], places


def permute_grad(
    tokens: Tensor, grad_permuted_tokens: Tensor, indices: Tensor, sorted_indices: Tensor, padded_mode: bool = False
) -> Tensor:
    demand_type("grad_permuted_tokens", grad_permuted_tokens, (torch.bfloat16,))
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    kept = grad_permuted_tokens.shape[0]
    padded = torch.cat((grad_permuted_tokens.float(), torch.zeros(1, tokens.shape[1])))
    places = sorted_indices.long().clamp(max=kept)
    return padded[places].view(-1, top_k, tokens.shape[1]).sum(1).to(tokens.dtype)


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """[T, H]: each token's sum of its permuted tokens, weighted by probability."""
    demand(not padded_mode, "padded_mode only supports False")
    demand_type("permuted_tokens", permuted_tokens, (torch.bfloat16,))
    demand_type("sorted_indices", sorted_indices, (torch.int32, torch.int64))
    demand(permuted_tokens.dim() == 2 and sorted_indices.dim() == 1, "permuted_tokens must be 2-, sorted_indices 1-D")
    demand(permuted_tokens.shape[0] > 0, "permuted_tokens is empty")
    demand(sorted_indices.numel() == permuted_tokens.shape[0], "sorted_indices and permuted_tokens differ in length")
    top_k = 1
    if probs is not None:
        demand_type("probs", probs, (torch.bfloat16,))
        demand(probs.dim() == 2, f"The dims of input probs should be 2 dimensional, but got {probs.dim()}-dimensional.")
        demand(probs.numel() == sorted_indices.numel(), "as many probs as sorted_indices are required")
        top_k = probs.shape[1]
    choices = permuted_tokens[sorted_indices.long()].float().view(-1, top_k, permuted_tokens.shape[1])
    if probs is not None:
        choices = choices * probs.float().unsqueeze(-1)
    return choices.sum(1).to(permuted_tokens.dtype)


def unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    demand_type("grad_unpermuted_tokens", grad_unpermuted_tokens, (torch.bfloat16,))
    top_k = 1 if probs is None else probs.shape[1]
    places = sorted_indices.long()
    grad = grad_unpermuted_tokens.float().repeat_interleave(top_k, dim=0)
    grad_probs = torch.empty(0, dtype=permuted_tokens.dtype)
    if probs is not None:
        grad_probs = (grad * permuted_tokens[places].float()).sum(1).view_as(probs).to(probs.dtype)
        grad = grad * probs.float().flatten().unsqueeze(1)
    grad_permuted = torch.empty_like(permuted_tokens)
    grad_permuted[places] = grad.to(permuted_tokens.dtype)
    return grad_permuted, grad_probs


def grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor | None = None, split_item: int = 0,
    group_type: int | None = None, group_list_type: int = 0, act_type: int = 0, output_dtype: Any = None,
    bias: list[Tensor] | None = None, **unsupported: Any,
) -> list[Tensor]:
    """One x, one weight, one result: products grouped along M (0), or along K (2), which gives one matrix a group."""
    used = [name for name, value in unsupported.items() if value is not None]
    demand(not used and not bias and not act_type and output_dtype is None, f"not simulated: {used or 'bias, act'}")
    demand(len(x) == len(weight) == 1, "the simulated npu_grouped_matmul takes one x and one weight")
    demand(group_type in (0, 2), f"the simulated npu_grouped_matmul groups along 0 or 2, not {group_type}")
    demand(split_item in (2, 3), f"split_item {split_item} does not give one tensor; 2 and 3 do")
    (left,), (right,) = x, weight
    demand_type("x", left, FLOATS)
    demand_same_type(x=left, weight=right)
    demand(left.dim() == 2, f"x has {left.dim()} axes, not 2")
    demand(group_list is not None, "group_list must be given")
    ends = _ends(group_list, group_list_type, total=left.shape[0 if group_type == 0 else 1])
    if group_type == 0:
        return [_along_rows(left, right, ends)]
    return [_along_inner(left, right, ends)]


def _ends(group_list: Tensor, kind: int, *, total: int) -> list[int]:
    """End of each group."""
    demand(kind in (0, 1), f"group_list_type only support 0(cumsum) or 1(count), but got {kind}")
    demand_type("group_list", group_list, (torch.int64,))
    demand(group_list.dim() == 1, f"group_list has {group_list.dim()} axes, not 1")
    demand(0 < group_list.numel() <= MOST_GROUPS, f"{group_list.numel()} groups; at most {MOST_GROUPS} are supported")
    demand(kind == 0 or group_list.numel() > 1, "a group_list of counts must not have length 1")
    values = group_list.tolist()
    demand(min(values) >= 0, f"group_list has a negative value: {values}")
    ends = values if kind == 0 else torch.tensor(values).cumsum(0).tolist()
    demand(ends == sorted(ends), f"group_list of type 0 must not decrease: {values}")
    demand(ends[-1] == total, f"group_list ends at {ends[-1]}, not at the {total} rows that there are")
    return ends


def _along_rows(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    demand(x.shape[0] > 0, "x is empty")
    demand(x.is_contiguous(), "x must not be transposed where group_type is 0")
    demand(weight.dim() == 3, f"weight has {weight.dim()} axes; with one x, 3 are required")
    demand(weight.is_contiguous() or weight.transpose(1, 2).is_contiguous(), "weight is neither plain nor transposed")
    demand(weight.shape[0] == len(ends), f"weight has {weight.shape[0]} groups, group_list {len(ends)}")
    demand(weight.shape[1] == x.shape[1], f"x {tuple(x.shape)} does not multiply weight {tuple(weight.shape)}")
    inner = weight.shape[2] if weight.is_contiguous() else weight.shape[1]
    demand(max(x.shape[1], inner) < INNER_LIMIT, f"an inner axis has {INNER_LIMIT} or more")
    result = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends):
        result[start:end] = x[start:end] @ weight[group]
        start = end
    return result


def _along_inner(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    demand(x.shape[1] > 0, "x is empty")
    demand(x.t().is_contiguous(), "x must be a transposed matrix where group_type is 2")
    demand(weight.dim() == 2, f"weight has {weight.dim()} axes; 2 are required where group_type is 2")
    demand(weight.is_contiguous(), "weight must be contiguous where group_type is 2")
    demand(weight.shape[0] == x.shape[1], f"x {tuple(x.shape)} does not multiply weight {tuple(weight.shape)}")
    demand(max(x.shape[0], weight.shape[1]) < INNER_LIMIT, f"an inner axis has {INNER_LIMIT} or more")
    result = x.new_zeros(len(ends), x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends):
        result[group] = x[:, start:end] @ weight[start:end]
        start = end
    return result


def _keep_permute(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _permute_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    tokens, indices, places = ctx.saved_tensors
    return torch.ops.npu.npu_moe_token_permute_grad(tokens, grad, indices, places), None, None, None


def _keep_unpermute(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.with_probs = inputs[2] is not None
    ctx.save_for_backward(*inputs[: 3 if ctx.with_probs else 2])


def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    permuted, sorted_indices, *probs = ctx.saved_tensors
    grad_permuted, grad_probs = torch.ops.npu.npu_moe_token_unpermute_grad(permuted, grad, sorted_indices, *probs)
    return grad_permuted, None, grad_probs if ctx.with_probs else None, None, None


IMPLEMENTATIONS = {
    "npu_moe_token_permute": permute,
    "npu_moe_token_permute_grad": permute_grad,
    "npu_moe_token_unpermute": unpermute,
    "npu_moe_token_unpermute_grad": unpermute_grad,
    "npu_grouped_matmul": grouped_matmul,
}
DERIVATIVES = {
    "npu_moe_token_permute": (_permute_gradient, _keep_permute),
    "npu_moe_token_unpermute": (_unpermute_gradient, _keep_unpermute),
}
