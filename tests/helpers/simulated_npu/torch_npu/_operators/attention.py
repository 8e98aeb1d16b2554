"""npu_fusion_attention.

Legend: T packed tokens, B sequences, S tokens of one, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_npu._operators.checks import FLOATS, demand, demand_same_type, demand_type

COMPRESSED = 2048
MOST_SEQUENCES = 1024  # "varlen: at most 1K"
LONGEST = 2**20
COLUMNS = 8  # softmax_max and softmax_sum repeat each number
CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = 2, 3

Slices = tuple[Any, Any]


def attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 2**31 - 1, next_tockens: int = 2**31 - 1, inner_precise: int = 0,
    prefix: list[int] | None = None, actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0, *unused: Any, **unsupported: Any,
) -> tuple[Any, ...]:
    """(attention, softmax max, softmax sum, reserved, seed, offset, length of the dropout mask)."""
    demand(pse is None and padding_mask is None and prefix is None, "pse, padding_mask and prefix are not simulated")
    demand(keep_prob == 1.0, "dropout is not simulated")
    demand(not any(name in unsupported for name in ("sink", "dropout_mask")), "sink and dropout_mask are not simulated")
    _check(query, key, value, head_num, input_layout)
    _check_mask(atten_mask, sparse_mode, input_layout)
    output = torch.full_like(query, float("nan"))  # tokens outside all sequences are never written
    shape = _statistics_shape(query, head_num, input_layout)
    highest, total = torch.zeros(shape), torch.zeros(shape)
    for index in _sequences(query, key, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = index.query(query), index.key(key), index.key(value)
        scores = _scores(q, k, scale, _mask(atten_mask, sparse_mode, index, q.shape[1], k.shape[1]))
        peak = scores.amax(-1, keepdim=True)
        weights = (scores - peak).exp()
        sums = weights.sum(-1, keepdim=True)
        result = torch.matmul((weights / sums), _repeat(v, q).float())
        index.query(output).copy_(result.to(query.dtype))
        index.statistics(highest).copy_(peak.expand(-1, -1, COLUMNS))
        index.statistics(total).copy_(sums.expand(-1, -1, COLUMNS))
    return output, highest, total, query.new_empty(0), 0, 0, 0


def attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    atten_mask: Tensor | None = None, softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0,
    actual_seq_qlen: list[int] | None = None, actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0,
    **unused: Any,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, from the softmax's statistics (https://arxiv.org/abs/2307.08691)."""
    _check(query, key, value, head_num, input_layout)
    demand_same_type(query=query, dy=dy)
    demand(softmax_max is not None and softmax_sum is not None and attention_in is not None, "statistics are missing")
    gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for index in _sequences(query, key, head_num, input_layout, actual_seq_qlen, actual_seq_kvlen):
        q, k, v = index.query(query), index.key(key), index.key(value)
        grad, output = index.query(dy).float(), index.query(attention_in).float()
        scores = _scores(q, k, scale_value, _mask(atten_mask, sparse_mode, index, q.shape[1], k.shape[1]))
        peak, sums = (index.statistics(tensor)[..., :1] for tensor in (softmax_max, softmax_sum))
        weights = (scores - peak).exp() / sums
        dv = torch.matmul(weights.transpose(1, 2), grad)
        d_weights = torch.matmul(grad, _repeat(v, q).float().transpose(1, 2))
        d_scores = weights * (d_weights - (grad * output).sum(-1, keepdim=True)) * scale_value
        dq = torch.matmul(d_scores, _repeat(k, q).float())
        dk = torch.matmul(d_scores.transpose(1, 2), q.float())
        groups = k.shape[0]
        index.query(gradients[0]).copy_(dq)
        index.key(gradients[1]).copy_(dk.unflatten(0, (groups, -1)).sum(1))
        index.key(gradients[2]).copy_(dv.unflatten(0, (groups, -1)).sum(1))
    empty = query.new_empty(0)
    return (*gradients, empty) if "sink" not in unused else (*gradients, empty, empty)


