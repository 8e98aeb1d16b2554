"""Device meshes, and a rank's coordinates in them."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclasses.dataclass(frozen=True)
class Layout:
    """This rank's meshes and coordinates.

    Neighbouring ranks form the context-parallel groups, and likewise the expert-parallel ones.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        dp_rank: data-parallel rank: which share of the global batch this rank trains on.
        dp_size: number of data-parallel ranks.
        mesh: of all parameters but expert-parallel experts: sharded over its last axis, replicated over the first if it
            has two.
        expert_shard_mesh: the same for expert-parallel experts, which are sharded over fewer ranks; None without expert
            parallelism.
        expert_mesh: ranks over which experts are sharded, one-dimensional; None without expert parallelism.
        context_mesh: ranks that share a micro-batch, one-dimensional; None without context parallelism.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    mesh: DeviceMesh
    expert_shard_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    context_mesh: DeviceMesh | None = None

    @property
    def context_size(self) -> int:
        """Ranks that share a micro-batch."""
        return self.world_size // self.dp_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs."""
        return self.rank == 0


def build_layout(
    *, device_type: str, sharding_size: int | str = "auto", expert_size: int = 1, context_size: int = 1
) -> Layout:
    """Meshes over all ranks of the default group.

    Args:
        device_type: of the tensors that are sharded.
        sharding_size: ranks that share one copy of the parameters (FSDP2 where it is all of them, HSDP where it
            is fewer); ``auto`` for all.
        expert_size: ranks over which the experts of a layer are sharded.
        context_size: ranks that share a micro-batch.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard = world_size if sharding_size == "auto" else int(sharding_size)
    # config.checks refuses other sizes
    assert world_size % shard == 0 and shard % expert_size == 0 and world_size % context_size == 0
    replicas = world_size // shard

    def shard_mesh(*, inner: int) -> DeviceMesh:
        # an axis of replicas only where there are any: FSDP2 takes a second axis for HSDP
        axes = {"replicate": replicas, "shard": shard // inner, "expert": inner}
        names = tuple(name for name, size in axes.items() if name == "shard" or size > 1)
        return init_device_mesh(device_type, tuple(axes[name] for name in names), mesh_dim_names=names)

    expert_root = shard_mesh(inner=expert_size) if expert_size > 1 else None
    sharding_axes = ("replicate", "shard") if replicas > 1 else ("shard",)
    context = None
    if context_size > 1:
        context = init_device_mesh(
            device_type, (world_size // context_size, context_size), mesh_dim_names=("data", "context")
        )
    return Layout(
        rank=rank,
        world_size=world_size,
        dp_rank=rank // context_size,
        dp_size=world_size // context_size,
        mesh=shard_mesh(inner=1),
        expert_shard_mesh=None if expert_root is None else expert_root[sharding_axes],
        expert_mesh=None if expert_root is None else expert_root["expert"],
        context_mesh=None if context is None else context["context"],
    )
