"""Invertible maps between the tensors of a Hugging Face checkpoint and the parameters of the mcore model.

A family's map is a list of rules. Every rule names one mcore parameter, the Hugging Face tensors that it is made of,
and a transform that moves the values either way. Values are only ever moved, never computed, so both directions are
exact to the bit in every dtype. Names and shapes are read without torch, which is imported where values are moved.

Shapes in this file: D width of one attention head, E experts, I expert width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ExpertLayout = Literal["hub", "v5"]
"""Layout of the experts in a Hugging Face checkpoint.

``hub``: the published one, ``x @ W``: gate_up_proj [E, H, 2I] and down_proj [E, I, H].
``v5``:  as transformers 5 holds them in memory and writes them: gate_up_proj [E, 2I, H] and down_proj [E, H, I].
The mcore model always holds ``hub``.
"""

Shape = tuple[int, ...]
NamedShape = tuple[str, Shape]


class Transform(Protocol):
    """Moves values between the Hugging Face tensors of a rule and its mcore parameter."""

    row_wise: bool
    """Whether rows [a, b) of the mcore parameter are made of just rows [a, b) of one Hugging Face tensor."""

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors, in the order of the rule's sources -> the mcore parameter."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The mcore parameter -> Hugging Face tensors, in the order of the rule's sources."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """The same tensor on both sides; ``hf_tail`` and ``mcore_tail`` are its shapes without axis 0."""

    hf_tail: Shape
    mcore_tail: Shape
    row_wise: bool = True

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[R, *hf_tail] -> [R, *mcore_tail], no values moved."""
        return tensors[0].reshape(-1, *self.mcore_tail)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[R, *mcore_tail] -> [R, *hf_tail], no values moved."""
        return (tensor.reshape(-1, *self.hf_tail),)


@dataclasses.dataclass(frozen=True)
class TransposeExperts:
    """Expert matrices that are transposed on the Hugging Face side: [E, a, b] <-> [E, b, a]."""

    row_wise: bool = True

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[E, a, b] -> [E, b, a], contiguous."""
        return tensors[0].transpose(1, 2).contiguous()

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[E, b, a] -> [E, a, b], contiguous."""
        return (tensor.transpose(1, 2).contiguous(),)


@dataclasses.dataclass(frozen=True)
class StackRows:
    """Several tensors one after another along axis 0, as gate and up of a dense MLP; ``rows`` is the length of each."""

    rows: tuple[int, ...]
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[r0, ...], [r1, ...] -> [r0 + r1, ...]."""
        import torch

        return torch.cat(list(tensors), dim=0)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[r0 + r1, ...] -> [r0, ...], [r1, ...], contiguous."""
        return tuple(part.contiguous() for part in tensor.split(list(self.rows), dim=0))


@dataclasses.dataclass(frozen=True)
class FuseQKV:
    """q, k, v <-> mcore's fused rows: for each key/value head its query heads, then its key, then its value.

    ``groups`` is the number of key/value heads, ``queries`` the number of query heads that share one.
    """

    groups: int
    queries: int
    head_dim: int
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """q [groups * queries * D, ...], k and v [groups * D, ...] -> [groups * (queries + 2) * D, ...]."""
        import torch

        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *tensors[0].shape[1:])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[groups * (queries + 2) * D, ...] -> q [groups * queries * D, ...], k and v [groups * D, ...]."""
        grouped = tensor.reshape(self.groups, (self.queries + 2) * self.head_dim, *tensor.shape[1:])
        parts = grouped.split([self.queries * self.head_dim, self.head_dim, self.head_dim], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)


@dataclasses.dataclass(frozen=True)
class InterleaveQKV:
    """Vision q, k, v stacked as [3, heads, D] rows <-> mcore's [heads, 3, D] rows."""

    heads: int
    head_dim: int
    row_wise: bool = False

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """[3 * heads * D, ...] -> [heads * 3 * D, ...], contiguous."""
        return _swap_leading(tensors[0], 3, self.heads, self.head_dim)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[heads * 3 * D, ...] -> [3 * heads * D, ...], contiguous."""
        return (_swap_leading(tensor, self.heads, 3, self.head_dim),)


def _swap_leading(tensor: Tensor, outer: int, inner: int, head_dim: int) -> Tensor:
    """[outer * inner * D, ...] -> [inner * outer * D, ...] with the two leading axes exchanged."""
    split = tensor.reshape(outer, inner, head_dim, *tensor.shape[1:])
    return split.transpose(0, 1).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One mcore parameter and the Hugging Face tensors that hold the same values.

    Attributes:
        target: name of the mcore parameter, without the checkpoint's ``model.`` prefix.
        target_shape: its shape.
        sources: names and shapes of the Hugging Face tensors.
        transform: how values move between the two sides.
    """

    target: str
    target_shape: Shape
    sources: tuple[NamedShape, ...]
    transform: Transform

    @property
    def row_wise(self) -> bool:
        """Whether rows [a, b) of the target are made of just rows [a, b) of its one source, on axis 0."""
        return self.transform.row_wise

    @property
    def is_copy(self) -> bool:
        """Whether both sides are the same sequence of bytes."""
        return isinstance(self.transform, Copy)

    def to_mcore(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors in the order of ``sources`` -> the mcore parameter.

        A row-wise rule also takes a range of rows of its source and gives the same range of the target.

        Raises:
            ValueError: if the tensors are not those of ``sources``.
        """
        if len(tensors) != len(self.sources):
            raise ValueError(f"{self.target} is made of {len(self.sources)} tensors, not {len(tensors)}")
        for tensor, (name, shape) in zip(tensors, self.sources, strict=True):
            self._check(name, tensor, shape)
        return self.transform.to_mcore(tensors)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The mcore parameter -> Hugging Face tensors in the order of ``sources``; a row range as in ``to_mcore``.

        Raises:
            ValueError: if the tensor has another shape than the target.
        """
        self._check(self.target, tensor, self.target_shape)
        return self.transform.to_hf(tensor)

    def _check(self, name: str, tensor: Tensor, shape: Shape) -> None:
        # A range of rows has fewer rows than the whole, and agrees in all other axes.
        same_tail = tensor.dim() == len(shape) and tuple(tensor.shape[1:]) == shape[1:]
        if not same_tail or (tensor.shape[0] != shape[0] and not (self.row_wise and tensor.shape[0] < shape[0])):
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")


def hf_shapes(rules: Sequence[WeightRule]) -> dict[str, Shape]:
    """Names and shapes of all Hugging Face tensors of ``rules``."""
    return {name: shape for rule in rules for name, shape in rule.sources}


def mcore_shapes(rules: Sequence[WeightRule]) -> dict[str, Shape]:
    """Names (without ``model.``) and shapes of all mcore parameters of ``rules``."""
    return {rule.target: rule.target_shape for rule in rules}


def copy_rule(target: str, source: str, shape: Shape, *, source_shape: Shape | None = None) -> WeightRule:
    """The same tensor on both sides; ``source_shape`` where only the shape of a row differs."""
    source_shape = source_shape or shape
    return WeightRule(target, shape, ((source, source_shape),), Copy(source_shape[1:], shape[1:]))
