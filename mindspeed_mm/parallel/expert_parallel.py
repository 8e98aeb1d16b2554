"""Expert parallelism: each rank of a group holds E / size experts, and tokens are sent to them by all-to-all.

Legend: T tokens, E experts, k experts per token, H hidden width, N = T * k permuted tokens sent, R received.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mindspeed_mm.backend.kernels.permutation import TokenPermuter
from mindspeed_mm.backend.transfer import DeferredHostRead
from mindspeed_mm.models.layers.moe import MoELayer
from mindspeed_mm.models.layers.token_dispatcher import ExpertFunction
from mindspeed_mm.parallel.collectives import all_to_all, scale_gradient


@dataclasses.dataclass(frozen=True)
class ExpertParallelDispatcher:
    """Sends each permuted token to the rank that holds its expert, and brings the result back.

    No token is dropped: the router alone decides how many are exchanged, which may be none between two ranks. Their
    numbers are read on the host once per layer, because the collective needs them there.
    """

    group: dist.ProcessGroup
    permuter: TokenPermuter

    def __call__(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, function: ExpertFunction, tokens_per_expert: Tensor
    ) -> Tensor:
        """See :data:`mindspeed_mm.models.layers.token_dispatcher.Dispatcher`."""
        size = self.group.size()
        # tokens for each expert of each rank, by receiver; then the same by sender
        sent = tokens_per_expert.view(size, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        numbers = DeferredHostRead(torch.stack((sent.sum(dim=1), received.sum(dim=1))))
        # the permutation is queued before the host waits, so that the device has work until the host goes on
        permuted, routing = self.permuter.permute(tokens, experts)
        send, receive = numbers.tolist()
        arrived = all_to_all(permuted, send, receive, self.group)
        arrived, local_routing = self.permuter.permute(arrived, _local_experts(received, total=sum(receive)))
        results = self.permuter.unpermute(function(arrived, received.sum(dim=0)), local_routing)
        results = all_to_all(results, receive, send, self.group)
        return self.permuter.unpermute(results, routing, weights)


def _local_experts(received: Tensor, *, total: int) -> Tensor:
    """The local expert of each received token; they are ordered by sender, and by expert within each.

    Args:
        received: int64 [senders, local experts], numbers of tokens.
        total: their sum.

    Returns:
        int64 [total, 1].
    """
    experts = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return experts.repeat_interleave(received.flatten(), output_size=total).unsqueeze(1)


def shard_experts(layers: Sequence[MoELayer], mesh: DeviceMesh) -> list[nn.Module]:
    """Shard every layer's experts over the one-dimensional ``mesh``. Call before FSDP2.

    The experts' gradients are sums over the tokens of all ranks of the group, unlike those of other parameters, which
    are of one rank's tokens; they are divided by the group's size, so that FSDP2's averages mean the same for both.

    Returns:
        The modules that hold experts.
    """
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    for layer in layers:
        layer.dispatch = ExpertParallelDispatcher(group, layer.permuter)
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.shape[0] % size == 0, "config.checks refuses other sizes"
            own = parameter.detach().chunk(size)[rank].contiguous()
            shard = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))
            shard.requires_grad_(parameter.requires_grad)
            setattr(layer.experts, name, shard)
        layer.experts.as_local = _Localiser(1.0 / size)
    return [layer.experts for layer in layers]


@dataclasses.dataclass(frozen=True)
class _Localiser:
    """This rank's experts, as a plain tensor whose gradient is scaled."""

    factor: float

    def __call__(self, parameter: Tensor) -> Tensor:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return scale_gradient(local, self.factor)
