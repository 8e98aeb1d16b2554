"""Speed and memory of mm-convert against ``cp`` of the same files, on a checkpoint of real widths.

    python benchmarks/convert.py --dir /path/on/the/disk [--layers 6] [--layout hub] [--workers N] [--json out.json]

Makes a Qwen3-VL checkpoint of the 30B model's widths with fewer layers (6 layers: 9.8 GB in bf16), then times, each in
its own process: cp of its files, hf_to_dcp, verify, dcp_to_hf. All are timed until their files are on the disk, with
the start of the process. "of cp" is against the mean of three copies, since a shared disk is seldom steady; CPU is user
and system time. Peak memory is the process's resident set; the limit that it is held against is 1.5 GB above the
largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.models.geometry import Qwen3VLGeometry
from mindspeed_mm.models.weight_map import hf_shapes, weight_map
from mindspeed_mm.training.checkpoint.hf_source import INDEX, LAYOUT_KEY
from mindspeed_mm.training.checkpoint.safetensors_io import build_header

SHARD_BYTES = 5_000_000_000
MEMORY_LIMIT = 1_500_000_000


def config_30b(layers: int) -> dict[str, Any]:
    """``config.json`` of Qwen3-VL-30B-A3B with another number of text layers."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "dtype": "bfloat16",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "num_hidden_layers": layers, "hidden_size": 2048,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
            "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe", "depth": 27, "hidden_size": 1152, "num_heads": 16,
            "intermediate_size": 4304, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "in_channels": 3, "num_position_embeddings": 2304, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    }


def make_checkpoint(directory: Path, *, layers: int, layout: str) -> None:
    """Write a Hugging Face directory of random bits in shards of 5 GB."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_30b(layers)))
    shapes = hf_shapes(weight_map(Qwen3VLGeometry.from_pretrained(directory), expert_layout=layout))
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if held and held + nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((name, torch.bfloat16, shape))
        held += nbytes
    noise = memoryview(os.urandom(64 << 20))
    weight_of = {}
    for number, entries in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_of |= {name: file for name, _, _ in entries}
        with (directory / file).open("wb", buffering=0) as out:
            out.write(build_header(entries, {"format": "pt", LAYOUT_KEY: layout}))
            left = sum(2 * torch.Size(shape).numel() for _, _, shape in entries)
            while left:
                left -= out.write(noise[: min(left, len(noise))])
            os.fsync(out.fileno())
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_of}))


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; returns seconds, seconds of CPU and peak resident bytes of its process."""
    # A disk that is still busy with what came before, or with giving back removed files, would be counted.
    os.sync()
    time.sleep(3)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="empty or new directory; 4 x the checkpoint's size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--layout", choices=("hub", "v5"), default="hub", help="expert layout of the source")
    parser.add_argument("--workers", type=int, help="default: mm-convert's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = options.dir
    hf, copy, dcp, out = work / "hf", work / "copy", work / "dcp", work / "out"
    make_checkpoint(hf, layers=options.layers, layout=options.layout)
    size = sum(path.stat().st_size for path in hf.iterdir())
    geometry = Qwen3VLGeometry.from_pretrained(hf)
    largest = 2 * max(torch.Size(s).numel() for s in hf_shapes(weight_map(geometry, expert_layout="hub")).values())

    convert = [sys.executable, "-m", "checkpoint.cli", "Qwen3VLConverter"]
    workers = ["--workers", str(options.workers)] if options.workers else []
    copying = ["sh", "-c", f"cp -r '{hf}' '{copy}' && sync -f '{copy}'"]
    rows: list[dict[str, Any]] = []

    def record(name: str, command: list[str]) -> None:
        measured = measure(command)
        rows.append({"step": name, "bytes_per_second": size / measured["seconds"], **measured})

    record("cp", copying)
    shutil.rmtree(copy)
    record("hf_to_dcp", [*convert, "hf_to_dcp", "--hf_dir", str(hf), "--dcp_dir", str(dcp), *workers])
    record("cp", copying)
    shutil.rmtree(copy)
    record("verify", [*convert, "verify", "--hf_dir", str(hf), "--dcp_dir", str(dcp), *workers])
    assets = ["--model_assets_dir", str(hf)]
    record("dcp_to_hf", [*convert, "dcp_to_hf", "--load_dir", str(dcp), "--save_dir", str(out), *assets, *workers])
    shutil.rmtree(out)
    record("cp", copying)
    shutil.rmtree(work)

    copies = [row["seconds"] for row in rows if row["step"] == "cp"]
    reference = size * len(copies) / sum(copies)
    print(f"{size / 1e9:.2f} GB in {options.layout} layout, largest tensor {largest / 1e9:.2f} GB, "
          f"memory limit {(largest + MEMORY_LIMIT) / 1e9:.2f} GB, {os.cpu_count()} cores")
    print(f"{'step':<10} {'seconds':>8} {'CPU s':>6} {'MB/s':>7} {'of cp':>6} {'peak RSS':>9}")
    for row in rows:
        speed, share = row["bytes_per_second"] / 1e6, row["bytes_per_second"] / reference
        print(f"{row['step']:<10} {row['seconds']:>8.1f} {row['cpu']:>6.1f} {speed:>7.0f} {share:>6.0%} "
              f"{row['peak_bytes'] / 1e9:>6.2f} GB")
    if options.json:
        facts = {"size": size, "largest_tensor": largest, "layout": options.layout, "torch": torch.__version__}
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