class _Sequence:
    """One sequence's part of tensors of any layout, as [heads, S, D]."""

    def __init__(self, layout: str, batch: int, queries: slice, keys: slice, heads: int, groups: int) -> None:
        self.layout, self.batch, self.queries, self.keys = layout, batch, queries, keys
        self.heads, self.groups = heads, groups

    def query(self, tensor: Tensor) -> Tensor:
        return self._part(tensor, self.queries, self.heads)

    def key(self, tensor: Tensor) -> Tensor:
        return self._part(tensor, self.keys, self.groups)

    def statistics(self, tensor: Tensor) -> Tensor:
        """[N, S, 8]."""
        return tensor[self.queries].transpose(0, 1) if self.layout == "TND" else tensor[self.batch]

    def _part(self, tensor: Tensor, tokens: slice, heads: int) -> Tensor:
        if self.layout == "TND":
            return tensor[tokens].transpose(0, 1)
        if self.layout == "BNSD":
            return tensor[self.batch]
        if self.layout == "BSND":
            return tensor[self.batch].transpose(0, 1)
        flat = tensor[self.batch] if self.layout == "BSH" else tensor[:, self.batch]
        return flat.unflatten(-1, (heads, -1)).transpose(0, 1)


def _sequences(
    query: Tensor, key: Tensor, heads: int, layout: str, ends_q: list[int] | None, ends_k: list[int] | None
) -> Iterator[_Sequence]:
    if layout != "TND":
        batches = query.shape[1 if layout == "SBH" else 0]
        groups = _heads(key, query, heads, layout)
        whole = slice(None)
        yield from (_Sequence(layout, batch, whole, whole, heads, groups) for batch in range(batches))
        return
    demand(ends_q is not None and ends_k is not None, "TND needs actual_seq_qlen and actual_seq_kvlen")
    demand(len(ends_q) == len(ends_k), f"{len(ends_q)} query sequences and {len(ends_k)} key sequences")
    demand(1 <= len(ends_q) <= MOST_SEQUENCES, f"{len(ends_q)} sequences; at most {MOST_SEQUENCES} are supported")
    for name, ends, tensor in (("actual_seq_qlen", ends_q, query), ("actual_seq_kvlen", ends_k, key)):
        given = list(itertools.takewhile(bool, ends)) if ends[0] else list(ends)
        demand(not any(ends[len(given):]), f"{name} has a 0 among its ends: {ends}")
        demand(given == sorted(given) and given[0] >= 0, f"{name} must not decrease: {ends}")
        demand(given[-1] <= tensor.shape[0], f"{name} ends at {given[-1]}; there are {tensor.shape[0]} tokens")
        demand(tensor.shape[0] <= LONGEST, f"{tensor.shape[0]} tokens; at most 1M are supported")
    start_q = start_k = 0
    for batch, (end_q, end_k) in enumerate(zip(ends_q, ends_k, strict=True)):
        if end_q > start_q:
            yield _Sequence(
                layout, batch, slice(start_q, end_q), slice(start_k, end_k), heads, key.shape[1]
            )
        start_q, start_k = max(start_q, end_q), max(start_k, end_k)


