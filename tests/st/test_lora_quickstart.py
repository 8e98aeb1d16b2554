"""``quickstart.sh --lora`` from one end to the other; takes minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.st, pytest.mark.slow]


def test_adapters_learn_the_digits(tmp_path):
    run = tmp_path / "run"
    result = subprocess.run(
        ["bash", "examples/qwen3vl/quickstart.sh", "--lora", "--skip-install", "--device", "cpu", "--out", str(run)],
        cwd=ROOT, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=1800,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    accuracies = dict(re.findall(r"^(without adapters|held-out accuracy): +\d+ of 297 images \((.*)%\)$", output, re.M))
    assert float(accuracies["without adapters"]) < 80 and float(accuracies["held-out accuracy"]) >= 94
    adapter = run / "save_dir/iter_0000240/adapter"
    assert f"trained model:     {adapter} (adapters of {run}/ckpt/hf_path/Qwen3-VL-tiny-base)" in output
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 16
    assert all((run / name).stat().st_size for name in ("loss.png", "samples.png"))
