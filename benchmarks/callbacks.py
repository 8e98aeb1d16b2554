"""What the callbacks that report a run cost: host time per step of rank 0, and as a share of a step.

    python benchmarks/callbacks.py [--report-to tensorboard,wandb] [--steps 1000] [--metrics 40]

Steps are simulated: the callbacks get records with made-up metrics, at a pace that leaves the trackers' threads time.
"In the step" is the time that the training thread spends in the callback; "CPU" is that of all threads of the process,
which share Python's lock with it. W&B writes offline; its own process is not counted. The pages of the run report are
left out: the report spaces them so that they take at most 0.4 % of the run's time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.schema import split_words
from mindspeed_mm.training.callbacks.anomaly_detection import AnomalyDetector
from mindspeed_mm.training.callbacks.base import Callback
from mindspeed_mm.training.callbacks.log_line import LogLine
from mindspeed_mm.training.callbacks.metrics_file import MetricsFile
from mindspeed_mm.training.callbacks.run_report import RunReport
from mindspeed_mm.training.callbacks.skipped_samples import SkippedSamples
from mindspeed_mm.training.callbacks.tracker_clients import identities, make_trackers
from mindspeed_mm.training.callbacks.trackers import Trackers
from mindspeed_mm.training.logging_setup import setup_logging
from mindspeed_mm.training.metrics import StepRecord

_STEP_MS = 200.0
_PARTS = ("flags", "data", "model", "fsdp2", "data_summary", "hardware", "packages")
_DESCRIPTION: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report-to", default="tensorboard,wandb", help="trackers, each measured by itself")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--metrics", type=int, default=40, help="scalars of each step")
    parser.add_argument("--pause-ms", type=float, default=5.0, help="between two steps")
    options = parser.parse_args()
    for name, value in {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(name, value)
    print(f"{'callback':24}{'in the step, ms':>18}{'CPU, ms':>12}{'CPU / 200 ms step':>20}")
    with tempfile.TemporaryDirectory() as directory:
        args = _args(directory)
        rows: dict[str, Callback] = {
            "log line": LogLine(packed=True),
            "metrics.jsonl": MetricsFile(directory),
            "run report": RunReport(directory, describe=lambda: _DESCRIPTION),
            "anomaly detection": AnomalyDetector(args, model=nn.Linear(1, 1), describe=str),
            "skipped samples": SkippedSamples(0),
        }
        for name in split_words(options.report_to):
            args = _args(directory, "--report-to", name)
            rows[name] = Trackers(
                make_trackers(args), directory=directory, identities=identities(args), describe=dict
            )
        total = 0.0
        for name, callback in rows.items():
            in_step, cpu = _measure(callback, args, options)
            total += cpu
            print(f"{name:24}{in_step:18.3f}{cpu:12.3f}{cpu / _STEP_MS:20.2%}", flush=True)
        print(f"{'all':24}{'':18}{total:12.3f}{total / _STEP_MS:20.2%}")
    return 0


def _args(directory: str, *words: str) -> Any:
    required = ["--mm-data", "-", "--mm-model", "-", "--seq-length", "8", "--lr", "1", "--train-iters", str(10**6)]
    return parse_args([*required, "--global-batch-size", "8", "--log-interval", "1", "--save", directory, *words])


def _measure(callback: Callback, args: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds per step in the training thread, and of CPU time of all threads beyond a run without callback."""
    context = SimpleNamespace(
        layout=SimpleNamespace(is_main=True, world_size=8, dp_size=8, context_size=1, expert_mesh=None),
        progress=SimpleNamespace(iteration=0, best=None), peak_tflops=None,
    )
    run = SimpleNamespace(
        args=args, context=context, stopped=False, error=None, finished_early="", router_choices=None
    )
    setup_logging(0)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        callback.on_run_start(run)
        for iteration in range(1, 51):  # the trackers start
            callback.on_step_end(_record(iteration, options.metrics))
        time.sleep(3.0)
        own, began = 0.0, time.process_time()
        for iteration in range(51, 51 + options.steps):
            record = _record(iteration, options.metrics)
            start = time.perf_counter()
            callback.on_step_end(record)
            own += time.perf_counter() - start
            time.sleep(options.pause_ms / 1e3)
        time.sleep(1.0)
        cpu = time.process_time() - began
        began = time.process_time()
        for iteration in range(options.steps):
            _record(iteration, options.metrics)
            time.sleep(options.pause_ms / 1e3)
        cpu -= time.process_time() - began
        callback.on_run_end(failed=False)
    return 1e3 * own / options.steps, 1e3 * max(0.0, cpu) / options.steps


def _record(iteration: int, count: int) -> StepRecord:
    named = {"consumed_samples": 8 * iteration, "learning_rate": 1e-5, "loss": random.random(), "grad_norm": 1.0,
             "tokens": 8e4, "target_tokens": 2e4, "samples": 8.0, "tflop": 1.0, "seconds": 0.2,
             "data_wait_seconds": 0.0, "peak_memory_gib": 40.0, "skipped_step": 0.0, "skipped_unusable": 0.0}
    others = {f"part_{number}/value": random.random() for number in range(count - len(named))}
    return StepRecord(iteration, {**named, **others})


if __name__ == "__main__":
    sys.exit(main())