def _check(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> None:
    demand(layout in ("BSH", "SBH", "BSND", "BNSD", "TND"), f"input_layout {layout} is not supported")
    demand_type("query", query, FLOATS)
    demand_same_type(query=query, key=key, value=value)
    demand(key.shape == value.shape, f"key {tuple(key.shape)} and value {tuple(value.shape)} differ")
    axes = 3 if layout in ("BSH", "SBH", "TND") else 4
    demand(query.dim() == key.dim() == axes, f"layout {layout} has {axes} axes, query {query.dim()}, key {key.dim()}")
    demand(query.numel() > 0, "query is empty")
    if layout in ("BSND", "BNSD", "TND"):
        heads = query.shape[1 if layout in ("BNSD", "TND") else 2]
        demand(heads == head_num, f"head_num is {head_num}, query has {heads} heads")
        demand(query.shape[-1] == key.shape[-1], "query and key have heads of different widths")
    groups = _heads(key, query, head_num, layout)
    demand(groups > 0 and head_num % groups == 0, f"{head_num} query heads are not a multiple of {groups}")
    demand(1 <= head_num <= 256, f"{head_num} heads; 1 to 256 are supported")
    width = query.shape[-1] if layout in ("BSND", "BNSD", "TND") else query.shape[-1] // head_num
    demand(1 <= width <= 768, f"heads are {width} wide; 1 to 768 are supported")


def _heads(key: Tensor, query: Tensor, heads: int, layout: str) -> int:
    """Key/value heads."""
    if layout in ("BNSD", "TND"):
        return key.shape[1]
    if layout == "BSND":
        return key.shape[2]
    return key.shape[-1] * heads // query.shape[-1]


def _statistics_shape(query: Tensor, heads: int, layout: str) -> tuple[int, ...]:
    if layout == "TND":
        return (query.shape[0], heads, COLUMNS)
    batch, length = {"BSH": (0, 1), "SBH": (1, 0), "BSND": (0, 1), "BNSD": (0, 2)}[layout]
    return (query.shape[batch], heads, query.shape[length], COLUMNS)


def _mask(mask: Tensor | None, mode: int, index: _Sequence, queries: int, keys: int) -> Tensor | None:
    """What a sequence must not see, bool [S, S]; without a mask the mode has no effect, as documented."""
    if mask is None:
        return None
    if mode in (CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT):
        shift = keys - queries if mode == CAUSAL_BOTTOM_RIGHT else 0
        return torch.ones(queries, keys, dtype=torch.bool).triu_(1 + shift)
    if index.layout == "TND":
        return mask[:queries, :keys].bool()
    demand(mask.shape[-2:] == (queries, keys), f"atten_mask {tuple(mask.shape)} is not [..., {queries}, {keys}]")
    return mask.bool() if mask.dim() == 2 else mask[min(index.batch, mask.shape[0] - 1)].bool()


def _check_mask(mask: Tensor | None, mode: int, layout: str) -> None:
    if mask is None:
        return
    demand(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}; bool and uint8 are supported")
    demand(mode in (0, 1, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT), f"sparse_mode {mode} is not simulated")
    if mode in (CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT):
        demand(tuple(mask.shape) == (COMPRESSED, COMPRESSED), f"mode {mode}: mask {tuple(mask.shape)}, not 2048 x 2048")
        demand(torch.equal(mask.bool(), _compressed_mask()), f"mode {mode} needs ones above the diagonal only")
        return
    axes = (2,) if layout == "TND" else (2, 4)
    demand(mask.dim() in axes, f"atten_mask has {mask.dim()} axes; layout {layout} takes {axes}")


@functools.cache
def _compressed_mask() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu_(1)


def _repeat(tensor: Tensor, query: Tensor) -> Tensor:
    """[G, S, D] -> [N, S, D]."""
    return tensor.repeat_interleave(query.shape[0] // tensor.shape[0], dim=0)


def _scores(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(query.float(), _repeat(key, query).float().transpose(1, 2)) * scale
    return scores if mask is None else scores.masked_fill(mask, float("-inf"))


_NAMES = (
    "query", "key", "value", "head_num", "input_layout", "pse", "padding_mask", "atten_mask", "scale", "keep_prob",
    "pre_tockens", "next_tockens", "inner_precise", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode",
)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    given = dict(zip(_NAMES, inputs, strict=False))
    ctx.options = {name: given[name] for name in ("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")}
    ctx.heads, ctx.layout, ctx.scale = given["head_num"], given["input_layout"], given["scale"]
    ctx.has_mask, ctx.count = given["atten_mask"] is not None, len(inputs)
    mask = [given["atten_mask"]] if ctx.has_mask else []
    ctx.save_for_backward(given["query"], given["key"], given["value"], *output[:3], *mask)


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, output, highest, total, *mask = ctx.saved_tensors
    gradients = torch.ops.npu.npu_fusion_attention_grad(
        query, key, value, grad, ctx.heads, ctx.layout, atten_mask=mask[0] if ctx.has_mask else None,
        softmax_max=highest, softmax_sum=total, attention_in=output, scale_value=ctx.scale, **ctx.options,
    )[:3]
    return (*gradients, *[None] * (ctx.count - 3))


IMPLEMENTATIONS = {"npu_fusion_attention": attention, "npu_fusion_attention_grad": attention_grad}
DERIVATIVES = {"npu_fusion_attention": (_gradient, _keep)}
