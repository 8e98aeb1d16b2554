"""Cross-entropy of logits with its gradient, for a loss head that keeps no logits.

Legend: S target positions, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CrossEntropyKernel(Protocol):
    """logits [S, V], labels int64 [S], loss_weight fp32 [S] -> (losses fp32 [S], gradient [S, V] or None).

    The gradient is that of ``sum(loss_weight * losses)``, in the logits' type; ``logits`` may be overwritten.
    """

    def __call__(
        self, logits: Tensor, labels: Tensor, loss_weight: Tensor, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``logsumexp(logits) - logits[label]``, and ``loss_weight * (softmax(logits) - one_hot(label))``."""


def torch_cross_entropy(
    logits: Tensor, labels: Tensor, loss_weight: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """A :class:`CrossEntropyKernel` of torch's operators, in fp32."""
    dtype, logits = logits.dtype, logits.float()
    target = labels.unsqueeze(-1)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    losses = (normaliser - logits.gather(-1, target)).squeeze(-1)
    if not with_gradient:
        return losses, None
    scale = loss_weight.unsqueeze(-1)
    grad = logits.sub_(normaliser).exp_().mul_(scale)
    grad.scatter_add_(-1, target, -scale)
    return losses, grad.to(dtype)
