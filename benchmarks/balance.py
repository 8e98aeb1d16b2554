"""Balanced routing for speed measurements: each token's experts are drawn at random, the same for both models.

Routers with random weights send most tokens to a few experts and none to many. A trained router is near balance, to
which its auxiliary loss has driven it. Both figures are reported; this module makes the balanced one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.models.layers.moe import TopKRouter

SCALE = 100.0  # far above any logit of a router with random weights


@functools.lru_cache(maxsize=64)
def _noise(tokens: int, experts: int, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(tokens)
    return (torch.rand(tokens, experts, generator=generator) * SCALE).to(device)


def _choose(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, E], weights [T, k], experts [T, k]): the router's own operations, on its logits plus noise.

    The chosen experts' weights are those of the logits without noise, so that the router's gradients are of the usual
    size.
    """
    logits = F.linear(tokens, weight)
    noise = _noise(logits.shape[0], logits.shape[1], logits.device)
    experts = (logits.detach().float() + noise).topk(top_k, dim=-1).indices
    chosen = logits.softmax(dim=-1, dtype=torch.float32).gather(-1, experts)
    return logits, (chosen / chosen.sum(dim=-1, keepdim=True)).to(tokens.dtype), experts


def _ours(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return _choose(tokens, router.weight, router.top_k)[1:]


def _theirs(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _choose(tokens.reshape(-1, tokens.shape[-1]), router.weight, router.top_k)


def balance(model: nn.Module) -> None:
    """Replace the choices of all routers of our model or of Hugging Face's."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.forward = functools.partial(_ours, module)
        elif type(module).__name__ == "Qwen3VLMoeTextTopKRouter":
            module.forward = functools.partial(_theirs, module)
