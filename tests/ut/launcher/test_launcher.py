"""The launcher, with a stand-in for torchrun that prints a log and exits as it is told."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.directory import write_tracker
from tests.helpers.checkpoint_directory import commit_directory, parameter_shapes, write_metadata
from tests.helpers.published import DIRECTORIES, published_config
from tests.ut.launcher.conftest import (
    LAUNCHER,
    PROCESSOR,
    ROOT,
    free_port,
    launch,
    script,
    value_of,
    write_config,
    write_model,
)


@pytest.fixture
def taken():
    """A port that someone listens on."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        yield server.getsockname()[1]


def test_defaults_are_the_recipes(workplace):
    result = launch(workplace)
    assert result.returncode == 0, result.stderr
    expected = {
        "--nproc_per_node": "8", "--nnodes": "1", "--node_rank": "0", "--master_addr": "localhost",
        "--micro-batch-size": "1", "--global-batch-size": "8", "--seq-length": "1024",
        "--lr": "1.0e-5", "--train-iters": "10000", "--lr-warmup-fraction": "0.1", "--clip-grad": "0.0",
        "--seed": "42", "--save": "save_dir", "--save-interval": "10000", "--distributed-backend": "nccl",
    }
    assert {flag: value_of(result.words, flag) for flag in expected} == expected
    assert "--no-save-optim" in result.words
    assert len(list((workplace / "logs").glob("train_*.log"))) == 1


@pytest.mark.parametrize(
    ("model", "processes", "nodes", "expert_size", "recompute"),
    [("8B", 8, 1, 1, False), ("32B", 8, 2, 1, True), ("235B", 8, 16, 8, True)],
)
def test_launchers_of_the_other_models(workplace, model, processes, nodes, expert_size, recompute):
    """Their files agree with the published configs and with each other, and pass the checks before torchrun."""
    write_model(workplace, model)
    launcher, port = f"examples/qwen3vl/finetune_qwen3vl_{model}.sh", free_port()
    result = launch(workplace, launcher=launcher, MASTER_PORT=port)
    assert result.returncode == 0, result.stderr
    expected = {
        "--nproc_per_node": str(processes), "--nnodes": str(nodes), "--global-batch-size": str(processes * nodes),
        "--expert-model-parallel-size": str(expert_size), "--load": f"ckpt/dcp_path/{DIRECTORIES[model]}-dcp",
        "--mm-data": f"./examples/qwen3vl/data_{model}.json", "--mm-model": f"./examples/qwen3vl/model_{model}.json",
    }
    assert {flag: value_of(result.words, flag) for flag in expected} == expected
    assert ("--recompute-granularity" in result.words) is recompute
    content = json.loads((workplace / expected["--mm-data"]).read_text())
    assert content["dataset_param"]["preprocess_parameters"]["model_name_or_path"].endswith(DIRECTORIES[model])
    # another model's sizes are noticed, so the files were compared
    write_config(workplace / "ckpt/hf_path" / DIRECTORIES[model] / "config.json", model, num_hidden_layers=40)
    result = launch(workplace, launcher=launcher, MASTER_PORT=port)
    assert result.returncode == 2 and "contradicts text_config.num_hidden_layers 40" in result.stderr


def test_variables_from_the_environment_and_flags_at_the_end(workplace):
    result = launch(
        workplace, "--seed", "7", NPUS_PER_NODE=2, NNODES=2, NODE_RANK=1, MASTER_ADDR="10.0.0.1", MASTER_PORT=7001,
        MBS=2, GRAD_ACC_STEP=3, CKPT_ARGS="", SAVE_PATH="out dir",
    )
    assert result.returncode == 0, result.stderr
    assert value_of(result.words, "--global-batch-size") == "24"
    assert value_of(result.words, "--master_port") == "7001"
    assert value_of(result.words, "--seed") == "7"
    assert value_of(result.words, "--save") == "out dir"
    assert "--no-save-optim" not in result.words


