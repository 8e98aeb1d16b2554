"""Mixed precision on a single device: no sharding, and so no gathering and no reduction.

Equals FSDP2's mixed precision to the bit: parameters, gradients and optimizer state are fp32, the model computes with
copies in the compute type, and the gradients of micro-batches are accumulated in fp32. The copies are made once per
step instead of twice per micro-batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.parallel.fsdp import DTYPES


def apply_mixed_precision(model: nn.Module, units: Sequence[nn.Module], config: FSDPConfig) -> None:
    """Let ``model`` compute in ``config.param_dtype``, in place.

    Args:
        model: parameters in fp32, possibly on the meta device.
        units: wrap units; floating-point inputs of all but the last, the loss head, are cast.
        config: the YAML file.
    """
    dtype = DTYPES[config.param_dtype]
    for unit in units:
        cast = dtype if config.cast_forward_inputs and unit is not units[-1] else None
        unit.register_forward_pre_hook(_UnitInputs(cast), with_kwargs=True)
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return
    copies = ComputeWeightCache(model, dtype, sum_dtype=DTYPES[config.reduce_dtype])
    model.register_forward_pre_hook(copies.before_forward)
    model.register_forward_hook(copies.after_forward)
    model.compute_weight_cache = copies


@contextlib.contextmanager
def cached_compute_weights(model: nn.Module) -> Iterator[None]:
    """Caches the compute-type weights across micro-batches, until the parameters change."""
    copies = getattr(model, "compute_weight_cache", None)
    if not isinstance(copies, ComputeWeightCache):
        yield
        return
    copies.rest(True)
    try:
        yield
    finally:
        copies.rest(False)


@dataclasses.dataclass(frozen=True)
class _UnitInputs:
    """Treats a module's inputs as FSDP2 does: casts them, and gives each a node of its own in the autograd graph.

    Gradients of a tensor that several modules take are summed in the order of these nodes, which decides their last
    bits.
    """

    dtype: torch.dtype | None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tree_map_only(Tensor, self._prepare, args), tree_map_only(Tensor, self._prepare, kwargs)

    def _prepare(self, tensor: Tensor) -> Tensor:
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor.view_as(tensor) if tensor.requires_grad else tensor


def _gradient_sum(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """Where a kernel may accumulate the gradient of ``parameter``, and whether something is there already."""
    add = parameter.grad is not None
    if not add:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad, add


class ComputeWeightCache:
    """Replaces parameters by copies in the compute type for forward and backward, and restores them afterwards."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, sum_dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._sum_dtype = sum_dtype
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._in_place = False
        self._backward_began = False
        self._at_rest = self._up_to_date = False

    def rest(self, resting: bool) -> None:
        """Begin or end a period in which the parameters do not change."""
        self._at_rest, self._up_to_date = resting, False

    def before_forward(self, module: nn.Module, inputs: tuple) -> None:
        """Install the copies, updated unless the parameters are known not to have changed."""
        if self._in_place:
            return
        if not self._copies:
            self._make()
        if not self._up_to_date:
            with torch.no_grad():
                torch._foreach_copy_([copy.data for copy in self._copies.values()], list(self._copies))
            self._up_to_date = self._at_rest
        for owner, name, parameter in self._places:
            owner._parameters[name] = self._copies[parameter]
        self._in_place = True

    def after_forward(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Restore the parameters, or let the backward pass that follows do so at its end."""
        followed = []

        def watch(tensor: Tensor) -> Tensor:
            if tensor.requires_grad:
                tensor.register_hook(self._backward_begins)
                followed.append(tensor)
            return tensor

        tree_map_only(Tensor, watch, output)
        if not followed:
            self._restore()

    def _make(self) -> None:
        for owner in self._model.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or parameter.dtype == self._dtype:
                    continue
                self._places.append((owner, name, parameter))
                if parameter in self._copies:
                    continue
                copy = nn.Parameter(torch.empty_like(parameter, dtype=self._dtype), parameter.requires_grad)
                if parameter.requires_grad:
                    copy.register_post_accumulate_grad_hook(self._adder(parameter))
                    if parameter.dtype == self._sum_dtype == torch.float32:
                        copy.gradient_sum = functools.partial(_gradient_sum, parameter)
                self._copies[parameter] = copy

    def _adder(self, parameter: nn.Parameter) -> Any:
        def add(copy: nn.Parameter) -> None:
            grad, copy.grad = copy.grad, None
            if grad is None:  # a kernel has added it to the sum already
                return
            if torch.promote_types(grad.dtype, self._sum_dtype) != self._sum_dtype:
                grad = grad.to(self._sum_dtype)  # a wider type loses nothing: the sum has it anyway
            parameter.grad = grad.to(parameter.dtype) if parameter.grad is None else parameter.grad.add_(grad)

        return add

    def _backward_begins(self, grad: Tensor) -> None:
        if not self._backward_began:
            self._backward_began = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._backward_began = False
        self._restore()

    def _restore(self) -> None:
        for owner, name, parameter in self._places:
            owner._parameters[name] = parameter
        self._in_place = False
