"""AdamW in fp32: torch's fused kernels, or a Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.registry import use_triton
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.optimizers.base import ShardedOptimizer


class AdamW(ShardedOptimizer, torch.optim.AdamW):
    """torch's fused AdamW over each rank's local shards, able to skip a step without a host-device synchronisation.

    Attributes:
        skips_on_device: whether the device's fused kernel skips the step where ``found_inf`` is set.
        triton: whether the step, clipping included, is one pass of a Triton kernel.
    """

    def __init__(self, groups: list[dict[str, Any]], *, triton: bool = False, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.skips_on_device = _skips_on_device(parameters[0].device)
        self.triton = triton and all(
            parameter.dtype == torch.float32 and use_triton(parameter.device.type) for parameter in parameters
        )

    def step_where(self, finite: Tensor, *, scale: Tensor | None = None) -> None:
        """Step if the bool scalar ``finite``, which is on the device, is true; else change no parameter.

        Where the device's kernel cannot skip, the host reads ``finite``, which synchronises with the device.

        Args:
            finite: whether to step.
            scale: fp32 scalar by which the gradients are multiplied first; None for 1.
        """
        if self.triton:
            self._step_in_one_pass(finite, torch.ones_like(finite, dtype=torch.float32) if scale is None else scale)
            return
        if scale is not None:
            parameters = (parameter for group in self.param_groups for parameter in self.fused_parameters(group))
            gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)
        if not self.skips_on_device:
            if finite.item():
                self.step()
            return
        self.found_inf = 1.0 - finite.float()  # where the fused kernels look for torch's gradient scaler's result
        try:
            self.step()
        finally:
            del self.found_inf

    def fused_parameters(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The parameters of a group that the fused kernels step."""
        return group["params"]

    @torch.no_grad()
    def _step_in_one_pass(self, finite: Tensor, scale: Tensor) -> None:
        from mindspeed_mm.backend.kernels.triton_adamw import adamw

        for group in self.param_groups:
            parameters, grads, means, squares, unused, steps = ([] for _ in range(6))
            self._init_group(group, parameters, grads, means, squares, unused, steps)
            if parameters:
                adamw(
                    parameters, grads, means, squares, steps, lr=float(group["lr"]), betas=group["betas"],
                    eps=group["eps"], weight_decay=group["weight_decay"], scale=scale, finite=finite,
                )

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """A step's inputs as plain tensors: dispatching DTensors takes longer than small updates themselves."""
        has_complex = super()._init_group({**group, "params": self.fused_parameters(group)}, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex


@torch.no_grad()
def _skips_on_device(device: torch.device) -> bool:
    """Try once, with a step on a single number that is to be skipped."""
    if device.type == "meta":
        return True
    trial = nn.Parameter(torch.ones(1, device=device))
    trial.grad = torch.ones_like(trial)
    optimizer = torch.optim.AdamW([trial], lr=0.5, fused=True)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    state = optimizer.state[trial]
    changes = torch.stack([(trial - 1).abs().sum(), state["exp_avg"].abs().sum(), state["step"].abs()])
    return not changes.any().item()