def test_npu_variables_only_where_there_is_an_npu(workplace):
    launch(workplace)
    environment = (workplace.parent / "words.env").read_text()
    assert "TASK_QUEUE_ENABLE" not in environment and "TOKENIZERS_PARALLELISM=false" in environment
    script(workplace.parent / "bin/npu-smi", "exit 0\n")
    (workplace.parent / "set_env.sh").write_text("export FROM_TOOLKIT=yes\n")
    launch(workplace, SET_ENV=workplace.parent / "set_env.sh", TASK_QUEUE_ENABLE=1)
    environment = (workplace.parent / "words.env").read_text()
    assert "TASK_QUEUE_ENABLE=1" in environment
    assert "FROM_TOOLKIT=yes" in environment
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in environment


def _exports(function):
    """Names and values that a function of launch.sh exports unless they are set."""
    body = (ROOT / "examples/qwen3vl/launch.sh").read_text().partition(f"{function}() {{")[2].partition("\n}")[0]
    return dict(re.findall(r"export (\w+)=\$\{\1:?-([^}]*)\}", body))


def test_every_npu_variable_is_set_there_alone_and_yields_to_the_users(workplace):
    names = _exports("setup_npu")
    assert len(names) == 13
    launch(workplace)
    environment = (workplace.parent / "words.env").read_text().splitlines()
    assert not [line for line in environment if line.split("=")[0] in names]
    script(workplace.parent / "bin/npu-smi", "exit 0\n")
    launch(workplace)
    environment = (workplace.parent / "words.env").read_text().splitlines()
    assert {f"{name}={value}" for name, value in names.items()} <= set(environment)
    assert not [line for line in environment if line.startswith("OMP_NUM_THREADS=")]
    mine = dict.fromkeys(names, "7") | {"OMP_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    launch(workplace, **mine)
    environment = (workplace.parent / "words.env").read_text().splitlines()
    assert {f"{name}={value}" for name, value in mine.items()} <= set(environment)


def test_every_variable_is_documented():
    text = (ROOT / "examples/qwen3vl/launch.sh").read_text()
    page = (ROOT / "docs/environment.md").read_text()
    variables = {name for name, again in re.findall(r"(\w+)=\$\{(\w+):?-", text) if name == again}
    variables |= set(re.findall(r'"\$\{(\w+):-', text))
    variables |= {"SET_ENV", "OMP_NUM_THREADS", "MM_DATA", "MM_MODEL", "LOAD_PATH"}
    assert len(variables) > 40
    assert [name for name in sorted(variables) if f"`{name}`" not in page] == []
    for name, value in _exports("setup_npu").items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.split("|")[2].strip().strip("`") == value


def _warnings(result, word: str) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ") and word in line]


def test_a_run_that_will_not_fit_is_warned_of_and_started(workplace):
    assert not _warnings(launch(workplace), "does not fit")  # not known to be an accelerator
    result = launch(workplace, MM_DEVICE_MEMORY_GB=64)
    assert result.returncode == 0 and "--global-batch-size" in result.words
    (line,) = _warnings(result, "does not fit")
    assert "of 64 GiB" in line and "EP=8 (58.9 GiB); --moment-dtype bf16 (48.3 GiB" in line
    assert "NPUS_PER_NODE x NNODES = 16 devices (35.0 GiB" in line
    for offered in ({"EP": 8}, {"NPUS_PER_NODE": 16}):
        assert not _warnings(launch(workplace, MM_DEVICE_MEMORY_GB=64, **offered), "does not fit")
    assert not _warnings(launch(workplace, MM_DEVICE_MEMORY_GB=""), "does not fit")


def test_checkpoints_that_will_not_fit_are_warned_of(workplace):
    result = launch(workplace, SAVE_INTERVAL=1)  # ten thousand of 124 GB each
    (line,) = _warnings(result, "--save save_dir has")
    assert result.returncode == 0 and "a checkpoint of this run takes about 124.3 GB" in line


def test_fields_of_the_model_directory_without_effect_are_listed(workplace):
    config = workplace / "ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct/config.json"
    assert not _warnings(launch(workplace), "no effect")
    write_config(config, rms_norm_epss=1e-3)
    result = launch(workplace)
    (line,) = _warnings(result, "these fields have no effect")
    assert result.returncode == 0 and line.endswith("config.json: these fields have no effect: "
                                                    "text_config.rms_norm_epss (rms_norm_eps?)")


@pytest.mark.parametrize(
    ("missing", "step"),
    [
        ("ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct/config.json", "step 2"),
        ("ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp/release/__0_0.distcp", "is damaged"),
        ("ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp/latest_checkpointed_iteration.txt", "mm-convert"),
        ("data/mllm_format_llava_instruct_data.json", "docs/own_data.md"),
        ("data/photo.jpg", "record 0: image photo.jpg does not exist"),
        ("examples/qwen3vl/data_30B.json", "docs/configuration.md"),
    ],
)
def test_says_in_one_line_which_step_is_missing(workplace, missing, step):
    (workplace / missing).unlink()
    started = time.monotonic()
    result = launch(workplace)
    assert time.monotonic() - started < 5
    assert result.returncode == 2
    assert result.stdout == "" and result.words == []
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert step in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "piece"),
    [
        ("tokenizer.json", {"added_tokens": [{"content": "<|image_pad|>", "id": 151656}]},
         "image_token_id is 151655, but <|image_pad|> is 151656"),
        ("preprocessor_config.json", {**PROCESSOR, "do_normalize": False}, "do_normalize is false"),
        ("config.json", {**published_config("30B"), "quantization_config": {}}, "quantization_config is {}"),
    ],
)
def test_small_files_of_the_checkpoint_are_checked_before_torchrun(workplace, name, content, piece):
    path = workplace / "ckpt/hf_path" / DIRECTORIES["30B"] / name
    path.write_text(json.dumps(content))
    result = launch(workplace)
    assert result.returncode == 2 and not result.words
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert piece in result.stderr and str(path.relative_to(workplace)) in result.stderr


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"profile": {"static_param": {"save_path": "file/x"}}}, "error: --mm-tool: profile.static_param.save_path"),
        ({"memory_profile": {"save_path": "/proc/x"}}, "error: --mm-tool: memory_profile.save_path /proc/x"),
        ({"profile": {"profile_type": "dynamic", "dynamic_param": {"config_path": "file"}}},
         "error: --mm-tool: profile.dynamic_param.config_path file"),
        ({"profile": {"ranks": [9]}}, "warning: --mm-tool: profile records nothing: its ranks are [9], and the run's"),
        ({"profile": {"static_param": {"start_step": 20000, "end_step": 20001}}},
         "warning: --mm-tool: profile records nothing: its start_step is 20000, and the run's last 10000"),
    ],
)
def test_tools_that_cannot_record_are_said_before_torchrun(workplace, section, words):
    (workplace / "file").write_text("")
    ((name, fields),) = section.items()
    (workplace / "tools.json").write_text(json.dumps({name: {"enable": True, **fields}}))
    result = launch(workplace, MM_TOOL="tools.json")
    assert any(line.startswith(words) for line in result.stderr.splitlines()), result.stderr
    assert result.returncode == (2 if words.startswith("error") else 0)


