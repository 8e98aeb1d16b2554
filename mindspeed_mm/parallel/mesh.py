"""Device meshes and what a rank needs to know of its place in them."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mindspeed_mm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """This process's place.

    Attributes:
        mesh: parameters are sharded over its last axis and replicated over the first, if it has two.
        rank: global rank.
        world_size: number of processes.
        data_rank: which share of the global batch this process reads.
        data_size: number of such shares.
    """

    mesh: DeviceMesh
    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process prints."""
        return self.rank == 0


def build_layout(*, device_type: str, sharding_size: int | str) -> Layout:
    """Meshes over all processes of the default group.

    Args:
        device_type: of the tensors that are sharded.
        sharding_size: processes that share one copy of the parameters (FSDP2 where it is all of them, HSDP where it
            is fewer); ``auto`` for all.

    Raises:
        UserError: if ``sharding_size`` does not divide the number of processes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shard = world_size if sharding_size == "auto" else int(sharding_size)
    if shard < 1 or world_size % shard:
        divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
        raise UserError(
            f"fsdp2 config: sharding_size {shard} does not divide the {world_size} processes; "
            f"choose auto or one of {', '.join(divisors)}"
        )
    if shard == world_size:
        mesh = init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device_type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return Layout(mesh=mesh, rank=rank, world_size=world_size, data_rank=rank, data_size=world_size)
