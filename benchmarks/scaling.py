"""Time of a step on 1, 2 and 4 gloo processes with the same work for each, and what part of it is lost.

    python -m benchmarks.scaling [--processes 1 2 4] [--size tiny] [--steps 5] [--output scaling.json]

Each process trains on as many samples, the same ones, under FSDP2 (one process: without), on one thread. Efficiency is
the time of a step on one process over that on several, over the share of a core that each process has: with as many
processes as cores it is the usual one; beyond, 1.0 means that nothing but the cores is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(options: argparse.Namespace) -> None:
    """One of the processes: train, and print the median on the first."""
    from benchmarks.runners import OurRunner, cut, tokens
    from benchmarks.workload import draw_samples, geometry_config
    from mindspeed_mm.backend.device import select_backend, start_processes, stop_processes
    from mindspeed_mm.models.geometry import Qwen3VLGeometry

    torch.set_num_threads(1)
    backend = select_backend("cpu")
    start_processes(backend, timeout_minutes=5)
    rank = int(os.environ["RANK"])
    geometry = Qwen3VLGeometry.from_config(geometry_config(options.size))
    samples = draw_samples(4 * options.accumulation, geometry, min_pixels=16384, max_pixels=65536)
    steps = cut(samples, micro_batch=4, accumulation=options.accumulation)
    runner = OurRunner(geometry, steps, backend=backend, precision="fp32")
    seconds = []
    try:
        for index in range(options.steps + 2):
            torch.distributed.barrier()
            started = time.perf_counter()
            runner.step()
            torch.distributed.barrier()
            if index >= 2:
                seconds.append(time.perf_counter() - started)
    finally:
        runner.close()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "tokens": tokens(steps)[0]}), flush=True)
    stop_processes()


def launch(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run :func:`work` on ``processes`` processes; what the first one printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m",
               "benchmarks.scaling", "--worker", "--size", options.size, "--steps", str(options.steps),
               "--accumulation", str(options.accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=540)
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"seconds"')))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", default="tiny", help="model of benchmarks.workload")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of 4 samples in a step")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows: list[dict[str, Any]] = []
    print(f"{CORES} cores\n\n| processes | ms per step | tokens/s of all | efficiency |\n| --- | --- | --- | --- |")
    for processes in options.processes:
        found = launch(processes, options)
        median = statistics.median(found["seconds"])
        rows.append({"processes": processes, "cores": CORES, "median_seconds": median, **found,
                     "tokens_per_second": processes * found["tokens"] / median})
        share = min(1.0, CORES / processes)
        rows[-1]["efficiency"] = rows[0]["median_seconds"] / median / share
        print(f"| {processes} | {1000 * median:.0f} | {rows[-1]['tokens_per_second']:.0f} | "
              f"{rows[-1]['efficiency']:.2f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
