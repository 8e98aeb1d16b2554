"""Shared by the compute benchmarks: command-line options, timing, peak memory and the JSON file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.backend.device import Backend, select_backend


def option_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with device, threads, measured rounds and result file.

    Args:
        description: the benchmark's docstring.
        rounds: the default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="device to run on")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def prepare(options: argparse.Namespace) -> Backend:
    """Set the number of threads and select the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return select_backend(options.device)


def write_results(options: argparse.Namespace, results: Any) -> None:
    """Write the JSON file, if the options name one."""
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def seconds_of(function: Callable[[], object], backend: Backend) -> float:
    """Time of one call, device work included; on one CPU thread CPU time, which other programs hardly affect."""
    cpu_time = not backend.is_accelerator and torch.get_num_threads() == 1
    clock = time.process_time if cpu_time else time.perf_counter
    backend.synchronize()
    started = clock()
    function()
    backend.synchronize()
    return clock() - started


def peak_bytes(function: Callable[[], object], backend: Backend) -> int:
    """Peak of allocated bytes during a call, above those allocated before it.

    Counted by torch's allocator; on a CPU by the profiler's record of allocations.
    """
    if backend.is_accelerator:
        module = getattr(torch, backend.name)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        function()
        backend.synchronize()
        return module.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    allocated = peak = 0
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(records, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
