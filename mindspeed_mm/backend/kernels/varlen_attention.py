"""PyTorch's own kernel for packed sequences (``torch.nn.attention.varlen``, from 2.10), on a GPU.

Its signature has grown from version to version, and not every GPU is served; so it is tried once, on small numbers,
before it is offered.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Varlen:
    """The kernel, called as this version of torch wants it.

    Attributes:
        function: ``varlen_attn``.
        accepts: names of its parameters.
        repeat_heads: whether keys and values have to be repeated for each query head.
    """

    function: Callable[..., Any]
    accepts: frozenset[str]
    repeat_heads: bool = False

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
    ) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] in bf16 or fp16, offsets int32 [B + 1] -> [T, Hq, D]."""
        groups = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {}
        if "scale" in self.accepts:
            options["scale"] = scale
        elif not math.isclose(scale, query.shape[-1] ** -0.5):
            query = query * (scale * query.shape[-1] ** 0.5)
        if causal:
            options.update({"window_size": (-1, 0)} if "window_size" in self.accepts else {"is_causal": True})
        if groups > 1 and self.repeat_heads:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        elif groups > 1 and "enable_gqa" in self.accepts:
            options["enable_gqa"] = True
        return self.function(query, key, value, offsets, offsets, longest, longest, **options)


@functools.cache
def find_varlen(device: str) -> Varlen | None:
    """The kernel as it works on ``device``, or None where it does not: no such torch, or no such hardware."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepts = frozenset(inspect.signature(varlen_attn).parameters)
    if not accepts & {"window_size", "is_causal"}:
        return None
    for repeat_heads in (False, True):
        kernel = Varlen(varlen_attn, accepts, repeat_heads)
        if _agrees(kernel, device):
            return kernel
    return None


def _agrees(kernel: Varlen, device: str) -> bool:
    """Whether values and gradients are those of plain arithmetic, on two segments with shared key heads."""
    generator = torch.Generator().manual_seed(0)
    # models are built under a default device, the meta device, which these numbers must not be made on
    inputs = [torch.randn(24, heads, 64, generator=generator, device="cpu").to(device, torch.bfloat16)
              for heads in (4, 2, 2)]
    results = []
    for function in (kernel, _plain):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        try:
            with torch.enable_grad():
                output = function(*own, torch.tensor([0, 7, 24], dtype=torch.int32, device=device), 17,
                                  causal=True, scale=0.125)
                output.float().square().sum().backward()
        except (RuntimeError, TypeError, ValueError):  # what torch raises for hardware or arguments it does not take
            return False
        results.append([output, *(tensor.grad for tensor in own)])
    pairs = zip(*results, strict=True)
    return all(float((one - other).float().norm()) < 0.05 * float(other.float().norm()) for one, other in pairs)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, *, causal: bool, scale: float
) -> Tensor:
    outputs = []
    bounds = offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1).float() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(len(q) // len(k), dim=0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        scores += torch.full_like(scores[0], float("-inf")).triu(1)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)
