"""What the trainer and checkpoints need of an optimizer."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.training.gradients import local


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over each rank's local shards, which can skip a step without a host-device synchronisation.

    Attributes:
        layout: names, shapes and dtypes of the state; a class's default is replaced by the run's.
        names: of the parameters in the model.
    """

    layout: OptimizerStateLayout = OptimizerStateLayout()
    names: Mapping[nn.Parameter, str] = {}  # noqa: RUF012

    @abc.abstractmethod
    def step_where(self, finite: Tensor, *, scale: Tensor | None = None) -> None:
        """Step if the bool scalar ``finite``, which is on the device, is true; else change no parameter and no state.

        Args:
            finite: whether to step.
            scale: fp32 scalar by which the gradients are multiplied first; None for 1.
        """

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Allocate the state of all parameters as before the first step, so that a checkpoint can be read into it.

        State that exists is replaced.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.initial_state(parameter)

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State of a parameter before its first step: zeros, sharded as the parameter is."""
        layout = self.layout.tensors(self.names.get(parameter, ""), tuple(parameter.shape))
        return {key: _zeros(parameter, shape, getattr(torch, dtype)) for key, (shape, dtype) in layout.items()}


def _zeros(parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A scalar, or a tensor of the parameter's shape but for its last dimension, sharded as the parameter is."""
    shard = local(parameter.detach())
    if not shape:
        return torch.zeros((), dtype=dtype, device=shard.device)
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype)
    zeros = torch.zeros((*shard.shape[:-1], shape[-1]), dtype=dtype, device=shard.device)
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty(shape, device="meta")
    zeros = DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return zeros.to(shard.device)  # offloaded shards are not on the mesh's device, to which from_local copies
