"""Saves a training checkpoint from two processes in a mixed sharding. Run by ``test_convert_sharded.py`` with torchrun.

Usage: torchrun --nproc_per_node 2 sharded_save.py TENSORS.safetensors TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mindspeed_mm.training.checkpoint import directory


def main() -> None:
    tensors, target = load_file(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        placements = [Shard(0), Replicate(), Shard(tensor.dim() - 1)]  # uneven shards among them
        placement = placements[number % 3]
        state[name] = distribute_tensor(tensor, mesh, [placement])
        state[f"optimizer.{name}.exp_avg"] = distribute_tensor(torch.zeros_like(tensor), mesh, [placement])
    partial = directory.partial_name(target)
    if dist.get_rank() == 0:
        directory.prepare_directory(target)
    dist.barrier()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, thread_count=2))
    dist.barrier()
    if dist.get_rank() == 0:
        directory.finish_directory(partial, target, {"iteration": 5})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
