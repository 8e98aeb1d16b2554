"""Muon: updates of weight matrices by their orthogonalized momentum.

https://kellerjordan.github.io/posts/muon/; at scale https://arxiv.org/abs/2502.16982. The formula is that of
torch.optim.Muon, which takes whole matrices only, and one for each parameter.

Legend: N leading axis of a parameter (experts; 1 for a parameter of two axes), R x C its last two axes, r rows of this
rank's shard; m x n a matrix with m <= n.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_mm.models.matrices import Matrices, newton_schulz_flops
from mindspeed_mm.parallel.matrix_exchange import LIMIT, Exchange, Item, RowSharding, cut, rounds_of, row_sharding
from mindspeed_mm.training.gradients import local
from mindspeed_mm.training.optimizers.adamw import AdamW
from mindspeed_mm.training.optimizers.base import ShardedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz polynomial a x + b x^3 + c x^5: the steepest at 0, which brings singular values near 1."""
EPS = 1e-7
AdjustLr = Literal["original", "match_rms_adamw"]


def orthogonalize(matrices: Tensor, *, steps: int) -> Tensor:
    """Replace the singular values of matrices by values near 1, by the Newton-Schulz iteration in the matrices' type.

    Args:
        matrices: [N, m, n]; with m > n it would square the longer side.
        steps: iterations.

    Returns:
        [N, m, n]; zeros where a matrix is zero.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices = matrices / norms.clamp(min=EPS)
    for _ in range(steps):
        gram = matrices @ matrices.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    return matrices


def orthogonalize_all(parameters: Sequence[tuple[Tensor, Matrices]], *, steps: int) -> list[Tensor]:
    """The same for all matrices of parameters [N, R, C], those of equal shape together."""
    parts = [part for tensor, matrices in parameters for part in matrices.split(tensor)]
    wide = [part if part.shape[1] <= part.shape[2] else part.mT for part in parts]
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, part in enumerate(wide):
        by_shape[part.shape[1:]].append(index)
    for indices in by_shape.values():
        stack = torch.cat([wide[index] for index in indices])
        results = orthogonalize(stack, steps=steps).split([len(wide[index]) for index in indices])
        for index, result in zip(indices, results, strict=True):
            wide[index] = result
    results = iter(
        result if part.shape[1] <= part.shape[2] else result.mT for part, result in zip(parts, wide, strict=True)
    )
    return [matrices.join([next(results) for _ in matrices.sizes or (1,)]) for _, matrices in parameters]


def lr_ratio(outputs: int, inputs: int, adjust: AdjustLr) -> float:
    """Factor on the learning rate of a matrix.

    ``match_rms_adamw`` gives updates AdamW's usual root mean square of 0.2 (arXiv 2502.16982, section 2.2), so that
    AdamW's learning rates and weight decays can be used; ``original`` is Jordan's, for learning rates of its own.
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    return math.sqrt(max(1.0, outputs / inputs))


class _Trained(NamedTuple):
    """A parameter that Muon steps.

    Attributes:
        parameter: sharded.
        matrices: that it holds.
        group: of the optimizer.
        sharding: of the matrices' rows.
        ratio: factor on the learning rate, or where matrices differ [r, 1] or [C].
    """

    parameter: nn.Parameter
    matrices: Matrices
    group: dict[str, Any]
    sharding: RowSharding
    ratio: float | Tensor


