"""Exports beside the training: what fails is said, what would keep a stopped run is left."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks import hf_weights
from mindspeed_mm.training.callbacks.hf_weights import HFWeights

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/qwen3vl"


def callback(root: Path, **run: object) -> HFWeights:
    """Of a run that has saved iteration 4, and whose ``--save-hf-interval`` is 2."""
    checkpoint = root / "iter_0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    weights = HFWeights(root, str(root / "assets"), interval=2, in_use=set())
    weights.on_run_start(SimpleNamespace(**{
        "args": SimpleNamespace(train_iters=9, keep_last=None), "stopped": False,
        "context": SimpleNamespace(layout=SimpleNamespace(is_main=True), stop_requested=lambda: False), **run,
    }))
    return weights


def slow_export(monkeypatch: pytest.MonkeyPatch, seconds: int = 60) -> list[subprocess.Popen]:
    started = []

    def start(iteration: int, source: Path, target: Path, assets: str, base: str | None) -> hf_weights._Export:
        process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
        started.append(process)
        return hf_weights._Export(iteration, target, process, tempfile.TemporaryFile())

    monkeypatch.setattr(hf_weights._Export, "start", staticmethod(start))
    return started


def test_an_export_that_fails_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = callback(tmp_path)
    weights.on_save(3)  # no multiple of the interval
    weights.on_save(4)
    assert weights._due == [4] and weights._in_use == {4}
    weights.on_run_end(failed=False)
    (message,) = caplog.messages
    assert message.startswith("iteration 4 was not exported: error: ") and "has format None" in message
    assert message.endswith("; the checkpoint is complete, mm-convert (dcp_to_hf) exports it")
    assert weights._in_use == {4} and not list((tmp_path / "hf").glob("*"))  # it can be exported by hand


@pytest.mark.parametrize("how", ["failed", "stopped", "asked"])
def test_a_run_that_must_end_leaves_its_exports(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = slow_export(monkeypatch)
    context = SimpleNamespace(layout=SimpleNamespace(is_main=True), stop_requested=lambda: how == "asked")
    weights = callback(tmp_path, stopped=how == "stopped", context=context)
    weights.on_save(4)
    weights.on_step_queued(5)
    weights.on_save(6)
    weights.on_step_queued(6)  # one at a time
    assert len(started) == 1
    weights.on_run_end(failed=how == "failed")
    assert caplog.messages == [
        f"not exported, since the run ends: iter_0000004, iter_0000006 in {tmp_path}; the checkpoint is complete, "
        "mm-convert (dcp_to_hf) exports it"
    ]
    assert started[0].returncode  # it was ended


def test_exports_that_are_slower_than_saves_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hf/iter_0009999").mkdir(parents=True)
    slow_export(monkeypatch)
    weights = callback(tmp_path)
    for iteration in (4, 6, 8):
        weights.on_save(iteration)
        weights.on_step_queued(iteration)
    assert caplog.messages == [
        "iteration 6 is not exported: that of 4 still runs; raise --save-hf-interval"
    ]
    assert weights._due == [8] and weights._in_use == {4, 8}
    weights.on_run_end(failed=True)
    assert (tmp_path / "hf/iter_0009999").is_dir()


def test_a_checkpoint_that_was_not_written_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    slow_export(monkeypatch, seconds=0)
    weights = callback(tmp_path)
    weights.on_save(2)
    weights.on_step_queued(3)
    assert weights._due == [2]  # it may still be being written
    weights.on_save(4)
    weights.on_run_end(failed=False)
    (message,) = caplog.messages
    assert message.startswith(f"exported {tmp_path / 'hf/iter_0000004'} in ") and weights._in_use == set()


@pytest.mark.parametrize(("flags", "message"), [
    (["--save", "x", "--save-interval", "4", "--save-hf-interval", "6"], "must be a multiple of --save-interval 4"),
    (["--save-hf-interval", "6"], "--save-hf-interval has no effect without --save"),
    (["--save", "x", "--save-hf-interval", "6", "--lora-target-modules", "attention"], "make a whole model with"),
])
def test_flags_that_do_not_fit(flags: list[str], message: str) -> None:
    words = ["--mm-data", str(EXAMPLES / "data_tiny.json"), "--mm-model", str(EXAMPLES / "model_tiny.json"),
             "--seq-length", "8", "--lr", "1", "--train-iters", "9", "--use-torch-fsdp2"]
    with pytest.raises(UserError) as error:
        load_job_config([*words, *flags], world_size=1)
    assert message in str(error.value)
