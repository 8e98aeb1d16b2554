"""Runs a stack of equal layers with activation checkpointing and offload.

Legend: H hidden width; the first axis of hidden states is tokens or patches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.backend.activation_offload import Offload, host_offload, synchronizer
from mindspeed_mm.models.spec import ModelBuildOptions

Step = Callable[[int, Tensor], tuple[Tensor, ...]]
"""(index of the layer, hidden states) -> (hidden states after it, further tensors for the caller)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationCheckpointPolicy:
    """How a stack is run.

    Attributes:
        recompute_granularity: ``full``: keep inputs of layers only; ``selective``: keep all but the inside of the core
            attention and of the experts or the dense MLP (see :func:`recompute_inside`); None: keep all.
        recompute_method: with ``full``: ``uniform`` keeps the input of every n-th layer and recomputes n layers
            together; ``block`` recomputes the first n layers one by one, and keeps all activations of the rest.
        recompute_num_layers: the n of ``recompute_method``.
        activation_offload: keeps on the host what is kept for backward; None leaves it on the device.
        after_layer: called after each layer's forward; None for nothing.
    """

    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    activation_offload: Offload | None = None
    after_layer: Callable[[], None] | None = None

    @classmethod
    def from_options(
        cls, options: ModelBuildOptions, *, device: str, synchronize_per_layer: bool, activation_offload: bool
    ) -> ActivationCheckpointPolicy:
        """The policy of a stack that a user's choices describe.

        Args:
            options: the choices.
            device: kind of device (``Backend.name``).
            synchronize_per_layer: synchronise with the device after each layer.
            activation_offload: keep on the host what the layers keep for backward.
        """
        return cls(
            recompute_granularity=options.recompute_granularity,
            recompute_method=options.recompute_method,
            recompute_num_layers=options.recompute_num_layers,
            activation_offload=host_offload(device=device) if activation_offload else None,
            after_layer=synchronizer(device=device) if synchronize_per_layer else None,
        )

    def groups(self, depth: int) -> Iterator[tuple[range, bool]]:
        """The layers that run together, from the first to the last, and whether backward runs them again."""
        together, full = self.recompute_num_layers, self.recompute_granularity == "full"
        if full and self.recompute_method == "uniform":
            for start in range(0, depth, together):
                yield range(start, min(start + together, depth)), True
        else:
            again = together if full else 0
            for index in range(depth):
                yield range(index, index + 1), index < again


def run_layers(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    step: Step,
    policy: ActivationCheckpointPolicy,
    *,
    between: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Run all layers.

    Args:
        layers: the stack.
        hidden: input of the first layer.
        step: runs one layer.
        policy: which activations are kept, and where.
        between: applied to the hidden states after the layer of the given index. Unlike ``step`` it may differ between
            ranks.

    Returns:
        (hidden states after the last layer, the further tensors of all steps in their order).
    """
    further: list[Tensor] = []
    after = between if between is not None else _unchanged

    def run(indices: range, hidden: Tensor) -> tuple[Tensor, ...]:
        taken: list[Tensor] = []
        for index in indices:
            hidden, *more = step(index, hidden)
            taken += more
            if policy.after_layer is not None:
                policy.after_layer()
            if index != indices[-1]:
                hidden = after(index, hidden)
        return hidden, *taken

    for indices, again in policy.groups(len(layers)):
        part = [layers[index] for index in indices]
        with policy.activation_offload(part) if policy.activation_offload is not None else contextlib.nullcontext():
            hidden, *more = _run_again(run, indices, hidden) if again else run(indices, hidden)
        # Must not be recomputed after the last layer: its start in backward would differ between ranks, and with it
        # the order in which they gather parameters.
        hidden = after(indices[-1], hidden)
        further += more
    return hidden, *further


def _unchanged(index: int, hidden: Tensor) -> Tensor:
    return hidden


def _run_again(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call ``function``, keeping its inputs only. There is no dropout, so no random state needs to be kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def recompute_inside(module: nn.Module) -> None:
    """Make the module keep only its inputs for backward, and recompute there."""
    forward = module.forward

    def forward_again(*inputs: Any) -> Any:
        return _run_again(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)

    module.forward = forward_again


def recompute_selectively(layers: Sequence[nn.Module]) -> None:
    """``selective``: the parts of megatron-core's layers that keep much and cost little to run again."""
    for layer in layers:
        recompute_inside(layer.self_attention.core_attention)
        # the experts alone: the router's choices and the exchange of tokens between ranks are not repeated
        recompute_inside(getattr(layer.mlp, "experts", layer.mlp))
