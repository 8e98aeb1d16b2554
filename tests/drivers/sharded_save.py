"""Saves training checkpoints from four ranks in mixed shardings. Started by ``test_convert_sharded.py`` with torchrun.

Usage: torchrun --nproc_per_node 4 sharded_save.py TENSORS.safetensors ROOT

Writes ``ROOT/ours/iter_0000005`` by this project's manager, ``ROOT/bare/iter_0000005`` likewise without the optimizer's
state, and ``ROOT/torch/iter_0000005`` by torch.distributed.checkpoint, which records no checksums of chunks.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint import directory, shards, storage
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from tests.helpers.saved_state import SavedProgress, SavedTensors


def layouts_of(name: str, tensor: Tensor) -> list[tuple[Placement, Placement]]:
    """Placements on a 2 x 2 mesh; experts are sharded over both axes, as by expert parallelism and FSDP2."""
    if ".experts." in name:
        return [(Shard(0), Shard(1)), (Replicate(), Shard(1)), (Shard(0), Replicate())]
    # FSDP2 over all ranks, HSDP, sharding of the last axis, and replication; some shards are uneven
    return [
        (Shard(0), Shard(0)), (Replicate(), Shard(0)), (Replicate(), Shard(tensor.dim() - 1)),
        (Replicate(), Replicate()),
    ]


def main() -> None:
    tensors, root = load_file(sys.argv[1]), Path(sys.argv[2])
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=1)
    shards.CHUNK_BYTES, storage.MIN_FILE_BYTES = 3000, 50_000
    mesh = init_device_mesh("cpu", (2, 2))
    parameters, moments, counter = {}, {}, itertools.count()
    for name, tensor in sorted(tensors.items()):
        choices = layouts_of(name, tensor)
        placements = choices[next(counter) % len(choices)]
        parameters[name] = distribute_tensor(tensor, mesh, placements)
        moments[f"optimizer.{name}.exp_avg"] = distribute_tensor(torch.zeros_like(tensor), mesh, placements)
    own = {f"rng.{dist.get_rank()}.cpu": torch.arange(50, dtype=torch.uint8)}
    for place, state in (("ours", parameters | moments), ("bare", parameters)):
        manager = CheckpointManager(SavedTensors({**state, **own}), SaveOptions(root / place), backend=backend)
        manager.start(SavedProgress(5))
        manager.finish()
    target = directory.AtomicDirectory(root / "torch" / "iter_0000005")
    if dist.get_rank() == 0:
        target.prepare()
    dist.barrier()
    dcp.save(parameters | moments, storage_writer=dcp.FileSystemWriter(target.partial, thread_count=2))
    dist.barrier()
    if dist.get_rank() == 0:
        target.commit({"iteration": 5})
    shutdown_distributed()


if __name__ == "__main__":
    main()
