"""Speed and memory of mm-convert against ``cp`` of the same files, on a checkpoint of real widths.

    python benchmarks/convert.py --dir /path/on/the/disk [--layers 6] [--layout hub] [--workers N] [--repeat 3]
        [--json out.json]

Makes a Qwen3-VL checkpoint of the 30B model's widths with fewer layers (6 layers: 9.8 GB in bf16), then times, each in
its own process: cp of its files, hf_to_dcp, cp, verify, cp, dcp_to_hf, cp. Each starts with its input evicted from the
page cache, as a checkpoint of 62 GB would be, and is timed from the start of the process until its output is on disk.
"of cp" is relative to the mean of the copies just before and after, since the speed of a shared disk varies; the table
has medians over the rounds. CPU is user and system time. Peak memory is the process's resident set; more than 1.5 GB
above the largest tensor is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint.huggingface import INDEX, LAYOUT_KEY
from mindspeed_mm.checkpoint.safetensors_io import build_header
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.state_dict_adapter import weight_rules
from mindspeed_mm.models.state_dict import hf_shapes

SHARD_BYTES = 5_000_000_000
MEMORY_LIMIT = 1_500_000_000


def config_30b(layers: int, depth: int = 27) -> dict[str, Any]:
    """``config.json`` of Qwen3-VL-30B-A3B with ``layers`` text layers and ``depth`` vision blocks."""
    deepstack = [index for index in (8, 16, 24) if index < depth][:layers]
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
            "model_type": "qwen3_vl_moe", "depth": depth, "hidden_size": 1152, "num_heads": 16,
            "intermediate_size": 4304, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "in_channels": 3, "num_position_embeddings": 2304, "out_hidden_size": 2048,
            "deepstack_visual_indexes": deepstack,
        },
    }


def make_checkpoint(directory: Path, *, layers: int, layout: str, depth: int = 27) -> None:
    """Write a Hugging Face directory of random bits in shards of 5 GB."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_30b(layers, depth)))
    shapes = hf_shapes(weight_rules(Qwen3VLConfig.from_pretrained(directory), expert_layout=layout))
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, torch.bfloat16, shape))
        size += nbytes
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


def evict(directories: Sequence[Path]) -> None:
    """Evict the files of directories from the page cache."""
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be evicted
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(command: list[str], reads: Sequence[Path]) -> dict[str, float]:
    """Run a command; returns seconds, seconds of CPU and peak resident bytes of its process.

    Args:
        command: to run.
        reads: its input directories.
    """
    evict(reads)
    # Let the disk finish earlier writes and deletions, which would be timed otherwise.
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


def run_round(work: Path, options: list[str]) -> list[dict[str, Any]]:
    """Each step once, between copies; removes all output.

    Args:
        work: directory with the Hugging Face directory ``hf``.
        options: options of every mm-convert command.

    Returns:
        One row for each step, with the mean time of its two copies as ``copy_seconds``.
    """
    hf, copy, dcp, out = work / "hf", work / "copy", work / "dcp", work / "out"
    convert = [sys.executable, "-m", "checkpoint.cli", "Qwen3VLConverter"]
    steps = {
        "hf_to_dcp": (["--hf_dir", str(hf), "--dcp_dir", str(dcp)], [hf]),
        "verify": (["--hf_dir", str(hf), "--dcp_dir", str(dcp)], [hf, dcp]),
        "dcp_to_hf": (["--load_dir", str(dcp), "--save_dir", str(out), "--model_assets_dir", str(hf)], [dcp]),
    }

    def copy_once() -> dict[str, float]:
        measured = measure(["sh", "-c", f"cp -r '{hf}' '{copy}' && sync -f '{copy}'"], [hf])
        shutil.rmtree(copy)
        return measured

    copies = [copy_once()]
    rows = []
    for name, (arguments, reads) in steps.items():
        measured = measure([*convert, name, *arguments, *options], reads)
        copies.append(copy_once())
        rows.append({"step": name, **measured, "copy_seconds": (copies[-2]["seconds"] + copies[-1]["seconds"]) / 2})
    shutil.rmtree(out)
    shutil.rmtree(dcp)
    return rows + [{"step": "cp", **measured, "copy_seconds": measured["seconds"]} for measured in copies]


def report(rows: Sequence[Mapping[str, Any]], size: int) -> None:
    """Print medians by step, with the range of the ratios."""
    print(f"{'step':<10} {'seconds':>8} {'CPU s':>6} {'MB/s':>6} {'of cp':>6} {'(range)':>14} {'peak RSS':>9}")
    for step in ("cp", "hf_to_dcp", "verify", "dcp_to_hf"):
        chosen = [row for row in rows if row["step"] == step]
        seconds, cpu = (statistics.median(row[key] for row in chosen) for key in ("seconds", "cpu"))
        shares = [row["copy_seconds"] / row["seconds"] for row in chosen]
        text = f"{min(shares):.0%} to {max(shares):.0%}" if step != "cp" else ""
        peak = max(row["peak_bytes"] for row in chosen) / 1e9
        print(f"{step:<10} {seconds:>8.1f} {cpu:>6.1f} {size / seconds / 1e6:>6.0f} {statistics.median(shares):>6.0%} "
              f"{text:>14} {peak:>6.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="empty or new directory; 4 x the checkpoint's size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--layout", choices=("hub", "v5"), default="hub", help="expert layout of the source")
    parser.add_argument("--workers", type=int, help="default: mm-convert's default")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hf = options.dir / "hf"
    make_checkpoint(hf, layers=options.layers, layout=options.layout)
    size = sum(path.stat().st_size for path in hf.iterdir())
    model_config = Qwen3VLConfig.from_pretrained(hf)
    shapes = hf_shapes(weight_rules(model_config, expert_layout="hub")).values()
    largest = 2 * max(torch.Size(shape).numel() for shape in shapes)
    workers = ["--workers", str(options.workers)] if options.workers else []
    rows = [row for _ in range(options.repeat) for row in run_round(options.dir, workers)]
    shutil.rmtree(options.dir)

    limit = largest + MEMORY_LIMIT
    print(f"{size / 1e9:.2f} GB in {options.layout} layout, largest tensor {largest / 1e9:.2f} GB, "
          f"memory limit {limit / 1e9:.2f} GB, {os.cpu_count()} cores, {options.repeat} rounds")
    report(rows, size)
    if options.json:
        facts = {"size": size, "largest_tensor": largest, "layout": options.layout, "torch": torch.__version__}
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=2))
    if any(row["peak_bytes"] > limit for row in rows):
        raise SystemExit(f"error: peak memory above {limit / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
