"""AdamW whose moments are stored in bf16, rounded stochastically, or in int8; computed in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.checkpoint.shards import Shard
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.moments import (
    dequantize,
    halves,
    hash_in_place,
    name_constant,
    quantize,
    random_bits,
    round_stochastically,
    row_offsets,
)

CHUNK, HOST_CHUNK = 1 << 23, 1 << 18
"""Elements that are updated at a time, on an accelerator and on the host, where they fit into a cache. Temporary memory
is some 40 bytes for each."""
_STEP_MULTIPLIER = 0x9E3779B1 - 2**32  # odd, so that no two steps have the same seed


class LowPrecisionAdamW(AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101, algorithm 2) with moments in bf16 or int8.

    The update is torch's, in fp32 and from the moments before they are rounded. Where the layout keeps fp32 moments,
    the fused AdamW steps.

    bf16: rounded to nearest, ``exp_avg_sq`` would stop following the gradients, because (1 - beta2) of it is less than
    half the distance of two bf16 numbers. The random numbers depend on the parameter's name, its step and the element's
    index alone: a resumed run is bitwise the uninterrupted one, and rounding does not depend on the sharding.

    int8: https://arxiv.org/abs/2110.02861, with blocks along the last dimension, which is never sharded, so that codes
    and scales are sharded as the parameter is, and a checkpoint is read at any number of ranks without rounding again.
    """

    @torch.no_grad()
    def step_where(self, finite: Tensor, *, scale: Tensor | None = None) -> None:
        super().step_where(finite, scale=scale)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and self._is_low(p)]
            if parameters:
                self._step(parameters, group, finite, scale)

    def fused_parameters(self, group: dict[str, Any]) -> list[nn.Parameter]:
        return [parameter for parameter in group["params"] if not self._is_low(parameter)]

    def _is_low(self, parameter: nn.Parameter) -> bool:
        return self.layout.dtype_of(tuple(parameter.shape)) != "fp32"

    def _step(
        self, parameters: list[nn.Parameter], group: dict[str, Any], finite: Tensor, scale: Tensor | None
    ) -> None:
        """Step parameters of one group, whose scalars are computed together."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.initial_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        # one addend per step: a single scalar on the CPU would be read
        torch._foreach_add_([state["step"] for state in states], [finite.float()] * len(states))
        steps = torch.stack([state["step"] for state in states])
        # in the range of fp32 no cancellation, and not beta**steps, for which torch copies beta to the device and waits
        logarithms = [math.log(beta) if beta > 0.0 else -math.inf for beta in group["betas"]]
        first, second = (-torch.expm1(steps.clamp(min=1) * logarithm) for logarithm in logarithms)
        step_sizes, roots = group["lr"] / first, second.sqrt()
        counts = steps.to(torch.int32).mul_(_STEP_MULTIPLIER)
        for index, parameter in enumerate(parameters):
            seed = hash_in_place((counts[index] + name_constant(self.names.get(parameter, ""))).reshape(1))
            self._step_one(parameter, group, finite, scale, step_sizes[index], roots[index], seed)

    def _step_one(
        self, parameter: nn.Parameter, group: dict[str, Any], finite: Tensor, scale: Tensor | None,
        step_size: Tensor, root: Tensor, seed: Tensor,
    ) -> None:
        """Step one parameter.

        Args:
            parameter: with a gradient.
            group: its options.
            finite: bool scalar, whether to step.
            scale: factor on the gradient.
            step_size: learning rate over the first moment's bias correction.
            root: root of the second moment's bias correction.
            seed: int32 [1], of the step's random numbers.
        """
        shard = Shard.of(parameter)
        if not shard.values.numel():
            return
        length = parameter.shape[-1]
        assert shard.values.shape[-1] == length, "the last dimension is never sharded"
        state = {key: local(value) for key, value in self.state[parameter].items() if key != "step"}
        rows = {key: value.view(-1, value.shape[-1]) for key, value in {"": shard.values, **state}.items()}
        grads = local(parameter.grad).reshape(-1, length)
        codec = _Int8 if "exp_avg_scale" in state else _Bfloat16
        starts = row_offsets(shard.shape, shard.offsets, shard.values.shape, device=grads.device)
        (beta1, beta2), eps, decay = group["betas"], group["eps"], 1.0 - group["lr"] * group["weight_decay"]
        count = max(1, (HOST_CHUNK if grads.is_cpu else CHUNK) // length)
        for start in range(0, len(grads), count):
            chunk = {key: value[start : start + count] for key, value in rows.items()}
            grad = grads[start : start + count].float()
            grad = grad * scale if scale is not None else grad
            mean, square = codec.read(chunk)
            mean.lerp_(grad, 1.0 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            update = square.sqrt().div_(root).add_(eps)
            update = torch.div(mean, update, out=update).mul_(step_size)
            stepped = {
                "": torch.sub(chunk[""] * decay, update, out=update),
                **codec.write(mean, square, starts[start : start + count], seed),
            }
            for key, value in stepped.items():
                torch.where(finite, value, chunk[key], out=chunk[key])


class _Bfloat16:
    """Moments in bf16, rounded stochastically."""

    @staticmethod
    def read(chunk: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return chunk["exp_avg"].float(), chunk["exp_avg_sq"].float()

    @staticmethod
    def write(mean: Tensor, square: Tensor, starts: Tensor, seed: Tensor) -> dict[str, Tensor]:
        low, high = halves(random_bits(starts, mean.shape[-1], seed))
        return {"exp_avg": round_stochastically(mean, low), "exp_avg_sq": round_stochastically(square, high)}


class _Int8:
    """Moments in int8, rounded to the nearest table value."""

    @staticmethod
    def read(chunk: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (
            dequantize(chunk["exp_avg"], chunk["exp_avg_scale"], signed=True),
            dequantize(chunk["exp_avg_sq"], chunk["exp_avg_sq_scale"], signed=False),
        )

    @staticmethod
    def write(mean: Tensor, square: Tensor, starts: Tensor, seed: Tensor) -> dict[str, Tensor]:
        means, mean_scales = quantize(mean, signed=True)
        squares, square_scales = quantize(square, signed=False)
        return {
            "exp_avg": means, "exp_avg_scale": mean_scales,
            "exp_avg_sq": squares, "exp_avg_sq_scale": square_scales,
        }  # fmt: skip
