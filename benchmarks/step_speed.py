"""Tokens per second of an optimizer step, against Hugging Face's model at its best settings, in one run.

    python -m benchmarks.step_speed [--models tiny 100m] [--precisions fp32 bf16] [--output step_speed.json]

Both train on the same samples, alternately, one step each; medians over the rounds. Hugging Face's model runs with
sdpa, fused AdamW and batches padded to the longest sample, with grouped experts and with its loop over experts. In bf16
it runs twice: under autocast, which keeps parameters and moments in fp32 as this project does, and in bf16 throughout.
The fastest variant is the baseline. oneDNN's primitive cache is large enough for all models, as if each ran alone. On
one CPU thread the benchmark measures CPU time, which other programs hardly affect.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import torch

from benchmarks.measuring import option_parser, prepare, seconds_of, write_results
from benchmarks.runners import HuggingFaceRunner, OurRunner, cut, tokens
from benchmarks.workload import draw_samples, hf_config, photographs
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.process_group import init_distributed, shutdown_distributed
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.spec import ModelBuildOptions

PIXELS = {"tiny": (16384, 65536), "100m": (16384, 65536)}


def alternate(runners: dict[str, Any], *, rounds: int, backend: Backend) -> dict[str, list[float]]:
    """Seconds of each runner's step in each round, after one warm-up round.

    Every other round is in reverse order: the first to step fills shared caches, such as oneDNN's primitives by shape.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(rounds + 1):
        for name in list(runners)[:: 1 if round_ % 2 else -1]:
            taken = seconds_of(runners[name].step, backend)
            if round_:
                seconds[name].append(taken)
    return seconds


def compare(model: str, precision: str, options: argparse.Namespace, backend: Backend) -> dict[str, Any]:
    """One row of the table."""
    config = hf_config(model)
    model_config = Qwen3VLConfig.from_config(config)
    low, high = PIXELS[model]
    count = options.micro_batch * options.accumulation * (options.steps or options.rounds + 1)
    steps = cut(
        draw_samples(count, model_config, min_pixels=low, max_pixels=high),
        micro_batch=options.micro_batch, accumulation=options.accumulation,
    )
    modes = ["fp32"] if precision == "fp32" else ["autocast", "bf16"]
    runners: dict[str, Any] = {
        f"HF {mode} {experts}": HuggingFaceRunner(
            config, model_config, steps, device=backend.device, mode=mode, experts=experts)
        for mode in modes for experts in ("grouped_mm", "eager")
    }
    runners["ours"] = OurRunner(model_config, steps, backend=backend, precision=precision)
    if options.compiled:
        runners["ours compiled"] = OurRunner(
            model_config,
            steps,
            backend=backend,
            precision=precision,
            choices=ModelBuildOptions(compile_small_operators=True),
        )
    parameters = sum(parameter.numel() for parameter in runners["ours"].model.parameters())
    try:
        seconds = alternate(runners, rounds=options.rounds, backend=backend)
    finally:
        for name in runners:
            if name.startswith("ours"):
                runners[name].close()
    per_step, target_tokens = tokens(steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in medians if not name.startswith("ours")), key=medians.__getitem__)
    # ratio of neighbouring steps, which share the machine's state
    ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[best], seconds["ours"], strict=True))
    return {
        "model": model,
        "parameters": parameters,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "tokens_per_step": per_step,
        "target_tokens_per_step": target_tokens,
        "seconds": seconds,
        "median_seconds": medians,
        "tokens_per_second": {name: per_step / value for name, value in medians.items()},
        "target_tokens_per_second": {name: target_tokens / value for name, value in medians.items()},
        "best_hugging_face": best,
        "ratio": ratio,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = option_parser(__doc__, rounds=6)
    parser.add_argument("--models", nargs="+", default=["tiny", "100m"], choices=sorted(PIXELS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compiled", action="store_true", help="ours with --compile-small-operators too")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=0, help="distinct steps, repeated in a cycle; 0: no repetition")
    options = parser.parse_args()
    # the default of 1024 primitives suits one model; here up to five would evict each other's
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")
    backend = prepare(options)
    init_distributed(backend, timeout_minutes=10)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {photographs()[1]}")
    rows = []
    for model in options.models:
        for precision in options.precisions:
            row = compare(model, precision, options, backend)
            rows.append(row)
            listed = " | ".join(
                f"{name} {1000 * row['median_seconds'][name]:.0f} ms, {value:.0f} tokens/s"
                for name, value in row["tokens_per_second"].items()
            )
            print(f"{model:5} {precision} {row['parameters'] / 1e6:.0f} M | {listed} | "
                  f"{row['ratio']:.2f}x {row['best_hugging_face']}", flush=True)
    shutdown_distributed()
    write_results(options, rows)


if __name__ == "__main__":
    main()
