"""How long the training stands still for a save, written in front of it and beside it, and what checksums cost a load.

    python benchmarks/checkpoint_save.py --dir DIRECTORY_ON_THE_DISK --gigabytes 2 --processes 1 2

The state is fp32, spread over the processes as FSDP2 does. Both ways are timed by turns in the same run; the medians
and their ratio are printed and written to ``DIR/checkpoint_save.json``. What is loaded lies in the page cache, so that
the checksums have no slow disk to hide behind.
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
from mindspeed_mm.checkpoint.dcp_reader import DcpReader
from mindspeed_mm.checkpoint.directory import read_manifest, resolve_checkpoint
from mindspeed_mm.checkpoint.loader import load_tensors
from mindspeed_mm.checkpoint.manager import CheckpointManager, SaveOptions

ROOT = Path(__file__).resolve().parents[1]
TENSOR_BYTES = 96 << 20  # as of a layer's expert projection on one of 16 processes


@dataclasses.dataclass
class Standing:
    """Where the run stands."""

    iteration: int


class State:
    """Tensors of ``nbytes`` in all, spread over the processes."""

    def __init__(self, nbytes: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows = TENSOR_BYTES // 4096
        self.tensors = {
            f"model.layers.{number}": distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)])
            for number in range(max(1, nbytes // TENSOR_BYTES))
        }

    def shared(self) -> Mapping[str, Tensor]:
        """All of them."""
        return self.tensors

    def own(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def expected_bytes(self) -> int:
        """Bytes of this process's part."""
        return sum(tensor.to_local().nbytes for tensor in self.tensors.values())


def train(seconds: float) -> float:
    """Do matrix products for a while; returns how many a second."""
    a, count, started = torch.randn(256, 256), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a = torch.tanh(a @ a)
        count += 1
    return count / (time.perf_counter() - started)


def worker(directory: Path, gigabytes: float, repeats: int) -> None:
    """One process of the measurement; rank 0 prints what was measured as JSON."""
    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=10)
    state = State(int(gigabytes * 1e9))
    savers = {
        way: CheckpointManager(
            state,
            SaveOptions(directory / way, asynchronous=way == "beside", keep_last=1),
            backend=backend,
            say=lambda line: None,
        )
        for way in ("front", "beside")
    }
    alone = train(3.0)  # meanwhile the memory for the copies is taken, as in the first steps of a run
    stood_still: dict[str, list[float]] = {"front": [], "beside": []}
    whole, speeds = [], []
    for repeat in range(repeats):
        for way, saver in savers.items():
            dist.barrier()
            started = time.perf_counter()
            saver.start(Standing(repeat + 1))
            stood_still[way].append(time.perf_counter() - started)
            if way == "beside":
                speeds.append(train(1.0) / alone)
                saver.wait()
                whole.append(time.perf_counter() - started)
    for saver in savers.values():
        saver.finish()
    loads = time_loads(directory / "beside", state, repeats)
    if dist.get_rank() == 0:
        front, beside = statistics.median(stood_still["front"]), statistics.median(stood_still["beside"])
        result = {
            "processes": dist.get_world_size(),
            "gigabytes": sum(tensor.numel() * 4 for tensor in state.tensors.values()) / 1e9,
            "front": front,
            "beside": beside,
            "beside_first": stood_still["beside"][0],
            "ratio": beside / front,
            "whole": statistics.median(whole),
            "training_speed": statistics.median(speeds),
            **{f"load_{check}": seconds for check, seconds in loads.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)
    shutdown_distributed()


def time_loads(root: Path, state: State, repeats: int) -> dict[str, float]:
    """Median seconds to load what was saved, without and with its checksums."""
    path = resolve_checkpoint(root)
    reader = DcpReader(path, read_manifest(path))
    seconds: dict[str, list[float]] = {"sizes": [], "read": []}
    for _ in range(repeats):
        for check, times in seconds.items():
            dist.barrier()
            started = time.perf_counter()
            load_tensors(reader, state.tensors, check=check)  # returns when all have loaded
            times.append(time.perf_counter() - started)
    return {check: statistics.median(times) for check, times in seconds.items()}


def main() -> None:
    """Measure for each number of processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="directory on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state of all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure with")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each way")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.dir, args.gigabytes, args.repeats)
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    results = []
    print("| processes | state | save in front, s | stands still beside, s | of it, first | share | save beside, s | "
          "training meanwhile | load, s | with checksums, s |\n|" + " --- |" * 10)
    for processes in args.processes:
        work = args.dir / f"work{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                   str(Path(__file__).resolve()), "--worker", "--dir", str(work), "--gigabytes", str(args.gigabytes),
                   "--repeats", str(args.repeats)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        shutil.rmtree(work)
        result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])
        results.append(result)
        print(f"| {result['processes']} | {result['gigabytes']:.2f} GB | {result['front']:.2f} | "
              f"{result['beside']:.2f} | {result['beside_first']:.2f} | {100 * result['ratio']:.0f} % | "
              f"{result['whole']:.2f} | {100 * result['training_speed']:.0f} % | {result['load_sizes']:.2f} | "
              f"{result['load_read']:.2f} |", flush=True)
    (args.dir / "checkpoint_save.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
