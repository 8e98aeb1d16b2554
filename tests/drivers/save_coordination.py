"""Started by torchrun with two ranks: coordination of a save, its errors included.

Usage: torchrun --nproc_per_node 2 save_coordination.py DIRECTORY
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint import directory, files
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.state import load_tensors
from mindspeed_mm.checkpoint.storage import CheckpointReader, CheckpointWriter
from mindspeed_mm.errors import UserError
from tests.helpers.log_lines import log_lines

WHOLE = {f"model.{number}": torch.arange(7.0 * 30).view(7, 30) + number for number in range(12)}


@dataclasses.dataclass
class SavedProgress:
    iteration: int


class State:
    """Tensors that are sharded on either axis, unevenly, or replicated on both ranks."""

    def __init__(self, turn: int = 0) -> None:
        mesh = init_device_mesh("cpu", (2,))
        placements = [Replicate(), Shard(0), Shard(1)]
        self.tensors: dict[str, Tensor] = {
            name: distribute_tensor(tensor.clone(), mesh, [placements[(number + turn) % 3]])
            for number, (name, tensor) in enumerate(WHOLE.items())
        }

    def state_dict(self) -> Mapping[str, Tensor]:
        generator = torch.full((10,), dist.get_rank(), dtype=torch.uint8)
        return {**self.tensors, "optimizer.step": torch.tensor(5.0), f"rng.{dist.get_rank()}.cpu": generator}

    def expected_bytes(self) -> int:
        return 10_000


def manager_of(root: Path) -> CheckpointManager:
    return CheckpointManager(State(), SaveOptions(root, asynchronous=True), backend=select_backend("cpu"))


def chunks_of(reader: CheckpointReader, name: str) -> list[tuple[ChunkStorageMetadata, Any]]:
    """The stored chunks of a tensor, with their places."""
    entry = reader.read_metadata().state_dict_metadata[name]
    return [(chunk, reader.storage_data[MetadataIndex(name, chunk.offsets)]) for chunk in entry.chunks]


def every_element_once(root: Path) -> None:
    """Replicated tensors are written by one rank each, not all by the same; any other sharding can load them."""
    manager = manager_of(root)
    manager.start(SavedProgress(1))
    manager.finish()
    path = root / "iter_0000001"
    reader = CheckpointReader(path, directory.verify_directory(path, checksums=True))
    for name, tensor in WHOLE.items():
        assert torch.equal(reader.read(name), tensor)
        assert sum(torch.Size(chunk.sizes).numel() for chunk, _ in chunks_of(reader, name)) == tensor.numel()
    writers = {info.relative_path[2] for name in list(WHOLE)[::3] for _, info in chunks_of(reader, name)}
    assert writers == {"0", "1"}  # of the replicated ones
    assert {name for name in reader.tensors if name.startswith("rng.")} == {"rng.0.cpu", "rng.1.cpu"}
    for turn in (0, 1, 2):
        state = State(turn)
        for tensor in state.tensors.values():
            tensor.to_local().fill_(-1)
        load_tensors(reader, state.tensors)
        assert all(torch.equal(tensor.full_tensor(), WHOLE[name]) for name, tensor in state.tensors.items())


def damage_on_one_rank_fails_on_all(root: Path) -> None:
    """A rank whose chunks are intact does not wait for one with damaged chunks."""
    manager = manager_of(root)
    manager.start(SavedProgress(1))
    manager.finish()
    path = root / "iter_0000001"
    reader = CheckpointReader(path, directory.verify_directory(path))
    dist.barrier()  # while the damage is written the file is briefly empty, which rank 1 would find while verifying
    if dist.get_rank() == 0:
        _, info = next(item for item in chunks_of(reader, "model.1") if item[1].relative_path.startswith("__1"))
        content = bytearray((path / info.relative_path).read_bytes())
        content[info.offset + info.length // 2] ^= 1
        (path / info.relative_path).write_bytes(content)
    dist.barrier()
    try:
        load_tensors(reader, State().tensors)
    except UserError as error:
        assert "__1_0.distcp" in str(error) and "another checksum" in str(error)
    else:
        raise AssertionError("damage was not detected")


def directory_of_one_machine(root: Path) -> None:
    """A relative path and different working directories: not the same directory."""
    files.VISIBILITY_SECONDS = 0.2
    home, own = os.getcwd(), root / f"machine{dist.get_rank()}"
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        manager_of(Path("save"))
    except UserError as error:
        assert "is not the same directory on all machines: rank 1 on" in str(error)
    else:
        raise AssertionError("no error")
    finally:
        os.chdir(home)


def files_that_do_not_arrive(root: Path) -> None:
    """Rank 1 writes to another directory with the same name."""
    manager = manager_of(root)
    manager.start(SavedProgress(1))
    manager.wait()
    write = CheckpointWriter._write_file

    def elsewhere(writer: CheckpointWriter, name: str, *arguments: Any) -> directory.WrittenFile:
        written = write(writer, name, *arguments)
        if dist.get_rank() == 1:
            (Path(writer.path) / name).unlink()
        return written

    CheckpointWriter._write_file = elsewhere
    lines: list[str] = []
    with log_lines(lines.append):
        manager.start(SavedProgress(2))
        manager.wait()
    CheckpointWriter._write_file = write
    assert manager.failures == 1 and directory.read_tracker(root) == 1
    if dist.get_rank() == 0:
        assert "__1_0.distcp was written by another rank and is not visible here" in lines[-1], lines
    manager.start(SavedProgress(3))
    manager.finish()
    assert manager.failures == 0 and directory.read_tracker(root) == 3


def lost_rank(root: Path) -> None:
    """Rank 1 ends in the middle of its write; rank 0, which waits for it, is told."""
    manager = manager_of(root)
    manager.start(SavedProgress(1))
    manager.finish()
    if dist.get_rank() == 1:
        CheckpointWriter._write_file = lambda *_: os._exit(0)  # torchrun would kill rank 0 for another status
    lines: list[str] = []
    started = time.monotonic()
    with log_lines(lines.append):
        manager.start(SavedProgress(2))
        manager.wait()
    assert manager.failures == 1 and time.monotonic() - started < 20
    assert "the checkpoint of iteration 2 was not written" in lines[-1] and "\n" not in lines[-1], lines
    assert directory.read_tracker(root) == 1 and not list(root.glob(".iter*"))


def main(work: Path) -> None:
    """Run all checks, each in its own directory."""
    torch.set_num_threads(1)
    init_distributed(select_backend("cpu"), timeout_minutes=1)
    for action in (
        every_element_once,
        damage_on_one_rank_fails_on_all,
        directory_of_one_machine,
        files_that_do_not_arrive,
    ):
        action(work / action.__name__)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{action.__name__}: passed", flush=True)
    lost_rank(work / "lost_rank")
    print("lost_rank: passed", flush=True)
    shutdown_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
