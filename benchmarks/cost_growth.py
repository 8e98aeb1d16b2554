"""Tokens per second and memory against sequence length, image size, experts and layers, one at a time.

    python -m benchmarks.cost_growth [--device cpu] [--axes length image experts layers] [--output cost_growth.json]
        [--size tiny] [--count-only] [--plot cost_growth.png]

Forward and backward of one packed micro-batch, fp32 on a CPU and bf16 elsewhere; medians, on one CPU thread of CPU
time. The table also has the FLOPs by FlopCount, with the shares of attention, the vision tower and the rest. Memory is
the peak above the parameters.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import option_parser, peak_bytes, prepare, seconds_of, write_results
from benchmarks.runners import initialise
from benchmarks.workload import PIXEL_NORM, hf_config
from mindspeed_mm.backend.device import Backend
from mindspeed_mm.data.collator import Sample, collate
from mindspeed_mm.interfaces.media import MediaPatches
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.flops import FlopCount
from mindspeed_mm.models.qwen3_vl.model import build_model
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.models.spec import ModelBuildOptions

LENGTH, SIDE = 1024, 256
MAX_SECONDS = 60.0
UNITS = {
    "length": "tokens of the sequence",
    "image": "side of the image, pixels",
    "experts": "experts",
    "layers": "decoder layers",
}
VALUES = {
    "length": [1024, 2048, 4096, 8192, 16384, 32768],
    "image": [128, 256, 512, 1024],
    "experts": [4, 8, 16, 32, 64],
    "layers": [3, 4, 8, 16],
}


def sample_of(model_config: Qwen3VLConfig, *, length: int, side: int) -> Sample:
    """One conversation with one square image of ``side`` pixels and at least ``length`` tokens."""
    vision, generator = model_config.vision, np.random.default_rng(0)
    edge = side // vision.patch_size
    patches = generator.integers(0, 256, (edge * edge, vision.patch_dim), np.uint8)
    merged = len(patches) // vision.merge_unit
    ids = [
        model_config.vision_start_token_id,
        *[model_config.image_token_id] * merged,
        model_config.vision_end_token_id,
    ]
    words = max(64, length - len(ids))
    start = len(ids) + words // 2
    ids += generator.integers(0, model_config.text.vocab_size - 4, words).tolist()
    image = MediaPatches(patches, (1, edge, edge))
    return Sample(np.array(ids, np.int64), np.arange(len(ids)) >= start, (image,), 0)


def operations(model_config: Qwen3VLConfig, *, tokens: int, patches: int, target_tokens: int) -> dict[str, Any]:
    """FLOPs of one sequence with one image, and the shares of their terms."""
    count = FlopCount(model_config=model_config)
    total = count.of_lengths([tokens], patches=[patches], target_tokens=target_tokens)
    text_only = count.of_lengths([tokens], patches=[], target_tokens=target_tokens)
    # sequences of one token: attention costs next to nothing
    no_attention = count.of_lengths([1] * tokens, patches=[], target_tokens=target_tokens)
    return {
        "teraflop": total,
        "share": {
            "attention": (text_only - no_attention) / total,
            "vision": (total - text_only) / total,
            "rest": no_attention / total,
        },
    }


def point(
    axis: str, value: int, *, size: str, backend: Backend, rounds: int, count_only: bool = False
) -> dict[str, Any]:
    """Time, memory and FLOPs of one size; with ``count_only`` FLOPs alone."""
    text = {"experts": {"num_experts": value}, "layers": {"num_hidden_layers": value}}.get(axis, {})
    model_config = Qwen3VLConfig.from_config(hf_config(size, text=text))
    shape = {"length": LENGTH, "side": SIDE} | {{"image": "side"}.get(axis, axis): value}
    sample = sample_of(model_config, length=shape["length"], side=shape["side"])
    batch = collate([sample], SPEC, model_config)
    tokens, patches = len(sample.input_ids), len(sample.media[0].patches)
    row = {
        "axis": axis,
        "value": value,
        "tokens": tokens,
        "patches": patches,
        **operations(model_config, tokens=tokens, patches=patches, target_tokens=batch.num_target_tokens),
    }
    if count_only:
        return row
    dtype = torch.bfloat16 if backend.is_accelerator else torch.float32
    model = build_model(
        model_config, ModelBuildOptions(), pixel_norm=PIXEL_NORM, device=backend.name, dtype=dtype, compute_dtype=dtype
    ).to(backend.device)
    initialise(model)
    device_batch = batch.to(backend.device)
    weight = torch.full((batch.num_target_tokens,), 1 / batch.num_target_tokens, device=backend.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(device_batch, weight).loss.backward()

    step()
    seconds = [seconds_of(step, backend)]
    # the longest sequences take minutes on a CPU, where timing noise is relatively small
    while len(seconds) < rounds and sum(seconds) < MAX_SECONDS:
        seconds.append(seconds_of(step, backend))
    median = statistics.median(seconds)
    return {
        **row,
        "seconds": median,
        "rounds": len(seconds),
        "tokens_per_second": tokens / median,
        "peak_bytes": peak_bytes(step, backend),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second, memory and shares against each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, axis in enumerate(axes):
        chosen = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in chosen]
        above, below = panels[:, column]
        above.plot(values, [row["tokens_per_second"] for row in chosen], "o-", label="tokens/s")
        memory = above.twinx()
        memory.plot(values, [row["peak_bytes"] / 2**20 for row in chosen], "s--", color="tab:red")
        memory.set_ylabel("peak MiB", color="tab:red")
        above.set_ylabel("tokens/s")
        names = ("rest", "attention", "vision")
        below.stackplot(values, [[100 * row["share"][name] for row in chosen] for name in names], labels=names)
        below.set_xlabel(UNITS[axis])
        below.set_ylabel("% of FLOPs")
        below.legend(loc="lower left")
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values], rotation=45)
        for panel in (above, memory):
            panel.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print a table, write JSON and the plot."""
    parser = option_parser(__doc__, rounds=3)
    parser.add_argument("--size", default="tiny", help="model of benchmarks.workload")
    parser.add_argument("--axes", nargs="+", default=sorted(VALUES), choices=sorted(VALUES))
    parser.add_argument("--longest", type=int, default=32768, help="maximum sequence length")
    parser.add_argument("--count-only", action="store_true", help="FLOPs and shares only, without measurement")
    parser.add_argument("--plot", type=Path, help="PNG file to write; needs matplotlib")
    options = parser.parse_args()
    backend = prepare(options)
    rows = []
    print("| axis | value | tokens/s | peak MiB | GFLOP | attention % | vision % | rest % |\n" + "| --- " * 8 + "|")
    for axis in options.axes:
        for value in VALUES[axis]:
            if axis == "length" and value > options.longest:
                continue
            row = point(
                axis, value, size=options.size, backend=backend, rounds=options.rounds, count_only=options.count_only
            )
            rows.append(row)
            shares = " | ".join(f"{100 * row['share'][name]:.0f}" for name in ("attention", "vision", "rest"))
            measured = (
                "- | -" if options.count_only else (f"{row['tokens_per_second']:.0f} | {row['peak_bytes'] / 2**20:.0f}")
            )
            print(f"| {axis} | {value} | {measured} | {1000 * row['teraflop']:.1f} | {shares} |", flush=True)
            write_results(options, rows)
    if options.plot and not options.count_only:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
