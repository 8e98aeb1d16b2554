"""Time of a step on 1, 2 and 4 gloo processes with the same work for each, and what part of it is lost.

    python -m benchmarks.scaling [--processes 1 2 4] [--size tiny] [--steps 5] [--output scaling.json]

Each process trains on as many samples, the same ones, under FSDP2 (one process: without), on one thread. Efficiency is
the time of a step on as many processes at once that know nothing of each other, over that of the processes together:
what the cores cannot do in either case is no loss. Beside it, of the first process: processor time of the thread that
computes, which FSDP2's copies are part of, of the other threads, which communicate, and the rest of the time: waiting.
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

import torch

CLOCKS = (time.perf_counter, time.process_time, time.thread_time)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(options: argparse.Namespace) -> None:
    """One of the processes: train, and print the median on the first."""
    from benchmarks.runners import OurRunner, cut, tokens
    from benchmarks.workload import draw_samples, geometry_config
    from mindspeed_mm.backend.device import select_backend
    from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig

    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=5)
    rank = int(os.environ["RANK"])
    model_config = Qwen3VLConfig.from_config(geometry_config(options.size))
    samples = draw_samples(4 * options.accumulation, model_config, min_pixels=16384, max_pixels=65536)
    steps = cut(samples, micro_batch=4, accumulation=options.accumulation)
    runner = OurRunner(model_config, steps, backend=backend, precision="fp32")
    seconds: list[tuple[float, ...]] = []
    try:
        for index in range(options.steps + 2):
            torch.distributed.barrier()
            started = [clock() for clock in CLOCKS]
            runner.step()
            torch.distributed.barrier()
            if index >= 2:
                seconds.append(tuple(clock() - start for clock, start in zip(CLOCKS, started, strict=True)))
    finally:
        runner.close()
    if rank == 0:
        print(json.dumps({"seconds": seconds, "tokens": tokens(steps)[0]}), flush=True)
    shutdown_distributed()


def launch(processes: int, options: argparse.Namespace, *, groups: int = 1) -> dict[str, float]:
    """Run :func:`work` on ``processes`` processes, in ``groups`` groups at once.

    Returns:
        ``wall``, ``process`` and ``thread`` seconds of a step, and its ``tokens``: medians over the steps of the first
        process, and over the groups.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m",
               "benchmarks.scaling", "--worker", "--size", options.size, "--steps", str(options.steps),
               "--accumulation", str(options.accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(groups)]
    found = []
    for process in started:
        printed, _ = process.communicate(timeout=540)
        if process.returncode:
            raise SystemExit(f"{processes} processes ended with status {process.returncode}")
        found.append(json.loads(next(line for line in printed.splitlines() if line.startswith('{"seconds"'))))
    steps = [[statistics.median(column) for column in zip(*group["seconds"], strict=True)] for group in found]
    medians = [statistics.median(column) for column in zip(*steps, strict=True)]
    return dict(zip(("wall", "process", "thread"), medians, strict=True)) | {"tokens": found[0]["tokens"]}


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
    rows: list[dict[str, float]] = []
    print(f"{CORES} cores\n\n| processes | ms per step | tokens/s of all | ms apart | efficiency | ms computing | "
          "ms communicating | ms waiting |\n" + "| --- " * 8 + "|")
    for processes in options.processes:
        together, apart = launch(processes, options), launch(1, options, groups=processes)
        wall, process, thread = together["wall"], together["process"], together["thread"]
        rows.append({"processes": processes, "cores": CORES, **together, "apart": apart["wall"],
                     "efficiency": apart["wall"] / wall, "tokens_per_second": processes * together["tokens"] / wall})
        print(f"| {processes} | {1000 * wall:.0f} | {rows[-1]['tokens_per_second']:.0f} | {1000 * apart['wall']:.0f} | "
              f"{rows[-1]['efficiency']:.2f} | {1000 * thread:.0f} | {1000 * (process - thread):.0f} | "
              f"{1000 * max(0.0, wall - process):.0f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
