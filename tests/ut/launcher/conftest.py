"""A launcher's repository, with a stand-in for torchrun that prints a log and exits as it is told."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.directory import write_tracker
from tests.helpers.checkpoint_directory import commit_directory, parameter_shapes, write_metadata
from tests.helpers.published import DIRECTORIES, published_config

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = "examples/qwen3vl/finetune_qwen3vl_30B.sh"


@pytest.fixture
def workplace(tmp_path):
    """A copy of what the launcher reads, with weights, checkpoint and data in place, in a path with a space."""
    root = tmp_path / "a copy"
    (root / "examples").mkdir(parents=True)
    (root / "mindspeed_mm").symlink_to(ROOT / "mindspeed_mm")
    (root / "examples/qwen3vl").mkdir()
    for source in (ROOT / "examples/qwen3vl").iterdir():
        if source.suffix in (".sh", ".json", ".yaml"):
            (root / "examples/qwen3vl" / source.name).write_bytes(source.read_bytes())
    write_model(root, "30B")
    (root / "data").mkdir()
    (root / "data/photo.jpg").write_bytes(b"")
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}]
    records = [{"images": ["photo.jpg"], "messages": messages}] * 128  # a step of the largest model's
    (root / "data/mllm_format_llava_instruct_data.json").write_text(json.dumps(records))
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    script(bin_directory / "python", f'exec "{sys.executable}" "$@"\n')
    script(
        bin_directory / "torchrun",
        'for word in "$@"; do echo "$word" >>"$TORCHRUN_WORDS"; done\n'
        'env >"$TORCHRUN_WORDS.env"\ncp "$MM_RUN_STATE/terminal" "$TORCHRUN_WORDS.terminal" 2>/dev/null\n'
        '[ -n "$FAKE_LOG" ] && cat "$FAKE_LOG"\n'
        '[ -n "$FAKE_ERROR" ] && echo "$FAKE_ERROR" >"$MM_RUN_STATE/error"\nexit "${FAKE_STATUS:-0}"\n',
    )
    return root


EDGES = {"shortest_edge": 65536, "longest_edge": 16777216}
PROCESSOR = {"size": EDGES, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write_model(root, model):
    """Config, tokenizer and converted checkpoint of a published model, without its weights."""
    directory = root / "ckpt/hf_path" / DIRECTORIES[model]
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_config(directory / "config.json", model)
    converted = root / f"ckpt/dcp_path/{DIRECTORIES[model]}-dcp"
    converted.mkdir(parents=True)
    with commit_directory(converted / "release", {}) as release:
        (release / "__0_0.distcp").write_bytes(b"weights")
        write_metadata(release, parameter_shapes(directory))
    write_tracker(converted, "release")


def write_config(path, model="30B", **text):
    config = published_config(model)
    config["text_config"].update(text)
    path.write_text(json.dumps(config))


def script(path, body):
    path.write_text("#!/bin/bash\n" + body)
    path.chmod(0o755)


def launch(root, *flags, launcher=LAUNCHER, **variables):
    keep = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
    words = root.parent / "words"
    environment = {
        **keep,
        "PATH": f"{root.parent / 'bin'}:/usr/bin:/bin",
        "TORCHRUN_WORDS": str(words),
        **{name: str(value) for name, value in variables.items()},
    }
    result = subprocess.run(
        ["bash", launcher, *flags], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    result.words = words.read_text().splitlines() if words.exists() else []
    return result


def value_of(words, flag):
    """The value that holds: the last one given."""
    return [words[index + 1] for index, word in enumerate(words) if word == flag][-1]


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
