"""Exports beside the training: what fails is said, what would keep a stopped run is left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mindspeed_mm.checkpoint.adapter_commands import merge_lora
from mindspeed_mm.checkpoint.check_hf import check_hf
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.directory import MODEL_CONFIG_KEY
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.config.job import load_job_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.callbacks import hf_weights
from mindspeed_mm.training.callbacks.hf_weights import HFWeights
from tests.helpers.checkpoint_directory import commit_directory
from tests.ut.checkpoint.tiny_adapters import TinyAdapters, options

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/qwen3vl"
sys.path.insert(0, str(EXAMPLES / "quickstart"))
import make_tiny_model  # noqa: E402 - a script, found only through the path above


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory that has all the files of a published one."""
    path = tmp_path_factory.mktemp("Tiny-1A1B") / "model"
    make_tiny_model.write_model(path, ["a text"])
    return path


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save directory with a checkpoint of iteration 4 in fp32, with optimizer state, as training writes it."""
    root = tmp_path_factory.mktemp("trained")
    hf_to_dcp(model, root / "dcp", dtype="fp32")
    reader = CheckpointReader(root / "dcp" / "release")
    state = {name: reader.read(name) * 1.001 for name in reader.tensors}
    state |= {f"optimizer.{name}.exp_avg": torch.ones_like(tensor) for name, tensor in list(state.items())}
    config = json.loads((root / "dcp/release/manifest.json").read_text())["metadata"].get(MODEL_CONFIG_KEY)
    facts = {"iteration": 4} | ({MODEL_CONFIG_KEY: config} if config else {})
    with warnings.catch_warnings(), commit_directory(root / "save" / "iter_0000004", facts) as partial:
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    return root / "save"


@pytest.fixture
def callback(model: Path) -> Callable[..., HFWeights]:
    def make(
        root: Path, *, assets: Path = model, interval: int | None = 2, dtype: str = "auto", **run: object
    ) -> HFWeights:
        """Of a run that has saved iteration 4, and whose ``--save-hf-interval`` is 2."""
        checkpoint = root / "iter_0000004"
        if not checkpoint.exists():
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
        weights = HFWeights(root, str(assets), interval=interval, in_use=set(), dtype=dtype)
        weights.on_run_start(SimpleNamespace(**{
            "args": SimpleNamespace(train_iters=9, keep_last=None, keep_best=0), "stopped": False, "stopping": False,
            "error": None,
            "context": SimpleNamespace(layout=SimpleNamespace(is_main=True), stop_requested=lambda: False), **run,
        }))
        return weights

    return make


Make = Callable[..., HFWeights]


def slow_export(monkeypatch: pytest.MonkeyPatch, seconds: int = 60) -> list[subprocess.Popen]:
    started = []

    def start(iteration: int, source: Path, target: Path, *_: object) -> hf_weights._Export:
        process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
        started.append(process)
        return hf_weights._Export(iteration, target, process, tempfile.TemporaryFile())

    monkeypatch.setattr(hf_weights._Export, "start", staticmethod(start))
    return started


def test_an_export_that_fails_is_warned_of(callback: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = callback(tmp_path)
    weights.on_save(3)  # no multiple of the interval
    weights.on_save(4)
    assert weights._due == [4] and weights._in_use == {4}
    weights.on_run_end(failed=False)
    (message,) = caplog.messages
    assert message.startswith("iteration 4 was not exported: error: ") and "has format None" in message
    assert message.endswith("; the checkpoint is complete, mm-convert (dcp_to_hf, with LoRA merge_lora) exports it")
    assert weights._in_use == {4} and not list((tmp_path / "hf").glob("*"))  # it can be exported by hand


@pytest.mark.parametrize("how", ["failed", "stopped", "asked"])
def test_a_run_that_must_end_leaves_its_exports(
    callback: Make, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        "mm-convert (dcp_to_hf, with LoRA merge_lora) exports it"
    ]
    assert started[0].returncode  # it was ended


def test_exports_that_are_slower_than_saves_are_left_out(
    callback: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    callback: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def exported(weights: HFWeights, target: Path) -> Path:
    """Export iteration 4; meanwhile the target is not there, or complete."""
    weights.on_save(4)
    weights.on_step_queued(5)
    process = weights._export.process
    while process.poll() is None:
        assert not target.exists() or check_hf(target).ready
        time.sleep(0.02)
    weights.on_run_end(failed=False)
    assert process.returncode == 0 and [path.name for path in target.parent.iterdir()] == [target.name]
    return target


@pytest.mark.parametrize(("dtype", "stored"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_an_export_is_what_mm_convert_writes(
    callback: Make, model: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str,
    stored: torch.dtype,
) -> None:
    root = tmp_path / "save"
    shutil.copytree(trained, root)
    target = exported(callback(root, dtype=dtype), root / "hf" / "iter_0000004")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert check_hf(target, checksums=True).ready
    converted = dcp_to_hf(root / "iter_0000004", tmp_path / "converted", model, dtype=dtype)
    names = {path.name for path in converted.iterdir()}
    assert names == {path.name for path in target.iterdir()} and "model.safetensors" in names
    for name in names - {"manifest.json"}:
        assert (target / name).read_bytes() == (converted / name).read_bytes(), name
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {stored}
    assert str(stored).removeprefix("torch.") in (target / "config.json").read_text()


def test_adapters_are_merged(
    callback: Make, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = TinyAdapters(json.loads((model / "config.json").read_text()), options(targets=("attention",)))
    checkpoint = adapters.save(tmp_path / "lora", model)
    root = tmp_path / "save"
    shutil.copytree(checkpoint, root / "iter_0000004")
    target = exported(callback(root), root / "hf" / "iter_0000004")
    merged = merge_lora(model, checkpoint, tmp_path / "merged")
    assert (target / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    before = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(target / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {adapter.source[0] for adapter in adapters.adapters} and check_hf(target).ready


@pytest.mark.parametrize(("run", "due"), [
    ({}, [9]), ({"stopping": True}, [4, 9]), ({"stopping": True, "stopped": True}, [9]),
    ({"stopping": True, "error": UserError("NaN")}, [9]),
])
def test_the_last_step_alone_can_be_exported(
    callback: Make, tmp_path: Path, run: dict[str, object], due: list[int]
) -> None:
    """The last step is that of --train-iters, or an earlier one at which the run ends in good order."""
    weights = callback(tmp_path, interval=None, **run)
    for iteration in (4, 9):
        weights.on_save(iteration)
    assert weights._due == due


def test_what_the_exports_will_lack_is_named_at_the_start_and_once(
    callback: Make, model: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assets, root = tmp_path / "assets", tmp_path / "save"
    shutil.copytree(model, assets)
    shutil.copytree(trained, root)
    for name in ("chat_template.json", "generation_config.json"):
        (assets / name).unlink()
    weights = callback(root, assets=assets)
    (message,) = caplog.messages
    assert message.startswith(f"{assets} is incomplete, and so is {root / 'hf'}: ")
    assert "chat template (transformers 4.57" in message and "generation settings" in message
    caplog.clear()
    weights.on_save(4)
    weights.on_run_end(failed=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert check_hf(root / "hf/iter_0000004", consumers=["vllm", "sglang"]).ready


@pytest.mark.parametrize(("flags", "message"), [
    (["--save", "x", "--save-interval", "4", "--save-hf-interval", "6"], "must be a multiple of --save-interval 4"),
    (["--save-hf-interval", "6"], "--save-hf-interval has no effect without --save"),
    (["--save-hf-at-end"], "--save-hf-at-end has no effect without --save"),
    (["--save", "x", "--save-hf-interval", "6", "--save-hf-at-end"], "exports the last step too; leave"),
    (["--save", "x", "--save-hf-dtype", "bf16"], "--save-hf-dtype bf16 has no effect without an export"),
])
def test_flags_that_do_not_fit(flags: list[str], message: str) -> None:
    words = ["--mm-data", str(EXAMPLES / "data_tiny.json"), "--mm-model", str(EXAMPLES / "model_tiny.json"),
             "--seq-length", "8", "--lr", "1", "--train-iters", "9", "--use-torch-fsdp2"]
    with pytest.raises(UserError) as error:
        load_job_config([*words, *flags], world_size=1)
    assert message in str(error.value)
