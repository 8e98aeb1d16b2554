"""Memory and communication of the 30B recipe on 8 and 16 devices of 64 GiB, as Markdown: docs/memory_estimate.md.

python benchmarks/memory_tables.py --hf-config ckpt/hf_path/Qwen3-VL-30B-A3B-Instruct [--lora]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import LoraOptions
from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from mindspeed_mm.tools.memory.communication import volumes
from mindspeed_mm.tools.memory.estimate import estimate
from mindspeed_mm.tools.memory.report import GIB, RESERVE_GB, Device

VISION = ("vision_encoder", "vision_projector")
LONG = {"tokens": 8192, "patches": 8192, "target_tokens": 6144}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "EP 8": {"expert_size": 8},
    "EP 8, full recompute": {"expert_size": 8, "recompute_granularity": "full"},
    "offload_to_cpu": {"offload_to_cpu": True},
    "8192 tokens": LONG,
    "8192 tokens, full recompute": {**LONG, "recompute_granularity": "full"},
    "8192 tokens, full recompute, EP 8, chunked loss": {
        **LONG, "recompute_granularity": "full", "expert_size": 8, "loss_chunk_size": 1024,
    },
    "vision trains too": {"frozen": ()},
    "only the projector trains": {"frozen": ("vision_encoder", "text_decoder")},
    "accumulation over 4 micro-batches, EP 8": {"micro_batches": 4, "expert_size": 8},
}  # fmt: skip


def rows(model_config: Qwen3VLConfig, device: Device) -> list[dict[str, Any]]:
    """One row per number of devices and configuration, in bytes."""
    found = []
    for ranks in (8, 16):
        for name, changes in CONFIGURATIONS.items():
            base = {"tokens": 1024, "patches": 1024, "target_tokens": 768, "frozen": VISION,
                    "align_fsdp_param_groups": True, **changes}  # fmt: skip
            plan = Plan(model_config=model_config, world_size=ranks, sharding_size=ranks, **base)
            result, received = estimate(plan), volumes(plan)
            amounts = result.peak.amounts
            static = sum(amounts[key] for key in ("parameters", "gradients", "optimizer"))
            activations = sum(amounts[key] for key in ("text", "experts", "vision", "head"))
            found.append({
                "ranks": ranks, "configuration": name, "static": static, "activations": activations,
                "rest": result.peak.total - static - activations, "total": result.peak.total, "host": result.host,
                "fits": device.fits(result), "all_gather": received["all_gather"],
                "reduce_scatter": received["reduce_scatter"], "all_to_all": received["expert_all_to_all"],
            })  # fmt: skip
    return found


EXPERT_RANKS = (None, 2, 8, 16, 32, 64)
"""None: the experts are not adapted."""
LORA_LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (8, 8))
"""(devices, ranks that share the experts)."""


def lora_rows(model_config: Qwen3VLConfig) -> list[dict[str, Any]]:
    """One row per layout of a LoRA run with rank 16: peak bytes by the experts' rank."""
    found = []
    for ranks, expert_size in LORA_LAYOUTS:
        row: dict[str, Any] = {"ranks": ranks, "expert_size": expert_size}
        for rank in EXPERT_RANKS:
            targets = ("attention",) if rank is None else ("attention", "experts")
            options = LoraOptions(targets=targets, r=16, alpha=32, expert_r=rank or 16)
            plan = Plan(
                model_config=model_config, world_size=ranks, sharding_size=ranks, expert_size=expert_size,
                tokens=4096, patches=1024, target_tokens=3840, frozen=tuple(SPEC.parts), frozen_param_bytes=2,
                adapters=SPEC.adapters(model_config, options), align_fsdp_param_groups=True,
                recompute_granularity="full", loss_chunk_size=1024,
            )  # fmt: skip
            row[f"experts {rank}"] = estimate(plan).peak.total
        found.append(row)
    return found


def print_lora(table: list[dict[str, Any]]) -> None:
    """As Markdown, in GiB."""
    heads = ["attention" if rank is None else f"and experts, rank {rank}" for rank in EXPERT_RANKS]
    print("| devices | " + " | ".join(heads) + " |\n|" + " --- |" * (1 + len(heads)))
    for row in table:
        layout = "" if row["ranks"] == 1 else " FSDP2" if row["expert_size"] == 1 else f" EP {row['expert_size']}"
        cells = [f"{row[f'experts {rank}'] / GIB:.1f}" for rank in EXPERT_RANKS]
        print(f"| {row['ranks']}{layout} | " + " | ".join(cells) + " |")


def main() -> int:
    """Print the table, and with --json the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-config", required=True, help="directory of the published config.json")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here, in bytes")
    parser.add_argument("--lora", action="store_true", help="the table of LoRA runs instead")
    options = parser.parse_args()
    try:
        model_config = Qwen3VLConfig.from_pretrained(options.hf_config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.lora:
        table = lora_rows(model_config)
        print_lora(table)
    else:
        table = rows(model_config, Device(size=64 * GIB, reserve=round(RESERVE_GB * GIB)))
        print_full(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
    return 0


def print_full(table: list[dict[str, Any]]) -> None:
    """As Markdown, in GiB."""
    print("| devices | configuration | parameters, gradients, AdamW | activations | all-gathers, workspace | total | "
          "fits | all-gather | reduce-scatter | all-to-all |\n|" + " --- |" * 10)
    for row in table:
        figures = [row[key] / GIB for key in ("static", "activations", "rest", "total")]
        traffic = [row[key] / GIB for key in ("all_gather", "reduce_scatter", "all_to_all")]
        cells = [f"{value:.1f}" for value in figures] + ["yes" if row["fits"] else "**no**"]
        cells += [f"{value:.1f}" for value in traffic]
        print(f"| {row['ranks']} | {row['configuration']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