def test_a_cache_that_cannot_be_made_stops_before_torchrun(workplace):
    data = json.loads((workplace / "examples/qwen3vl/data_30B.json").read_text())
    data["dataset_param"]["basic_parameters"]["cache_dir"] = "data/photo.jpg/cache"
    (workplace / "examples/qwen3vl/data_30B.json").write_text(json.dumps(data))
    result = launch(workplace)
    assert result.returncode == 2 and not result.words
    assert re.fullmatch(r"error: cache_dir data/photo.jpg/cache: .*photo.jpg is not a directory; .*\n", result.stderr)


def test_a_processor_and_a_tokenizer_of_another_model_are_said(workplace):
    """In model_name_or_path, where they contradict no other file."""
    weights, other = workplace / "ckpt/hf_path" / DIRECTORIES["30B"], workplace / "other"
    shutil.copytree(weights, other)
    (other / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_mean": [0.48, 0.46, 0.41]}))
    (weights / "tokenizer.json").write_text(json.dumps({"normalizer": {"type": "NFC"}}))
    (other / "tokenizer.json").write_text(json.dumps({"normalizer": None}))
    data = json.loads((workplace / "examples/qwen3vl/data_30B.json").read_text())
    data["dataset_param"]["preprocess_parameters"]["model_name_or_path"] = "other"
    (workplace / "data.json").write_text(json.dumps(data))
    result = launch(workplace, MM_DATA="data.json")
    assert result.returncode == 0, result.stderr
    assert "warning: the tokenizer in other (model_name_or_path) tokenizes differently" in result.stderr
    assert "the image processor in other (model_name_or_path) normalizes pixels with mean [0.48" in result.stderr
    assert "tokenizes" not in (plain := launch(workplace).stderr) and "normalizes" not in plain


def test_what_contradicts_the_weights_stops_before_torchrun(workplace):
    config = workplace / "ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct/config.json"
    write_config(config, num_hidden_layers=47)
    result = launch(workplace)
    assert result.returncode == 2 and result.words == []
    assert "text_decoder.num_layers 48 contradicts text_config.num_hidden_layers 47" in result.stderr
    write_config(config)
    result = launch(workplace, EP=3, NPUS_PER_NODE=3)
    assert "expert_model_parallel_size 3 does not divide num_experts 128" in result.stderr


def test_help(workplace):
    result = launch(workplace, "--help")
    assert result.returncode == 0 and result.words == [] and "--micro-batch-size" in result.stdout


def test_preflight_imports_no_torch():
    script = "import sys\nimport mindspeed_mm.training.preflight\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_without_torchrun_it_names_the_installer(workplace):
    (workplace.parent / "bin/torchrun").unlink()
    result = launch(workplace)
    assert result.returncode == 2 and "scripts/install.sh" in result.stderr and result.stderr.count("\n") == 1


def test_started_elsewhere_it_names_the_root(workplace, tmp_path):
    result = subprocess.run(
        ["bash", str(workplace / LAUNCHER)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and f"cd {workplace}" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NPUS_PER_NODE", "0", "NPUS_PER_NODE is '0'"), ("MBS", "two", "MBS is 'two'"),
        ("TP", "2", "--tensor-model-parallel-size 2 is not supported"),
        ("CP", "3", "context_parallel_size 3 does not divide the number of ranks 8; choose one of 1, 2, 4, 8"),
        ("CP", "16", "context_parallel_size 16 does not divide the number of ranks 8; choose one of 1, 2, 4, 8"),
        ("NNODES", "$(touch /)", "NNODES is '$(touch /)'"),
        ("NPUS_PER_NODE", "9" * 20, "it must be a whole number from 1 to 999999"),
        ("NODE_RANK", "1", "NODE_RANK is '1'; it must be a whole number from 0 to 0 with NNODES=1"),
        ("MASTER_PORT", "99999", "MASTER_PORT is '99999'; it must be a whole number from 1 to 65535"),
        ("MASTER_ADDR", "no such host", "MASTER_ADDR 'no such host' has no address"),
        ("MM_DEVICE_MEMORY_GB", "nan", "MM_DEVICE_MEMORY_GB is 'nan'; it must be a number of GiB above 0, or empty"),
        ("NUMBA_NUM_THREADS", "x", "NUMBA_NUM_THREADS is 'x'; it must be a whole number from 1 to 999999"),
        ("OMP_NUM_THREADS", "x", "OMP_NUM_THREADS is 'x'; it must be a whole number of at least 1, or unset"),
        ("NPUS_PER_NODE", "9999", "9999 ranks on this machine "),
        ("MBS", "17", "the data set has 128 samples, fewer than the 136 of a step (--global-batch-size); lower it, or"),
    ],
)
def test_bad_variables(workplace, name, value, message):
    result = launch(workplace, **{name: value})
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert result.words == [] and result.stdout == ""


def test_one_machine_takes_a_free_port_and_a_chosen_one_must_be_free(workplace, taken):
    result = launch(workplace)
    assert result.returncode == 0, result.stderr
    assert 0 < int(value_of(result.words, "--master_port")) < 65536
    result = launch(workplace, MASTER_PORT=taken, NNODES=2, NODE_RANK=1)  # the port is another machine's
    assert result.returncode == 0 and value_of(result.words, "--master_port") == str(taken)
    for nodes in (1, 2):
        result = launch(workplace, MASTER_PORT=taken, NNODES=nodes)
        assert result.returncode == 2
        assert result.stderr == f"error: port {taken} is in use on this machine; set MASTER_PORT to another\n"


@pytest.mark.parametrize(("rank", "awaited"), [(0, "the other machines (1 of NNODES=2)"), (1, "with NODE_RANK=0 at ")])
def test_says_whom_torchrun_waits_for(workplace, rank, awaited):
    launcher = workplace / "examples/qwen3vl/launch.sh"
    launcher.write_text(launcher.read_text().replace("read -r -t 10", "read -r -t 1"))
    fake = workplace.parent / "bin/torchrun"
    wait = "import subprocess, time; time.sleep(2.5); subprocess.run(['sleep', '3'])"  # for the others; for its ranks
    script(fake, f'exec "{sys.executable}" -c "{wait}"\n')
    result = launch(workplace, NNODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    lines = [line for line in result.stderr.splitlines() if line.startswith("waiting for ")]
    assert result.returncode == 0, result.stderr
    assert 1 <= len(lines) <= 4 and awaited in lines[0] and "127.0.0.1:" in lines[0] and "gives up at" in lines[0]
    assert "MASTER_ADDR=127.0.0.1 is this machine" in lines[0]
    assert len(lines) <= 2 or not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists()
    script(fake, "exec sleep 1.5\n")
    assert "waiting for" not in launch(workplace).stderr  # one machine


def test_help_of_the_test_script_installs_nothing(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "environment.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    script(tmp_path / "scripts/install.sh", f"touch '{tmp_path}/installed'\nexit 1\n")
    for flags in (["--help"], ["--stack", "npu", "-h"], ["tests/ut", "--help"]):
        result = subprocess.run(
            ["bash", "scripts/test.sh", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0 and result.stdout.startswith("usage: bash scripts/test.sh"), result.stderr
    assert not (tmp_path / "installed").exists()


def test_the_example_files_are_what_the_models_expect():
    from mindspeed_mm.config.job import load_job_config

    examples = ROOT / "examples/qwen3vl"
    job = load_job_config(
        ["--mm-data", str(examples / "data_30B.json"), "--mm-model", str(examples / "model_30B.json"),
         "--mm-tool", str(ROOT / "mindspeed_mm/tools/tools.json"),
         "--fsdp2-config-path", str(examples / "fsdp2_config.yaml"),
         "--seq-length", "1024", "--train-iters", "10000", "--lr", "1e-5", "--lr-warmup-fraction", "0.1",
         "--use-torch-fsdp2"],
        world_size=8,
    )
    assert job.args.warmup_samples == 8000.0
    assert job.describe_ignored() == []
    assert not job.tools.profile.enable and not job.tools.memory_profile.enable
    assert json.loads((examples / "model_30B.json").read_text())["text_decoder"]["num_layers"] == 48


@pytest.mark.parametrize(
    ("size", "kind", "layers", "processes"),
    [("8B", "qwen3_vl", 36, 8), ("32B", "qwen3_vl", 64, 16), ("30B", "qwen3_vl_moe", 48, 8),
     ("235B", "qwen3_vl_moe", 94, 128)],
)
def test_each_size_has_files_and_a_launcher_that_shares_the_body(workplace, size, kind, layers, processes):
    """The launcher gets as far as the weights that are not there, with flags and files that load and fit together.

    The data files leave out what is the default, and are equal to data_30B.json but for the path of the weights.
    """
    from mindspeed_mm.config.data_config import DataConfig
    from mindspeed_mm.config.files import load_config
    from mindspeed_mm.config.job import load_job_config

    examples = ROOT / "examples/qwen3vl"
    launcher = examples / f"finetune_qwen3vl_{size}.sh"
    last = launcher.read_text().strip().splitlines()[-1]
    assert last == 'source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"'
    model = json.loads((examples / f"model_{size}.json").read_text())
    name = Path(model["init_from_hf_path"]).name
    assert f"ckpt/dcp_path/{name}-dcp" in launcher.read_text() and size in name
    assert (model["model_id"], model["text_decoder"]["num_layers"]) == (kind, layers)
    data, data_30b = (
        load_config(examples / f"data_{of}.json", DataConfig, flag="--mm-data").model_dump() for of in (size, "30B")
    )
    path = data_30b["dataset_param"]["preprocess_parameters"]
    path["model_name_or_path"] = path["model_name_or_path"].replace("Qwen3-VL-30B-A3B-Instruct", name)
    assert data == data_30b
    files = ["--mm-data", str(examples / f"data_{size}.json"), "--mm-model", str(examples / f"model_{size}.json")]
    flags = ["--seq-length", "1024", "--train-iters", "1", "--lr", "1e-5", "--use-torch-fsdp2"]
    load_job_config([*files, *flags], world_size=processes)
    if size != "30B":
        launcher = f"examples/qwen3vl/finetune_qwen3vl_{size}.sh"
        result = launch(workplace, launcher=launcher, MASTER_PORT=free_port())
        assert result.returncode == 2 and f"ckpt/hf_path/{name}" in result.stderr and "step 2" in result.stderr


def test_loss_and_recompute_words_by_default(workplace):
    words = launch(workplace).words
    assert "--calculate-per-token-loss" in words and "--recompute-granularity" not in words


def test_words_may_stand_on_several_lines(workplace):
    """As the values of a YAML block do."""
    recompute = "--recompute-granularity\n full\n"
    words = launch(workplace, LOSS_ARGS="\n", RECOMPUTE_ARGS=recompute, CKPT_ARGS="--async-save").words
    assert value_of(words, "--recompute-granularity") == "full" and "--async-save" in words


def test_loss_and_recompute_words_from_the_environment(workplace):
    words = launch(
        workplace, LOSS_ARGS="", RECOMPUTE_ARGS="--recompute-granularity full --recompute-num-layers 2"
    ).words
    assert "--calculate-per-token-loss" not in words
    assert value_of(words, "--recompute-granularity") == "full" and value_of(words, "--recompute-num-layers") == "2"


@pytest.mark.parametrize(
    ("flags", "variables", "piece"),
    [
        ([], {}, None),
        ([], {"LR": "2e-5"}, "--lr 1e-05 became 2e-05"),
        ([], {"TRAIN_ITERS": "5"}, "has done iteration 5, and --train-iters is 5; raise it and add --override-opt"),
        (["--finetune"], {"LR": "2e-5", "SAVE_PATH": "stage_2"}, None),
        (["--finetune"], {"LR": "2e-5"}, "its checkpoints would replace those of the first in --save save_dir"),
        ([], {"GRAD_ACC_STEP": "2"}, "the global batch size was 8 samples in save_dir and is 16"),
        (["--override-opt-param-scheduler"], {"LR": "2e-5"}, None),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_is_refused_before_torchrun(workplace, flags, variables, piece):
    schedule = {
        "max_lr": 1e-5, "min_lr": 0.0, "num_steps": 40, "lr_scales": {}, "lr_warmup_steps": 8000.0,
        "lr_decay_steps": 80000, "wd_incr_steps": 80000,
    }
    with commit_directory(workplace / "save_dir/iter_0000005", {}) as directory:
        progress = {"iteration": 5, "consumed_samples": 40, "schedule": schedule}
        (directory / "progress.json").write_text(json.dumps(progress))
        write_metadata(directory, parameter_shapes(workplace / "ckpt/hf_path" / DIRECTORIES["30B"]))
    write_tracker(workplace / "save_dir", 5)
    result = launch(workplace, *flags, LOAD_PATH="save_dir", **variables)
    if piece is None:
        assert result.returncode == 0 and result.words, result.stderr
    else:
        assert result.returncode == 2 and not result.words and piece in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "variables", [{"SHELLOPTS": "errexit"}, {"SHELLOPTS": "nounset"}, {"POSIXLY_CORRECT": "1"}, {"CDPATH": "."}]
)
def test_options_of_the_calling_shell_change_nothing(workplace, variables):
    result = launch(workplace, **variables)
    assert result.returncode == 0 and result.words, result.stderr
    assert all(line.startswith(("warning: ", "log: logs/train_")) for line in result.stderr.splitlines())
