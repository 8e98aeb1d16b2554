"""Output layer and cross-entropy in one: logits exist only for target positions, a chunk at a time.

Legend: S target positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.cross_entropy import CrossEntropyKernel, torch_cross_entropy


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum(loss_weight * cross_entropy(hidden @ weight^T, labels)) with its gradients computed in the forward pass.

    The gradients of a chunk are computed while its logits exist, so that no logits outlive their chunk and none are
    computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weight: Tensor, chunk_size: int,
        cross_entropy: CrossEntropyKernel, predict: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        count = hidden.shape[0]
        chunks = range(0, count, chunk_size)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        predicted = torch.empty_like(labels) if predict else None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # several chunks are summed in fp32; a single one needs no sum
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight and len(chunks) != 1 else None
        for start in chunks:
            part = slice(start, start + chunk_size)
            logits = F.linear(hidden[part], weight)
            if predicted is not None:
                predicted[part] = logits.argmax(dim=-1)  # before the cross-entropy, which may overwrite them
            losses[part], grad_logits = cross_entropy(
                logits, labels[part], loss_weight[part], with_gradient=need_hidden or need_weight
            )
            del logits
            if grad_logits is None:
                continue
            if need_hidden:
                grad_hidden[part] = grad_logits @ weight
            if need_weight:
                product = grad_logits.t() @ hidden[part]
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, *(() if predicted is None else (predicted,)))
        return (losses * loss_weight).sum(), losses, predicted

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [saved if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


class LossHead(nn.Module):
    """The output layer; ``weight`` [V, H], or no parameter if it shares the word embeddings'."""

    def __init__(
        self, hidden_size: int, vocab_size: int, *, chunk_size: int | None, dtype: torch.dtype, tied: bool,
        cross_entropy: CrossEntropyKernel = torch_cross_entropy,
    ) -> None:
        """``chunk_size`` target positions at a time, or all at once for None; ``tied``: forward takes the weight."""
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))
        self.chunk_size = chunk_size
        self.cross_entropy = cross_entropy

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        *,
        tied_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None] | Tensor:
        """Loss, or logits without labels.

        Args:
            hidden: [S, H] states that predict the labels.
            labels: int64 [S].
            loss_weight: fp32 [S], the weight of each token in the loss.
            tied_weight: [V, H], for a head without a weight of its own.

        Returns:
            (loss: fp32 scalar, cross-entropy of each token: fp32 [S], outside autograd, and outside training the most
            probable token at each position: int64 [S], of equal ones the first; None in training), or logits [S, V].
        """
        weight = self.weight if tied_weight is None else tied_weight
        if labels is None:
            return F.linear(hidden, weight)
        chunk_size = self.chunk_size or max(1, hidden.shape[0])
        return _WeightedCrossEntropy.apply(
            hidden, weight, labels, loss_weight, chunk_size, self.cross_entropy, not self.training
        )
