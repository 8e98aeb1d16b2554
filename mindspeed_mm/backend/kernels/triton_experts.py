"""Expert feed-forward networks on a CUDA GPU: torch's grouped products with Triton kernels around them.

Legend: N permuted tokens (sorted by expert), E experts, H hidden width, I intermediate width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.experts import ExpertAdapters, GroupedProducts, RowSwiglu, run_experts
from mindspeed_mm.backend.kernels.triton_grouped import add_weight_gradient
from mindspeed_mm.backend.kernels.triton_moe import weighted_swiglu, weighted_swiglu_backward

# Since w * (h @ W) = (w * h) @ W, the gradient of a row's weight is a sum over I columns of what SwiGLU's backward pass
# reads anyway, and the experts' results need not be kept.
_SWIGLU = RowSwiglu(weighted_swiglu, weighted_swiglu_backward)


@dataclasses.dataclass(frozen=True)
class _AccumulatingProducts(GroupedProducts):
    """Accumulates gradients of the two weights in fp32 where ``sums`` has a function; see :func:`weighted_experts`."""

    sums: Sequence[Callable[[], tuple[Tensor, bool]] | None]

    def weight_gradient(self, index: int, left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor | None:
        """See :class:`~mindspeed_mm.backend.kernels.experts.ExpertProducts`."""
        gradient_sum = self.sums[index]
        if gradient_sum is None:
            return self.outer(left, right, scratch=scratch)
        total, add = gradient_sum()
        add_weight_gradient(left, right, self.ends, total, add=add)
        return None


def weighted_experts(
    permuted: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor, weights: Tensor | None = None, *,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """An :class:`~mindspeed_mm.backend.kernels.experts.ExpertKernel` that weighs rows.

    A weight may have an attribute ``gradient_sum``, a function that returns an fp32 tensor of its shape for its
    gradient, and whether to add to what is there. The gradient then goes there and not through autograd.
    """
    if permuted.shape[0] == 0:
        # The experts of a rank without tokens take part in backward all the same, with zero gradients.
        return permuted + sum(tensor.sum() for tensor in (gate_up, down, *(adapters or ())[:-1])) * 0
    sums = tuple(getattr(weight, "gradient_sum", None) for weight in (gate_up, down))
    products = _AccumulatingProducts(tokens_per_expert.cumsum(0).to(torch.int32), sums)
    return run_experts(products, _SWIGLU, permuted, gate_up, down, weights, adapters)
