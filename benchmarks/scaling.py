"""Weak scaling on 1, 2 and 4 gloo ranks: time of a step and parallel efficiency.

    python -m benchmarks.scaling [--ranks 1 2 4] [--size tiny] [--steps 5] [--output scaling.json]

Every rank trains on the same samples under FSDP2 (one rank: without), on one thread. Efficiency is the time of a step
of as many independent processes at once over that of the ranks together, so that a lack of cores counts as no loss. The
table also has, for rank 0: CPU time of the computing thread, FSDP2's copies included, CPU time of the other threads,
which communicate, and the rest of the time, waiting.
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
    """One rank: train; rank 0 prints its times."""
    from benchmarks.runners import OurRunner, cut, tokens
    from benchmarks.workload import draw_samples, hf_config
    from mindspeed_mm.backend.device import select_backend
    from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig

    torch.set_num_threads(1)
    backend = select_backend("cpu")
    init_distributed(backend, timeout_minutes=5)
    rank = int(os.environ["RANK"])
    model_config = Qwen3VLConfig.from_config(hf_config(options.size))
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


def launch(ranks: int, options: argparse.Namespace, *, jobs: int = 1) -> dict[str, float]:
    """Run :func:`work` on ``ranks`` ranks, in ``jobs`` independent jobs at once.

    Returns:
        ``wall``, ``process`` and ``thread`` seconds of a step, and its ``tokens``: medians over the steps of rank 0 and
        over the jobs.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m",
               "benchmarks.scaling", "--worker", "--size", options.size, "--steps", str(options.steps),
               "--accumulation", str(options.accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(jobs)]
    found = []
    for process in started:
        printed, _ = process.communicate(timeout=540)
        if process.returncode:
            raise SystemExit(f"the job of {ranks} ranks ended with status {process.returncode}")
        found.append(json.loads(next(line for line in printed.splitlines() if line.startswith('{"seconds"'))))
    steps = [[statistics.median(column) for column in zip(*job["seconds"], strict=True)] for job in found]
    medians = [statistics.median(column) for column in zip(*steps, strict=True)]
    return dict(zip(("wall", "process", "thread"), medians, strict=True)) | {"tokens": found[0]["tokens"]}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", "--processes", type=int, nargs="+", default=[1, 2, 4], help="world sizes")
    parser.add_argument("--size", default="tiny", help="model size in benchmarks.workload")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of 4 samples per step")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows: list[dict[str, float]] = []
    print(f"{CORES} cores\n\n| ranks | ms per step | total tokens/s | ms, independent processes | efficiency | "
          "ms computing | ms communicating | ms waiting |\n" + "| --- " * 8 + "|")
    for ranks in options.ranks:
        together, independent = launch(ranks, options), launch(1, options, jobs=ranks)
        wall, process, thread = together["wall"], together["process"], together["thread"]
        rows.append({"ranks": ranks, "cores": CORES, **together, "independent": independent["wall"],
                     "efficiency": independent["wall"] / wall, "tokens_per_second": ranks * together["tokens"] / wall})
        print(f"| {ranks} | {1000 * wall:.0f} | {rows[-1]['tokens_per_second']:.0f} | "
              f"{1000 * independent['wall']:.0f} | {rows[-1]['efficiency']:.2f} | "
              f"{1000 * thread:.0f} | {1000 * (process - thread):.0f} | "
              f"{1000 * max(0.0, wall - process):.0f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