class Muon(ShardedOptimizer):
    """Muon for matrices and AdamW for all other parameters, over each rank's local shards.

    With gradient G: M <- lerp(M, G, 1 - momentum); U = lerp(G, M, momentum), which is Nesterov's momentum; and
    W <- (1 - lr * weight_decay) W - lr * ratio * NS(U). NS is :func:`orthogonalize` in bf16, in which U is sent to the
    rank that computes it where ranks share a matrix's rows, and NS(U) back. Ranks that hold the same shards (HSDP)
    compute the same.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        matrices: Mapping[nn.Parameter, Matrices],
        adamw: AdamW | None,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        steps: int = 5,
        adjust_lr: AdjustLr = "match_rms_adamw",
        dtype: torch.dtype = torch.bfloat16,
        limit: int = LIMIT,
    ) -> None:
        """
        Args:
            groups: of the parameters [R, C] or [N, R, C] that Muon steps.
            matrices: that each of them holds.
            adamw: of all other parameters, if any train; it is stepped too, and shares ``state`` and ``param_groups``.
            lr: learning rate, before its adjustment to a matrix's shape.
            weight_decay: decoupled, per unit of ``lr``.
            momentum: decay of the gradient's running mean.
            steps: Newton-Schulz iterations.
            adjust_lr: see :func:`lr_ratio`.
            dtype: of the Newton-Schulz iteration.
            limit: see :data:`~mindspeed_mm.parallel.matrix_exchange.LIMIT`.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.steps, self.dtype, self.limit = momentum, steps, dtype, limit
        self._matrices = matrices
        self._trained = [
            self._describe(parameter, matrices[parameter], group, adjust_lr)
            for group in self.param_groups for parameter in group["params"]
        ]
        self._adamw = adamw
        if adamw is not None:
            self.param_groups += adamw.param_groups  # the same dicts: a schedule sets both
            adamw.state = self.state
        self._planned: tuple[list[bool], list[Exchange]] | None = None

    def _describe(
        self, parameter: nn.Parameter, matrices: Matrices, group: dict[str, Any], adjust_lr: AdjustLr
    ) -> _Trained:
        sharding = row_sharding(parameter)
        ratios = [lr_ratio(*pair, adjust_lr) for pair in matrices.shapes(sum(sharding.rows), parameter.shape[-1])]
        ratio: float | Tensor = ratios[0]
        if len(set(ratios)) > 1:
            shard = local(parameter)
            lines = torch.tensor(matrices.of_each_line(ratios), dtype=torch.float32, device=shard.device)
            rows = slice(sharding.first_row, sharding.first_row + shard.shape[-2])
            ratio = lines if matrices.by_columns else lines[rows, None]
        return _Trained(parameter, matrices, group, sharding, ratio)

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See :class:`ShardedOptimizer`."""
        if parameter in self._matrices:
            return {"momentum_buffer": torch.zeros_like(parameter)}
        return super().initial_state(parameter)

    @torch.no_grad()
    def step_where(self, finite: Tensor, *, scale: Tensor | None = None) -> None:
        """See :class:`ShardedOptimizer`. Called by all ranks."""
        if self._adamw is not None:
            self._adamw.step_where(finite, scale=scale)
        for trained in self._trained:
            if trained.parameter.grad is not None and not self.state[trained.parameter]:
                self.state[trained.parameter] = self.initial_state(trained.parameter)
        for exchange in self._exchanges():
            for by_rank in exchange.rounds:
                items = [item for items in by_rank for item in items]
                directions = exchange.on_whole(
                    [self._accumulate(item, finite, scale) for item in items], by_rank, self._orthogonalize
                )
                for item, direction in zip(items, directions, strict=True):
                    self._move(item, direction, finite)

    def _exchanges(self) -> list[Exchange]:
        """Who orthogonalizes what, of the parameters that have a gradient: planned once."""
        present = [trained.parameter.grad is not None for trained in self._trained]
        if self._planned is None or self._planned[0] != present:
            self._planned = (present, list(self._plan(present)))
        return self._planned[1]

    def _plan(self, present: Sequence[bool]) -> Iterator[Exchange]:
        by_group: dict[Any, list[Item]] = defaultdict(list)
        shardings: dict[Any, RowSharding] = {}
        for index, (parameter, matrices, _, sharding, _) in enumerate(self._trained):
            if not present[index]:
                continue
            rows, columns = sum(sharding.rows), parameter.shape[-1]
            cost = sum(newton_schulz_flops(*pair, steps=self.steps) for pair in matrices.shapes(rows, columns))
            shardings[sharding.group] = sharding
            by_group[sharding.group] += cut(
                index, leading=1 if parameter.dim() == 2 else local(parameter).shape[0], columns=columns, cost=cost,
                sharding=sharding, limit=self.limit,
            )
        for group, items in by_group.items():
            sharding = shardings[group]
            yield Exchange(group, sharding.rank, rounds_of(items, size=sharding.size, limit=self.limit))

    def _accumulate(self, item: Item, finite: Tensor, scale: Tensor | None) -> Tensor:
        """Update the momentum of this rank's part of an item; returns what is to be orthogonalized, [N, r, C]."""
        parameter = self._trained[item.parameter].parameter
        gradient, buffer = item.view(local(parameter.grad)), item.view(local(self.state[parameter]["momentum_buffer"]))
        if scale is not None:
            gradient = gradient * scale
        momentum = buffer.lerp(gradient, 1 - self.momentum)
        buffer.copy_(torch.where(finite, momentum, buffer))
        return gradient.lerp(momentum, self.momentum).to(self.dtype)

    def _orthogonalize(self, items: list[Item], wholes: list[Tensor]) -> list[Tensor]:
        pairs = [(whole, self._trained[item.parameter].matrices) for item, whole in zip(items, wholes, strict=True)]
        return orthogonalize_all(pairs, steps=self.steps)

    def _move(self, item: Item, direction: Tensor, finite: Tensor) -> None:
        """Step this rank's part of an item, [N, r, C]."""
        trained = self._trained[item.parameter]
        weight, lr = item.view(local(trained.parameter.detach())), float(trained.group["lr"])
        moved = weight * (1 - lr * trained.group["weight_decay"])
        if isinstance(trained.ratio, float):
            moved.add_(direction, alpha=-lr * trained.ratio)
        else:
            moved.add_(direction * trained.ratio, alpha=-lr)
        weight.copy_(torch.where(finite, moved, weight))
