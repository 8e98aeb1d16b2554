"""Which matrices a parameter holds, for optimizers that update a matrix as a whole.

Experts of a layer and projections that share an input are kept in one parameter each. What such an optimizer does must
not depend on that, so a model family names the matrices. Names and shapes are enough: torch is imported where values
are moved.

Legend: N matrices of the same kind in a parameter (experts; 1 in a parameter of two axes), R x C the parameter's last
two axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How the matrices lie in the last two axes of a parameter.

    One of the two axes is ``groups`` repetitions of blocks of the lengths ``sizes``; a matrix is made of the blocks of
    one index of all groups. mcore's fused q, k and v, for example, have a group for each key/value head.

    Attributes:
        sizes: length of each matrix's blocks; empty for a parameter that is one matrix.
        groups: number of repetitions.
        by_columns: whether the axis of the blocks is the last one instead of the last but one.
        transposed: whether rows are inputs (``x @ W``) instead of outputs (``x @ W.T``, as in a linear layer).
    """

    sizes: Shape = ()
    groups: int = 1
    by_columns: bool = False
    transposed: bool = False

    def shapes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Outputs x inputs of each matrix of a parameter [..., rows, columns]."""
        shapes = [(rows, columns)]
        if self.sizes:
            lengths = [self.groups * size for size in self.sizes]
            assert sum(lengths) == (columns if self.by_columns else rows), (lengths, rows, columns)
            shapes = [(rows, length) if self.by_columns else (length, columns) for length in lengths]
        return [shape[::-1] if self.transposed else shape for shape in shapes]

    def of_each_line(self, values: Sequence[float]) -> list[float]:
        """A value for each matrix -> for each line of the axis of the blocks the value of its matrix."""
        if not self.sizes:
            return list(values)
        pairs = zip(self.sizes, values, strict=True)
        return [value for size, value in pairs for _ in range(size)] * self.groups

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[N, R, C] -> the matrices, each [N, r, c] as the parameter has them."""
        if not self.sizes:
            return [tensor]
        axis = 2 if self.by_columns else 1
        grouped = tensor.unflatten(axis, (self.groups, sum(self.sizes)))
        return [part.flatten(axis, axis + 1) for part in grouped.split(list(self.sizes), dim=axis + 1)]

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        import torch

        if not self.sizes:
            return matrices[0]
        axis = 2 if self.by_columns else 1
        grouped = [
            matrix.unflatten(axis, (self.groups, size)) for matrix, size in zip(matrices, self.sizes, strict=True)
        ]
        return torch.cat(grouped, dim=axis + 1).flatten(axis, axis + 1)


def newton_schulz_flops(rows: int, columns: int, *, steps: int) -> float:
    """Floating-point operations of the Newton-Schulz iteration on one matrix.

    A step multiplies the matrix by its transpose, squares the result, and multiplies that by the matrix.
    """
    short, long = sorted((rows, columns))
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def flops_of(shape: Shape, matrices: Matrices, *, steps: int) -> float:
    """The same of all matrices of a parameter."""
    each = sum(newton_schulz_flops(*pair, steps=steps) for pair in matrices.shapes(*shape[-2:]))
    return math.prod(shape[:-2]) * each
