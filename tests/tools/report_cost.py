"""What the report of a long run costs: ``python -m tests.tools.report_cost [STEPS]``.

Prints the seconds of a step's collection and of a page, and the page's size, for a model of 48 layers with 128 experts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mindspeed_mm.evaluation.report.run_data import RunData
from mindspeed_mm.evaluation.report.run_report import run_page

METRICS = (
    "loss", "grad_norm", "learning_rate", "seconds", "data_wait_seconds", "tokens", "target_tokens", "router_max_load",
    "tokens_per_second_per_device", "target_tokens_per_second_per_device", "mfu", "peak_memory_gib", "skipped_step",
    "skipped_unusable", "skipped_too_long", "skipped_no_target", "samples", "consumed_samples", "tflop",
)


def main(steps: int) -> None:
    """Measure."""
    noise = np.random.default_rng(0)
    values = noise.random((steps, len(METRICS))) + 0.5
    values[:, [METRICS.index(name) for name in METRICS if name.startswith("skipped")]] = 0.0
    run = RunData(name="long run", state="running", updated="2026-01-01T00:00:00+00:00", train_iters=steps)
    began = time.perf_counter()
    for iteration, row in enumerate(values.tolist(), start=1):
        run.history.add(iteration, dict(zip(METRICS, row, strict=True)))
    collected = (time.perf_counter() - began) / steps
    run.router = (1, steps, noise.integers(1000, 9000, (48, 128)).tolist())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.html"
        began = time.perf_counter()
        run.save(path.parent)
        run_page(run).write(path)
        taken = time.perf_counter() - began
        size = path.stat().st_size / 1e3
        print(f"{steps} steps: {1e6 * collected:.1f} us to collect a step; a page of {size:.0f} kB "
              f"in {taken:.3f} s, so one every {max(60.0, taken / 0.004):.0f} s at most")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
