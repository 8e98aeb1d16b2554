"""Conversion holds a bounded number of bytes, whatever the checkpoint's size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ut.checkpoint.tiny import random_config, write_hf_directory

DRIVER = """
import json, re, sys
from mindspeed_mm.checkpoint import conversion, safetensors_io
safetensors_io.READ_BYTES, conversion.HELD_BYTES = 2 << 20, 12 << 20
import torch, transformers, numpy, tqdm, safetensors
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.inspection import verify
small, large, out = sys.argv[1:]

def peak():
    # not ru_maxrss, which a process has from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

hf_to_dcp(small, out + "/small_dcp", workers=2)  # everything is imported now
dcp_to_hf(out + "/small_dcp", out + "/small_hf", small)
before = peak()
hf_to_dcp(large, out + "/large_dcp", workers=2)
first = peak()
dcp_to_hf(out + "/large_dcp", out + "/large_hf", large, workers=2, max_shard_size=50_000_000)
second = peak()
assert verify(out + "/large_dcp", large, workers=2).differing == []
print(json.dumps([before, first, second, peak()]))
"""


@pytest.mark.parametrize("layout", [pytest.param("hub", marks=pytest.mark.slow), "v5"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, layout: str) -> None:
    small = random_config(random.Random(1), moe=True)
    text = {
        "hidden_size": 256, "moe_intermediate_size": 96, "num_experts": 128, "vocab_size": 20_000,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "num_hidden_layers": 8,
    }
    write_hf_directory(tmp_path / "small", small)
    hub = write_hf_directory(tmp_path / "large", random_config(random.Random(1), moe=True, text=text), layout=layout)
    total, largest = sum(t.nbytes for t in hub.values()), max(t.nbytes for t in hub.values())
    assert total > 150e6
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path)]
    repository = str(Path(__file__).parents[3])
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=repository,
        # what is freed goes back to the system at once, and is not counted with what malloc keeps of it for later
        env={**os.environ, "PYTHONPATH": repository, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    before, *after = json.loads(result.stdout.splitlines()[-1])
    growth = [round((peak - before) / 1e6) for peak in after]
    # The budget of this test is 12 MB; Python's own structures take as much again.
    assert max(growth) < 30, f"MB more than for a small checkpoint: {growth}; {total=} {largest=}"
