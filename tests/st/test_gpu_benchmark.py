"""The accelerator's benchmark goes its whole way, in small, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS

pytestmark = [pytest.mark.st, pytest.mark.slow]


def run(page: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(page), *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600)
    return json.loads(page.with_suffix(".json").read_text())


def test_every_part_gives_a_result(tmp_path):
    results = run(tmp_path / "page.md")
    assert list(results) == list(PARTS)
    assert not [(name, result) for name, result in results.items() if "failed" in result]
    assert [name for name, result in results.items() if "skipped" in result] == ["Hugging Face, bf16, Liger"]
    assert all(f"## {name}" in (tmp_path / "page.md").read_text() for name in results)


def test_parts_without_time_are_named(tmp_path):
    results = run(tmp_path / "page.md", "--minutes", "0.2")
    assert all("skipped" in result for result in list(results.values())[1:])
