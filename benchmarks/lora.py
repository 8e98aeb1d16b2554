"""Time and memory of an optimizer step: full fine-tuning, LoRA, and LoRA by Hugging Face's model with PEFT, in one run.

    python -m benchmarks.lora [--model 100m] [--precision bf16] [--output lora.json]

All train on the same samples, alternately, one step each; medians over the rounds. Memory is the peak resident memory
of a process of its own for each, above that before its model was built; two steps are measured. The base of LoRA is
kept in the compute type, as in training. Hugging Face's parameters are in the same type, its adapters in fp32.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.measuring import option_parser, prepare, write_results
from benchmarks.runners import HuggingFaceRunner, OurRunner, Steps, cut
from benchmarks.step_speed import alternate
from benchmarks.workload import draw_samples, hf_config, photographs
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig


def _options(*targets: str) -> LoraOptions:
    return LoraOptions(targets=targets, r=16, alpha=32, expert_r=16)


ATTENTION, TEXT = _options("attention"), _options("attention", "experts")
VARIANTS: dict[str, LoraOptions | None] = {
    "full": None, "LoRA, attention": ATTENTION, "LoRA, attention and experts": TEXT, "PEFT, attention": ATTENTION,
    "PEFT, attention and experts": TEXT,
}
FULL = "full"


def runner_of(name: str, options: argparse.Namespace, backend: Backend) -> Callable[[], Any]:
    """A function that builds the variant ``name``, whose samples are ready. Vision is frozen, as in the recipe."""
    config = hf_config(options.model)
    model_config = Qwen3VLConfig.from_config(config)
    steps: Steps = cut(
        draw_samples(4 * 2 * (options.rounds + 1), model_config, min_pixels=16384, max_pixels=65536),
        micro_batch=4, accumulation=2,
    )
    lora = VARIANTS[name]
    if name.startswith("PEFT"):
        return functools.partial(
            HuggingFaceRunner, config, model_config, steps, device=backend.device, mode=options.precision, lora=lora,
            frozen_vision=True)
    return functools.partial(
        OurRunner, model_config, steps, backend=backend, precision=options.precision, lora=lora, frozen_vision=True)


def peak_resident() -> int:
    """Bytes, of this process so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def measure_memory(name: str, options: argparse.Namespace, backend: Backend) -> int:
    """Peak of two steps above the memory before the model is built, in bytes."""
    build = runner_of(name, options, backend)
    before = peak_resident()
    runner = build()
    for _ in range(2):
        runner.step()
    backend.synchronize()
    return peak_resident() - before


def memory_of(name: str, options: argparse.Namespace) -> int:
    """:func:`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lora", "--model", options.model, "--precision", options.precision]
    command += ["--threads", str(options.threads), "--rounds", "2", "--memory-of", name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=6)
    parser.add_argument("--model", default="100m", choices=["tiny", "100m"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")  # for five models, as in step_speed
    backend = prepare(options)
    init_distributed(backend, timeout_minutes=10)
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options, backend)))
        sys.stdout.flush()
        shutdown_distributed()
        return
    warnings.filterwarnings("ignore", message=".*rank_pattern")  # which PEFT honours for experts all the same
    print(f"{options.model}, {options.precision}, {photographs()[1]}")
    memory = {name: memory_of(name, options) for name in VARIANTS}
    runners = {name: runner_of(name, options, backend)() for name in VARIANTS}
    trained = {
        name: sum(p.numel() for p in runner.model.parameters() if p.requires_grad) for name, runner in runners.items()
    }
    seconds = alternate(runners, rounds=options.rounds, backend=backend)
    rows = []
    for name in VARIANTS:
        ratios = [mine / full for mine, full in zip(seconds[name], seconds[FULL], strict=True)]
        row = {
            "variant": name, "trained": trained[name], "milliseconds": 1000 * statistics.median(seconds[name]),
            "of full": statistics.median(ratios), "peak GiB": memory[name] / 2**30,
        }
        rows.append(row)
        print(f"{name:28} {row['trained'] / 1e6:7.2f} M trained | {row['milliseconds']:6.0f} ms | "
              f"{row['of full']:.2f} of full | {row['peak GiB']:.2f} GiB", flush=True)
    for runner in runners.values():
        runner.close()
    shutdown_distributed()
    write_results(options, rows)


if __name__ == "__main__":
    main()
