"""What a model of any family is to the rest of the package: forward over a packed batch, and a parallel plan.

Legend: S target tokens, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

import mindspeed_mm.backend.megatron  # noqa: F401 - before any megatron module: it keeps the compiler out of the start
from mindspeed_mm.interfaces.batch import Batch
from mindspeed_mm.models.layers.moe import MoELayer, RouterLoad


class ModelOutput(NamedTuple):
    """Losses of a micro-batch.

    Attributes:
        loss: fp32 scalar, ``sum(loss_weight * cross_entropy)``.
        token_losses: fp32 [S], cross-entropy of each target token, outside autograd.
        router_load: of this micro-batch's tokens, without padding; None without a sparse layer.
        predicted: int64 [S], the most probable token at each target position; None in training.
    """

    loss: Tensor
    token_losses: Tensor
    router_load: RouterLoad | None
    predicted: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a model is parallelized.

    Attributes:
        wrap_units: submodules that FSDP2 gathers and frees one by one, in the order of forward; the loss head is last.
            Parameters outside of them are gathered once per step.
        root_group: small submodules of the wrap units that may be gathered once per step instead.
        moe_layers: layers whose experts expert parallelism shards.
        attention: core-attention modules, whose ``kernel`` Ulysses replaces.
        set_vision_exchange: installs the function that gives each rank of a context-parallel group the vision
            embeddings of its tokens; None for a family without vision.
    """

    wrap_units: Sequence[nn.Module]
    root_group: Sequence[nn.Module] = ()
    moe_layers: Sequence[MoELayer] = ()
    attention: Sequence[nn.Module] = ()
    set_vision_exchange: Callable[[Callable[..., Any]], None] | None = None


class Model(nn.Module, abc.ABC):
    """A whole model over one packed micro-batch."""

    @abc.abstractmethod
    def forward(self, batch: Batch, loss_weight: Tensor | None = None) -> ModelOutput | Tensor:
        """Losses of a micro-batch, or its logits where ``loss_weight`` is None.

        Args:
            batch: packed tokens, S of them targets.
            loss_weight: fp32 [S]: the loss is ``sum(loss_weight * cross_entropy)``, so that 1 / (target tokens of the
                whole step) gives the token mean whatever the split over micro-batches and ranks.

        Returns:
            The losses, or the logits [S, V] that predict the target tokens.
        """

    @abc.abstractmethod
    def parallel_plan(self) -> ParallelPlan:
        """How to parallelize this model."""

    def reset_buffers(self) -> None:
        """Fill all constant buffers again after the model was moved off the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_buffers"):
                module.reset_buffers()
