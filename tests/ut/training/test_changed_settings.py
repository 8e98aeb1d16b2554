"""A run that continues with other settings than those of its checkpoint says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.directory import write_tracker
from mindspeed_mm.config.job import JobConfig, load_job_config
from mindspeed_mm.training.resume_checks import changed_settings_warning
from tests.helpers.checkpoint_directory import commit_directory

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/qwen3vl"
FIRST = ["--seq-length", "128", "--train-iters", "10", "--lr", "1e-3", "--clip-grad", "1.0", "--num-workers", "8",
         "--global-batch-size", "2", "--use-torch-fsdp2"]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    """A job with further flags, and with changes to its data and model file, that continues one without any."""

    def build(*flags: str, data: dict | None = None, model: dict | None = None) -> JobConfig:
        for name, change in (("data", data), ("model", model)):
            content = json.loads((EXAMPLES / f"{name}_tiny.json").read_text())
            for path, value in (change or {}).items():
                *parents, last = path.split(".")
                place = content
                for parent in parents:
                    place = place[parent]
                place[last] = value
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        files = ["--mm-data", str(tmp_path / "data.json"), "--mm-model", str(tmp_path / "model.json"),
                 "--fsdp2-config-path", str(EXAMPLES / "fsdp2_config.yaml")]
        return load_job_config([*files, *FIRST, "--load", str(tmp_path / "save"), *flags])

    with commit_directory(tmp_path / "save/iter_0000005", build().checkpoint_metadata()) as directory:
        (directory / "progress.json").write_text(json.dumps({"iteration": 5, "consumed_samples": 10}))
    write_tracker(tmp_path / "save", 5)
    return build


def warning(job: JobConfig) -> str | None:
    return changed_settings_warning(job, {"template": "qwen3_vl_nothink"})


@pytest.mark.parametrize(
    "flags",
    [[], ["--num-workers", "0"], ["--train-iters", "20"], ["--save", "elsewhere"], ["--log-interval", "7"]],
)
def test_what_changes_nothing_that_is_learned(job: Callable[..., JobConfig], flags: list[str]) -> None:
    assert warning(job(*flags)) is None
    same = {"dataset_param.basic_parameters.cache_dir": "elsewhere", "dataset_param.basic_parameters.template": None,
            "dataloader_param.sampler_type": "stateful_distributed_sampler"}
    assert warning(job(*flags, data=same, model={"text_decoder.num_layers": None})) is None
    other = {"dataset_param.basic_parameters.template": "qwen3_vl", "dataloader_param.shuffle": False}
    line = str(warning(job(*flags, data=other)))
    assert "template in" in line and 'was "qwen3_vl_nothink" and is "qwen3_vl"' in line
    assert "shuffle in" in line and "was true and is false" in line


def test_flags(job: Callable[..., JobConfig], tmp_path: Path) -> None:
    line = warning(job("--clip-grad", "0.5", "--adam-beta2", "0.95", "--seq-length", "64"))
    assert line == (
        f"resuming {tmp_path}/save/iter_0000005 with changed settings: --adam-beta2 was 0.999 and is 0.95; "
        "--clip-grad was 1.0 and is 0.5; --seq-length was 128 and is 64"
    )
    assert "--clip-grad was 1.0" in str(warning(job("--clip-grad", "0")))
    assert "--moment-dtype was fp32 and is int8" in str(warning(job("--moment-dtype", "int8", "--no-load-optim")))


def test_another_schedule_that_was_asked_for(job: Callable[..., JobConfig]) -> None:
    line = warning(job("--train-iters", "20", "--override-opt-param-scheduler"))
    assert line is not None and line.endswith("changed settings: --train-iters was 10 and is 20")


def test_weight_decay_of_parameters(job: Callable[..., JobConfig], tmp_path: Path) -> None:
    line = warning(job(model={"weight_decay_scaling_plan": [{"match": "lm_head", "scale": 0.0}]}))
    assert line is not None and line.endswith(
        f'weight_decay_scaling_plan in {tmp_path}/model.json was [] and is [{{"match": "lm_head", "scale": 0.0}}]'
    )


def test_files(job: Callable[..., JobConfig], tmp_path: Path) -> None:
    changed = job(data={"dataset_param.basic_parameters.mask_history": True},
                  model={"loss_cfg": {"router_aux_loss_coef": 0.5}})
    line = warning(changed)
    assert line is not None and line.endswith(
        f"mask_history in {tmp_path}/data.json was false and is true; "
        f"router_aux_loss_coef in {tmp_path}/model.json was null and is 0.5"
    )


def test_a_new_stage_and_a_converted_checkpoint_have_none(job: Callable[..., JobConfig], tmp_path: Path) -> None:
    assert warning(job("--clip-grad", "0.5", "--finetune")) is None
    with commit_directory(tmp_path / "release", {"flags": {"--clip-grad": 7.0}}):
        pass
    assert warning(job("--clip-grad", "0.5", "--load", str(tmp_path / "release"))) is None


@pytest.mark.parametrize(
    "metadata", [{}, {"flags": 3}, {"flags": {"--clip-grad": None}, "data": [], "model": {"loss_cfg": 1}}]
)
def test_a_manifest_of_another_version(job: Callable[..., JobConfig], tmp_path: Path, metadata: dict) -> None:
    path = tmp_path / "save/iter_0000005/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    warning(job("--clip-grad", "0.5"))


def test_shares_of_a_mixture(tmp_path: Path, job: Callable[..., JobConfig]) -> None:
    dataset = "dataset_param.basic_parameters.dataset"
    mixture = {"a": {"path": "a.json", "repeat": 2.0}, "b": "b.json"}
    assert "resuming" in str(warning(job(data={dataset: mixture})))  # which had no mixture
    with commit_directory(tmp_path / "save/iter_0000006", job(data={dataset: mixture}).checkpoint_metadata()) as place:
        (place / "progress.json").write_text(json.dumps({"iteration": 6, "consumed_samples": 12}))
    write_tracker(tmp_path / "save", 6)
    assert warning(job(data={dataset: mixture | {"b": {"path": "moved.json"}}})) is None
    line = str(warning(job(data={dataset: {"a": {"path": "a.json", "repeat": 1.5}, "c": "c.json"}})))
    assert line.endswith("data set b was left out; repeat of data set a was 2.0 and is 1.5; data set c is new")
