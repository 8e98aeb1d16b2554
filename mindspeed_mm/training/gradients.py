"""Norm and clipping of gradients that lie on different meshes."""

from __future__ import annotations

from typing import Hashable, Iterable, Sequence, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Group tensors by the mesh they are spread over, which the operations on lists of tensors must not mix."""
    groups: dict[Hashable, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together: an fp32 scalar, the same on all processes."""
    norms = []
    for group in by_mesh(parameter.grad for parameter in parameters if parameter.grad is not None):
        norm = torch.nn.utils.get_total_norm(group)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Sequence[nn.Parameter], *, max_norm: float, norm: Tensor) -> None:
    """Scale all gradients by ``max_norm / norm`` where ``norm``, their total norm, is larger."""
    for group in by_mesh(parameter for parameter in parameters if parameter.grad is not None):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
