"""The recipe through its own commands: convert, train by the launcher, resume, export; and what it says of mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/qwen3vl"
pytestmark = pytest.mark.st


def run(*words: str | Path, status: int = 0, **environment: str) -> str:
    """Run a command at the repository's root; returns what it printed."""
    result = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
             "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )
    output = result.stdout + result.stderr
    assert result.returncode == status, output
    return output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run directory with the tiny model, converted, and 96 of the digits."""
    place = tmp_path_factory.mktemp("recipe run")  # a space, which paths may have
    run(sys.executable, EXAMPLE / "quickstart/make_tiny_model.py", "--output", place / "ckpt/hf_path/Qwen3-VL-tiny")
    run(
        sys.executable, "-m", "checkpoint.cli", "Qwen3VLConverter", "hf_to_dcp",
        "--hf_dir", place / "ckpt/hf_path/Qwen3-VL-tiny", "--dcp_dir", place / "dcp",
    )
    run(sys.executable, EXAMPLE / "quickstart/make_digits.py", "--output", place / "data")
    records = json.loads((place / "data/digits_train.json").read_text())[:90]
    for index in range(6):  # text-only records, mixed in
        turns = [("human", f"Count to {index + 1}."), ("gpt", " ".join(map(str, range(1, index + 2))))]
        records.insert(
            index * 9, {"id": f"t{index}", "conversations": [{"from": role, "value": text} for role, text in turns]}
        )
    (place / "data/mixed.json").write_text(json.dumps(records))
    run(
        sys.executable, ROOT / "examples/qwen2vl/llava_instruct_2_mllm_demo_format.py", "--input",
        place / "data/mixed.json", "--image-root", place / "data/images",
        "--output", place / "data/mllm_format_digits_train.json",
    )
    run(sys.executable, EXAMPLE / "quickstart/configure.py", "--run-dir", place)
    return place


def train(
    place: Path, save: str, *flags: str, load: str = "dcp", status: int = 0, model: str = "tiny",
    **variables: str | None,
) -> str:
    """Run the tiny model for 6 iterations of 12 samples, by its own launcher or another's, with full checkpoints.

    ``variables``: of the launcher; None for its default.
    """
    environment = {
        "NPUS_PER_NODE": "1", "MBS": "12", "TRAIN_ITERS": "6", "SAVE_INTERVAL": "3", "CKPT_ARGS": "",
        "MM_DATA": str(place / "data_tiny.json"), "MM_MODEL": str(place / "model_tiny.json"),
        "LOAD_PATH": str(place / load), "SAVE_PATH": str(place / save), "MASTER_PORT": free_port(), **variables,
    }
    given = {name: value for name, value in environment.items() if value is not None}
    return run("bash", EXAMPLE / f"finetune_qwen3vl_{model}.sh", *flags, status=status, **given)


def free_port() -> str:
    """A port that nobody listens on now."""
    import socket

    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


def logged(output: str) -> dict[int, str]:
    """Iteration -> its loss as the log line spells it."""
    return {
        int(iteration): loss
        for iteration, loss in re.findall(r"iteration +(\d+)/ +\d+ .*? \| loss: (\S+) ", output)
    }


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    reader = dcp.FileSystemReader(directory)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


@pytest.fixture(scope="module")
def whole_run(place) -> dict[int, str]:
    """Six iterations without interruption."""
    output = train(place, "whole")
    assert "Elapsed Time Per iteration" in output and "Consumed Tokens per Second" in output
    losses = logged(output)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    return losses


def test_resumed_run_is_the_same_run(place, whole_run):
    assert (place / "whole/latest_checkpointed_iteration.txt").read_text() == "6"
    saving = ("--async-save", "--keep-last", "1")  # asynchronously the same is saved as synchronously
    first = logged(train(place, "parts", "--exit-interval", "3", *saving, NUM_WORKERS="2", SAVE_INTERVAL="1"))
    assert sorted(first) == [1, 2, 3]
    output = train(place, "parts", *saving, load="parts", SAVE_INTERVAL="1")
    second = logged(output)
    assert sorted(second) == [4, 5, 6]
    assert output.count("training blocked for") == 3
    assert sorted(path.name for path in (place / "parts").iterdir()) == [
        "iter_0000006", "latest_checkpointed_iteration.txt", "metrics.jsonl", "report.html", "report_data.json",
        "tensorboard", "trackers.json",
    ]
    steps = [json.loads(line)["iteration"] for line in (place / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {**first, **second} == whole_run
    whole, parts = stored(place / "whole/iter_0000006"), stored(place / "parts/iter_0000006")
    assert whole.keys() == parts.keys() and any(name.startswith("optimizer.") for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_launchers_own_checkpoint_flags_load_what_there_is_and_save_weights_only(place, whole_run):
    output = train(place, "small", load="whole/iter_0000003", CKPT_ARGS=None)
    assert logged(output) == {iteration: whole_run[iteration] for iteration in (4, 5, 6)}  # with AdamW's moments
    assert output.count("checkpoints will be saved without optimizer state and RNG states") == 1
    assert "not exact" not in output
    assert {name.partition(".")[0] for name in stored(place / "small/iter_0000006")} == {"model"}


def test_two_processes_with_accumulation_train_the_same(place, whole_run):
    losses = logged(train(place, "two", NPUS_PER_NODE="2", MBS="3", GRAD_ACC_STEP="2"))
    assert losses.keys() == whole_run.keys()
    for iteration, loss in losses.items():
        assert float(loss) == pytest.approx(float(whole_run[iteration]), rel=1e-5)


LAYOUTS = {
    "EP2": {"NPUS_PER_NODE": "2", "MBS": "6", "EP": "2"},
    "CP2": {"NPUS_PER_NODE": "2", "MBS": "12", "CP": "2"},
}


@pytest.mark.parametrize("layout", ["EP2", pytest.param("CP2", marks=pytest.mark.slow)])
def test_checkpoint_of_one_layout_continues_in_another(place, whole_run, layout):
    """Three iterations spread over two processes, three more on one: the losses of the uninterrupted single process."""
    save = f"spread {layout}"
    first = logged(train(place, save, "--exit-interval", "3", **LAYOUTS[layout]))
    second = logged(train(place, save, load=save))
    assert sorted(first) == [1, 2, 3] and sorted(second) == [4, 5, 6]
    for iteration, loss in {**first, **second}.items():
        assert float(loss) == pytest.approx(float(whole_run[iteration]), rel=1e-5), iteration


def test_memory_saving_run_logs_the_same_losses(place, whole_run):
    def change(content):
        content["text_decoder"].update(activation_offload=True, synchronize_per_layer=True)
        content["image_encoder"]["vision_encoder"].update(synchronize_per_layer=True)

    losses = logged(train(
        place, "sparing", "--exit-interval", "2", MM_MODEL=edited(place, "model_tiny.json", change),
        RECOMPUTE_ARGS="--recompute-granularity full --recompute-num-layers 2",
    ))
    assert losses == {iteration: whole_run[iteration] for iteration in (1, 2)}


def test_loss_of_the_model_file_and_balanced_experts(place, whole_run):
    def change(content):
        content.setdefault("loss_cfg", {}).update(loss_type="square_loss", router_aux_loss_coef=0.01)

    output = train(
        place, "balanced", "--exit-interval", "1", MM_MODEL=edited(place, "model_tiny.json", change), LOSS_ARGS="",
    )
    balance = float(re.search(r"router aux loss: (\S+) ", output).group(1))
    assert 0.01 * 0.9 < balance < 0.01 * 8  # 8 experts; an even load gives the number of experts per token
    # the first step of all modes has the same model, and losses near to each other
    assert float(logged(output)[1]) == pytest.approx(float(whole_run[1]), rel=0.05)
    assert logged(output)[1] != whole_run[1]


@pytest.mark.parametrize(
    "variables", [pytest.param({}, id="1 process", marks=pytest.mark.slow), pytest.param(LAYOUTS["EP2"], id="EP2")]
)
def test_weights_straight_from_hugging_face(place, whole_run, variables):
    """Without a converted checkpoint each process reads its own rows of the Hugging Face files."""
    output = train(place, "direct", "--exit-interval", "3", LOAD_PATH="", **variables)
    assert "no --load was given" in output
    losses = logged(output)
    assert sorted(losses) == [1, 2, 3]
    for iteration, loss in losses.items():
        assert float(loss) == pytest.approx(float(whole_run[iteration]), rel=1e-5), iteration


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow) for name in ("8B", "30B", "32B")] + ["235B"]
)
def test_launchers_of_the_large_models_train_the_tiny_one(place, whole_run, model):
    """Their own flags and the FSDP2 file of the recipe, in bf16; but for the sizes of model, batch and machine."""
    variables = {"NPUS_PER_NODE": "2", "NNODES": "1", "MBS": "6", "SEQ_LEN": "256", "LR": "1.0e-3", "NUM_WORKERS": "0"}
    if model == "235B":
        variables["EP"] = "2"
    losses = logged(train(place, f"by {model}", "--exit-interval", "3", model=model, **variables))
    assert sorted(losses) == [1, 2, 3]
    # the same samples and weights; warm-up is counted in the same way, and the first step has a learning rate of 0
    for iteration in (1, 2):
        assert float(losses[iteration]) == pytest.approx(float(whole_run[iteration]), rel=0.01)


def test_export_is_the_trained_model(place, whole_run):
    from safetensors.torch import load_file

    from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
    from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules

    assets, name = place / "assets", "preprocessor_config.json"
    shutil.copytree(place / "ckpt/hf_path/Qwen3-VL-tiny", assets, ignore=shutil.ignore_patterns("*.safetensors"))
    processor = json.loads((assets / name).read_text())
    processor["size"]["longest_edge"] *= 2
    (assets / name).write_text(json.dumps(processor))
    output = run(
        sys.executable, "-m", "checkpoint.cli", "Qwen3VLConverter", "dcp_to_hf", "--load_dir",
        place / "whole/iter_0000006", "--save_dir", place / "export", "--dtype", "keep", "--model_assets_dir", assets,
    )
    # the limits of the training, which the checkpoint records
    limit = processor["size"]["longest_edge"] // 2
    assert f"processor settings are the training's: {name}: size.longest_edge {2 * limit} -> {limit}\n" in output
    assert json.loads((place / "export" / name).read_text())["size"]["longest_edge"] == limit
    exported: dict[str, torch.Tensor] = {}
    for file in (place / "export").glob("*.safetensors"):
        exported.update(load_file(file))
    trained = stored(place / "whole/iter_0000006")
    rules = weight_rules(Qwen3VLConfig.from_pretrained(place / "export"), expert_layout="hub")
    assert len(exported) == sum(len(rule.sources) for rule in rules)
    for rule in rules:
        ours = rule.to_mcore([exported[name] for name, _ in rule.sources])
        assert torch.equal(ours, trained[f"model.{rule.target}"]), rule.target


def test_device_backend_is_said(place, whole_run):
    output = train(place, "one", "--distributed-backend", "mpi", TRAIN_ITERS="1")
    assert "world size 1 on cpu (gloo)" in output
    assert "--distributed-backend mpi: cpu always uses its own collective library, gloo" in output


def edited(place: Path, name: str, change) -> str:
    """A copy of a JSON file of the run with ``change`` applied; its path."""
    content = json.loads((place / name).read_text())
    changed = change(content)
    path = place / f"bad_{name}"
    path.write_text(json.dumps(content if changed is None else changed))
    return str(path)


def data_file(place: Path, content: object) -> str:
    """A data configuration whose data set is ``content``."""
    (place / "data/bad.json").write_text(content if isinstance(content, str) else json.dumps(content))

    def change(config):
        config["dataset_param"]["basic_parameters"]["dataset"] = str(place / "data/bad.json")

    return edited(place, "data_tiny.json", change)


RECORD = {"images": [], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
MISTAKES = {
    "unknown key": (
        lambda place: {"MM_MODEL": edited(place, "model_tiny.json", lambda c: c["text_decoder"].update(freez=True))},
        ["bad_model_tiny.json", "freez", "freeze"],
    ),
    "size": (
        lambda place: {"MM_MODEL": edited(place, "model_tiny.json", lambda c: c["text_decoder"].update(num_layers=7))},
        ["text_decoder.num_layers 7", "contradicts", "config.json"],
    ),
    "degree": (lambda place: {"EP": "3"}, ["expert_model_parallel_size 3", "set it to 1"]),
    "flag value": (lambda place: {"LR": "-1"}, ["--lr", "-1"]),
    "no list": (lambda place: {"MM_DATA": data_file(place, {"a": 1})}, ["bad.json", "list"]),
    "no JSON": (lambda place: {"MM_DATA": data_file(place, "[{")}, ["bad.json", "JSON"]),
    "no column": (
        lambda place: {"MM_DATA": data_file(place, [RECORD, {"images": []}])}, ["bad.json", "messages"],
    ),
    "no image": (
        lambda place: {"MM_DATA": data_file(place, [{
            "images": ["gone.jpg"],
            "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
        }])},
        ["bad.json", "gone.jpg"],
    ),
    "no weights": (lambda place: {"LOAD_PATH": str(place / "nowhere")}, ["nowhere", "step 2"]),
    "tensor parallel": (lambda place: {"TP": "2", "NPUS_PER_NODE": "2"}, ["tensor", "FSDP2"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_before_training(place, mistake):
    variables, words = MISTAKES[mistake]
    output = train(place, "never", status=2, **variables(place))
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output
    for word in words:
        assert word in lines[0]
    assert not (place / "never").exists()


def test_direct_start_says_the_same(place):
    """Without the launcher and its preflight, as ``torchrun pretrain_transformers.py`` would start a process."""
    output = run(sys.executable, ROOT / "pretrain_transformers.py", "--lr", "1e-5", "--train-iters", "0", status=2)
    assert output.startswith("error: --train-iters is 0") and len(output.strip().splitlines()) == 1


def test_missing_weight_shard_stops_the_conversion(place, tmp_path):
    import shutil

    copy = tmp_path / "hf"
    shutil.copytree(place / "ckpt/hf_path/Qwen3-VL-tiny", copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    output = run(
        sys.executable, "-m", "checkpoint.cli", "Qwen3VLConverter", "hf_to_dcp", "--hf_dir", copy,
        "--dcp_dir", tmp_path / "dcp", status=2,
    )
    assert output.startswith("error: ") and "model-00002-of-00002.safetensors" in output
    assert len(output.strip().splitlines()) == 1 and not (tmp_path / "dcp/release").exists()
