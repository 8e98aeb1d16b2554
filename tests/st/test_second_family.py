"""A family that the package does not know goes through data, training, resume, export and the memory estimate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.tiny_text.config import CONFIG
from tests.helpers.tiny_recipe import recipe_flags
from tests.helpers.tiny_tokenizer import write_tiny_tokenizer
from tests.st.test_recipe import stored

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests/drivers/second_family.py"
LAYERS, WIDTH, HEADS, GROUPS, DIM, INNER, VOCABULARY = (
    CONFIG[name] for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "n_vocab")
)
pytestmark = pytest.mark.st


def run(*words: object, ranks: int = 0) -> str:
    """Run the driver, under torchrun if ``ranks`` is given; returns what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    result = subprocess.run(
        [sys.executable, *launcher, str(DRIVER), *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def tensors() -> dict[str, torch.Tensor]:
    """Weights under the family's own names."""
    shapes = {"wte.weight": (VOCABULARY, WIDTH), "unembed": (VOCABULARY, WIDTH)}
    for index in range(LAYERS):
        shapes[f"blocks.{index}.attn.vkq"] = ((HEADS + 2 * GROUPS) * DIM, WIDTH)
        shapes[f"blocks.{index}.attn.out"] = (WIDTH, HEADS * DIM)
        shapes[f"blocks.{index}.mlp.up_gate"] = (2 * INNER, WIDTH)
        shapes[f"blocks.{index}.mlp.down"] = (WIDTH, INNER)
    generator = torch.Generator().manual_seed(0)
    found = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = ["ln.scale", *(f"blocks.{index}.ln{number}.scale" for index in range(LAYERS) for number in (1, 2))]
    return {**found, **{name: torch.ones(WIDTH) for name in norms}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A Hugging Face directory of the family, conversations without images, and the three files."""
    place = tmp_path_factory.mktemp("second family")
    checkpoint = place / "checkpoint"
    checkpoint.mkdir()
    write_tiny_tokenizer(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), checkpoint / "model.safetensors", metadata={"format": "pt"})
    records = [
        {"messages": [{"role": "user", "content": f"What is number {index}?" * (1 + index % 3)},
                      {"role": "assistant", "content": f"The digit is {index}."}]}
        for index in range(20)
    ]  # fmt: skip
    (place / "data.json").write_text(json.dumps(records))
    data = {
        "dataset_param": {
            "preprocess_parameters": {"model_name_or_path": str(checkpoint)},
            "basic_parameters": {
                "dataset_dir": str(place), "dataset": str(place / "data.json"), "cache_dir": str(place / "cache"),
                "packing": True,
            },
            "attr": {"images": None, "messages": "messages"},
        },
        "dataloader_param": {"pin_memory": False, "shuffle": True},
    }  # fmt: skip
    (place / "data_tiny.json").write_text(json.dumps(data))
    model = {"model_id": "tiny_text", "init_from_hf_path": str(checkpoint), "text_decoder": {"num_layers": LAYERS}}
    (place / "model_tiny.json").write_text(json.dumps(model))
    (place / "fsdp2.yaml").write_text("param_dtype: bf16\nalign_fsdp_param_groups: true\n")
    return place


def flags(place: Path, **changes: object) -> list[str]:
    """Four steps of four samples, packed."""
    return recipe_flags(
        place, train_iters=4, lr_warmup_iters=1, save_interval=2, seq_length=96, micro_batch_size=1, **changes
    )


def test_weights_are_converted_both_ways(place):
    run("convert", place / "checkpoint", place / "dcp")
    found = stored(place / "dcp/release")
    value, key, query = tensors()["blocks.0.attn.vkq"].split([GROUPS * DIM, GROUPS * DIM, HEADS * DIM])
    fused = found["model.decoder.layers.0.self_attention.linear_qkv.weight"].view(GROUPS, -1, WIDTH)
    assert torch.equal(fused[1, -2 * DIM :], torch.cat([key[DIM:], value[DIM:]]))
    assert torch.equal(fused[0, : HEADS // GROUPS * DIM], query[: HEADS // GROUPS * DIM])
    run("export", place / "dcp", place / "same", place / "checkpoint")
    exported, expected = load_file(place / "same/model.safetensors"), tensors()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_training_resumes_bitwise_and_is_exported(place):
    output = run("train", *flags(place, save=place / "whole"), ranks=2)
    assert "iteration        4/       4" in output, output
    # the last two steps again, from the checkpoint of the second
    shutil.copytree(place / "whole/iter_0000002", place / "half/iter_0000002")
    (place / "half/latest_checkpointed_iteration.txt").write_text("2")
    run("train", *flags(place, save=place / "resumed", load=place / "half"), ranks=2)
    whole, resumed = (stored(place / name / "iter_0000004") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    weights, before = whole["model.decoder.output_layer.weight"], tensors()["unembed"]
    assert not torch.equal(weights, before) and (weights - before).abs().max() < 0.1
    run("export", place / "whole/iter_0000004", place / "export", place / "checkpoint")
    exported = load_file(place / "export/model.safetensors")
    assert exported.keys() == tensors().keys()
    assert torch.equal(exported["unembed"], weights)
    gate, up = whole["model.decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
    assert torch.equal(exported["blocks.1.mlp.up_gate"], torch.cat([up, gate]))


def test_memory_is_estimated(place):
    words = ["--nproc", 2, "--mm-model", place / "model_tiny.json", "--seq-length", 96, "--json"]
    report = json.loads(run("memory", *words))
    # the largest shards, with rows padded to an even number
    assert report["parameters"] == 4 * sum(-(-len(tensor) // 2) * tensor[0].numel() for tensor in tensors().values())
    assert report["peak"]["vision"] == 0 and report["peak"]["total"] > report["parameters"] + report["optimizer"]
