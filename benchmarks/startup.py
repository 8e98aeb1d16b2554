"""Seconds from torchrun to the end of the first step, by phase, compared with Hugging Face's Trainer.

    python -m benchmarks.startup [--rounds 5] [--output startup.json]

Trains the quickstart's tiny model and digits on one rank and one thread, alternating: this project's launcher with data
preparation (first run) and without (second run); Hugging Face's Trainer on the same files, without preparing data; and
torchrun with an empty program. Medians of wall time. Needs accelerate, as the Trainer does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspeed_mm.backend.device import find_device

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/qwen3vl"
PHASES = ("launcher's checks", "torchrun, imports, process group", "model and weights", "data", "first step", "end")
# the line printed at the end of each phase in PHASES; the last phase ends with the process
OURS = (r"^torchrun begins", r"world size \d+ on ", r"\] loaded ", r"\] data: ", r"\] iteration +1/")
TRAINER = tuple(f"^{line}" for line in (
    "torchrun begins", "milestone: processes", "milestone: model", "milestone: data", "milestone: first step"))


def phases_of(arrivals: Sequence[tuple[float, str]], ends: Sequence[str], *, finished: float) -> list[float]:
    """Seconds of each phase.

    Args:
        arrivals: seconds after the start, and line, for each line of output.
        ends: pattern of the line at the end of each phase but the last.
        finished: seconds after the start when the process ended.

    Raises:
        SystemExit: if a line is missing.
    """
    times, position = [0.0], 0
    for pattern in ends:
        for index in range(position, len(arrivals)):
            if re.search(pattern, arrivals[index][1]):
                times.append(arrivals[index][0])
                position = index + 1
                break
        else:
            raise SystemExit(f"no line {pattern!r} in:\n" + "\n".join(line for _, line in arrivals[-20:]))
    times.append(finished)
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def watch(command: Sequence[str | Path], environment: Mapping[str, str]) -> tuple[list[tuple[float, str]], float]:
    """Run a command; returns its output lines with their times, and its duration."""
    started, arrivals = time.perf_counter(), []
    with subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:
        for line in process.stdout:
            arrivals.append((time.perf_counter() - started, line.rstrip("\n")))
    return arrivals, time.perf_counter() - started


def prepare(place: Path) -> dict[str, str]:
    """Write the quickstart's files; returns the environment in which its launcher trains one step on them."""
    model = place / "model"
    convert = EXAMPLE.parent / "qwen2vl/llava_instruct_2_mllm_demo_format.py"
    commands = (
        (EXAMPLE / "quickstart/make_tiny_model.py", "--output", place / "ckpt/hf_path/Qwen3-VL-tiny"),
        ("-m", "checkpoint.cli", "Qwen3VLConverter", "hf_to_dcp", "--hf_dir", place / "ckpt/hf_path/Qwen3-VL-tiny",
         "--dcp_dir", model),
        (EXAMPLE / "quickstart/make_digits.py", "--output", place / "data"),
        (convert, "--input", place / "data/digits_train.json", "--image-root", place / "data/images", "--output",
         place / "data/mllm_format_digits_train.json"),
        (EXAMPLE / "quickstart/configure.py", "--run-dir", place),
    )
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    # a torchrun that prints when it starts, first on the PATH
    (place / "bin").mkdir()
    shim = place / "bin/torchrun"
    shim.write_text(f"#!/bin/sh\necho torchrun begins\nexec '{sys.executable}' -m torch.distributed.run \"$@\"\n")
    shim.chmod(0o755)
    return {
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "NPUS_PER_NODE": "1", "MBS": "12", "TRAIN_ITERS": "1",
        "CKPT_ARGS": "--no-save-optim --no-load-optim", "MM_DATA": str(place / "data_tiny.json"),
        "MM_MODEL": str(place / "model_tiny.json"), "LOAD_PATH": str(model), "SAVE_PATH": str(place / "save"),
    }


def ours(place: Path, environment: Mapping[str, str], *, prepared: bool) -> list[float]:
    """Phases of our launcher."""
    for directory in (place / "save", *(() if prepared else (place / "data/cache_dir",))):
        shutil.rmtree(directory, ignore_errors=True)
    arrivals, finished = watch(("bash", EXAMPLE / "finetune_qwen3vl_tiny.sh"), environment)
    return phases_of(arrivals, OURS, finished=finished)


def trainer(place: Path, environment: Mapping[str, str]) -> list[float]:
    """Phases of Hugging Face's Trainer."""
    command = ("torchrun", "--standalone", "--nproc_per_node", "1", "-m", "benchmarks.startup_peer",
               place / "ckpt/hf_path/Qwen3-VL-tiny", place / "data/mllm_format_digits_train.json", place / "peer",
               find_device())
    arrivals, finished = watch(command, environment)
    return phases_of(arrivals, TRAINER, finished=finished)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("accelerate is not installed, and Hugging Face's Trainer needs it: pip install accelerate")
    runs: dict[str, list[list[float]]] = {"ours, first run": [], "ours, second run": [], "Hugging Face's Trainer": []}
    empty_runs = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        environment = prepare(place)
        empty = place / "empty.py"
        empty.write_text("")
        for round_ in range(options.rounds + 1):  # the first round is warm-up
            found = {
                "ours, first run": ours(place, environment, prepared=False),
                "Hugging Face's Trainer": trainer(place, environment),
                "ours, second run": ours(place, environment, prepared=True),
            }
            alone = watch(("torchrun", "--standalone", "--nproc_per_node", "1", empty), environment)[1]
            if round_:
                empty_runs.append(alone)
                for name, phases in found.items():
                    runs[name].append(phases)
    medians = {name: [statistics.median(column) for column in zip(*rounds, strict=True)]
               for name, rounds in runs.items()}
    # from torchrun to the end of the first step, without the launcher's checks and the end
    totals = {name: statistics.median(sum(phases[1:-1]) for phases in rounds) for name, rounds in runs.items()}
    print(f"| seconds | {' | '.join(runs)} |\n" + "| --- " * (len(runs) + 1) + "|")
    for index, phase in enumerate(PHASES):
        print(f"| {phase} | {' | '.join(f'{values[index]:.2f}' for values in medians.values())} |")
    print(f"| torchrun to the end of the first step | {' | '.join(f'{value:.2f}' for value in totals.values())} |")
    print(f"\ntorchrun with an empty program: {statistics.median(empty_runs):.2f} s")
    if options.output:
        results = {"phases": PHASES, "runs": runs, "medians": medians, "totals": totals, "torchrun": empty_runs}
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
