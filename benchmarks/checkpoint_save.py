"""Time for which a save blocks training, synchronous and asynchronous, and the cost of checksums when loading.

    python benchmarks/checkpoint_save.py --dir DIRECTORY_ON_THE_DISK --gigabytes 2 --ranks 1 2

The state is fp32, sharded over the ranks as by FSDP2. Both modes alternate in one run; the medians and their ratio are
printed and written to ``DIR/checkpoint_save.json``. Loads read from the page cache, so that no slow disk hides the cost
of the checksums.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mindspeed_mm.backend.device import select_backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.checkpoint.directory import read_manifest, resolve_checkpoint
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions
from mindspeed_mm.checkpoint.state import load_tensors
from mindspeed_mm.checkpoint.storage import Check, CheckpointReader

ROOT = Path(__file__).resolve().parents[1]
TENSOR_BYTES = 96 << 20  # a layer's expert projection on one of 16 ranks


@dataclasses.dataclass
class Standing:
    """Progress of the run."""

    iteration: int


class State:
    """Tensors of ``nbytes`` in total, sharded over the ranks."""

    def __init__(self, nbytes: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows = TENSOR_BYTES // 4096
        self.tensors = {
            f"model.layers.{number}": distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)])
            for number in range(max(1, nbytes // TENSOR_BYTES))
        }

    def state_dict(self) -> Mapping[str, Tensor]:
        """All tensors."""
        return self.tensors

    def expected_bytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(tensor.to_local().nbytes for tensor in self.tensors.values())


def train(seconds: float) -> float:
    """Run matrix products for ``seconds``; returns products per second."""
    a, count, started = torch.randn(256, 256), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a = torch.tanh(a @ a)
        count += 1
    return count / (time.perf_counter() - started)


def worker(directory: Path, gigabytes: float, repeats: int) -> None:
    """One rank of the measurement; rank 0 prints the result as JSON."""
    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=10)
    state = State(int(gigabytes * 1e9))
    managers = {
        mode: CheckpointManager(
            state,
            SaveOptions(directory / mode, asynchronous=mode == "asynchronous", keep_last=1),
            backend=backend,
        )
        for mode in ("synchronous", "asynchronous")
    }
    alone = train(3.0)  # meanwhile the staging buffers are allocated, as in the first steps of a run
    blocked: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    total, speeds = [], []
    for repeat in range(repeats):
        for mode, manager in managers.items():
            dist.barrier()
            started = time.perf_counter()
            manager.start(Standing(repeat + 1))
            blocked[mode].append(time.perf_counter() - started)
            if mode == "asynchronous":
                speeds.append(train(1.0) / alone)
                manager.wait()
                total.append(time.perf_counter() - started)
    for manager in managers.values():
        manager.finish()
    loads = time_loads(directory / "asynchronous", state, repeats)
    if dist.get_rank() == 0:
        synchronous, asynchronous = (statistics.median(blocked[mode]) for mode in ("synchronous", "asynchronous"))
        result = {
            "ranks": dist.get_world_size(),
            "gigabytes": sum(tensor.numel() * 4 for tensor in state.tensors.values()) / 1e9,
            "synchronous": synchronous,
            "asynchronous": asynchronous,
            "asynchronous_first": blocked["asynchronous"][0],
            "ratio": asynchronous / synchronous,
            "asynchronous_total": statistics.median(total),
            "training_speed": statistics.median(speeds),
            **{f"load_{check}": seconds for check, seconds in loads.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)
    shutdown_distributed()


def time_loads(root: Path, state: State, repeats: int) -> dict[str, float]:
    """Median seconds to load the checkpoint, without and with verification of its checksums."""
    path = resolve_checkpoint(root)
    manifest = read_manifest(path)
    checks: tuple[Check, ...] = ("sizes", "read")
    readers = {check: CheckpointReader(path, manifest, check=check) for check in checks}
    seconds: dict[str, list[float]] = {check: [] for check in checks}
    for _ in range(repeats):
        for check, reader in readers.items():
            dist.barrier()
            started = time.perf_counter()
            load_tensors(reader, state.tensors)  # returns when all ranks have loaded
            seconds[check].append(time.perf_counter() - started)
    return {check: statistics.median(times) for check, times in seconds.items()}


def main() -> None:
    """Measure for each number of ranks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the state, all ranks")
    parser.add_argument("--ranks", "--processes", type=int, nargs="+", default=[1, 2], help="world sizes")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each mode")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.dir, args.gigabytes, args.repeats)
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    results = []
    print("| ranks | state | synchronous save, s | asynchronous: blocked, s | first time | share | total, s | "
          "training speed meanwhile | load, s | with checksums, s |\n|" + " --- |" * 10)
    for ranks in args.ranks:
        work = args.dir / f"work{ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                   str(Path(__file__).resolve()), "--worker", "--dir", str(work), "--gigabytes", str(args.gigabytes),
                   "--repeats", str(args.repeats)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        shutil.rmtree(work)
        result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])
        results.append(result)
        print(f"| {result['ranks']} | {result['gigabytes']:.2f} GB | {result['synchronous']:.2f} | "
              f"{result['asynchronous']:.2f} | {result['asynchronous_first']:.2f} | {100 * result['ratio']:.0f} % | "
              f"{result['asynchronous_total']:.2f} | {100 * result['training_speed']:.0f} % | "
              f"{result['load_sizes']:.2f} | {result['load_read']:.2f} |", flush=True)
    (args.dir / "checkpoint_save.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
