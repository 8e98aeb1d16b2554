"""What a command costs before it does anything."""

from __future__ import annotations

import atexit
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import OURS, phases_of
from mindspeed_mm.training.garbage_collector import uncollected_imports

ROOT = Path(__file__).parents[2]


def seconds_of(*command: str) -> float:
    """Processor time of a child process, which other programs on the machine hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_instant():
    """In units of what importing torch takes on the same machine: half a second where that takes two."""
    commands = [["pretrain_transformers.py", "--help"], ["-c", "import torch"]]
    shown, torch = (min(seconds_of(*command) for _ in range(3)) for command in commands)
    assert shown < torch / 4


@pytest.mark.parametrize("words", [("--help",), ("missing.yaml", "training.lr=1"), ("v1.yaml", "training.lrr=1")])
def test_the_name_of_another_engines_entry_point_starts_the_same_program(words, tmp_path):
    (tmp_path / "v1.yaml").write_text("training: {lr: 1.0e-5}\n")
    environment = {**os.environ, "NON_MEGATRON": "true"}
    results = [
        subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True,
                       env=environment)
        for script in ("mindspeed_mm/fsdp/train/trainer.py", "pretrain_transformers.py")
    ]
    (status, out, err), theirs = ((r.returncode, r.stdout, r.stderr) for r in results)
    assert (status, out, err) == theirs
    assert (status, err) == (0, "") if words == ("--help",) else (status, err.count("\n")) == (2, 1)
    assert words[0] in err or "usage: " in out


def test_training_loads_no_compiler():
    listed = ("import sys, pretrain_transformers, mindspeed_mm.training.pretrain, mindspeed_mm.models.qwen3_vl.model; "
              "print(*sys.modules)")
    found = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = found.stdout.split()
    assert "megatron.core.fusions.fused_bias_dropout" in loaded  # which has functions decorated for it
    assert "torch._inductor.compile_fx" not in loaded


def test_collector_leaves_out_imports_and_works_afterwards():
    with uncollected_imports():
        assert not gc.isenabled()
    try:
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        atexit.unregister(gc.freeze)


def test_phases_of_a_start():
    arrivals = [(1.0, "torchrun begins"), (3.0, "[   0.0 s] world size 1 on cpu"), (3.5, "[ 0.1 s] loaded x"),
                (4.0, "[ 0.1 s] data: 3"), (6.0, "[2026] iteration        1/       1 | x")]
    assert phases_of(arrivals, OURS, finished=7.5) == [1.0, 2.0, 0.5, 0.5, 2.0, 1.5]
    with pytest.raises(SystemExit, match="loaded"):
        phases_of(arrivals[:2], OURS, finished=7.5)
