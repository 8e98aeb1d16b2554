"""The memory estimate against what real steps allocate on a CPU, and its volumes against what collectives carry.

``python -m tests.st.test_memory_estimate`` prints the table of docs/memory_estimate.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.config.command_line import parse_args
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.models.memory import WRITTEN_OUT, Plan
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.tools.memory.communication import volumes
from mindspeed_mm.tools.memory.estimate import Estimate, estimate
from mindspeed_mm.tools.memory.plan import Load, plan_run

pytestmark = [
    pytest.mark.st,
    pytest.mark.skipif(
        not hasattr(torch.nn.functional, "grouped_mm"),
        reason="on a CPU torch 2.7's attention with grouped heads keeps all scores, which no accelerator's does",
    ),
]
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.10  # what the estimate promises; seen: docs/memory_estimate.md
SIDE = 16  # patches along each image
EVEN = [(256, 1, 100)] * 4
PACKED = [(300, 1, 100), (200, 0, 150), (400, 2, 100), (124, 0, 60)]
SHORT = [(80, 1, 10)] * 4


def config(
    *, layers: int = 4, hidden: int = 256, experts: int = 16, inner: int = 96, vocabulary: int = 2048,
    dense: bool = False, tied: bool = False,
) -> dict[str, Any]:
    """A config.json small enough for a CPU, with a vision tower of four blocks."""
    moe = {"num_experts": experts, "num_experts_per_tok": 4, "moe_intermediate_size": inner}
    return {
        "model_type": "qwen3_vl" if dense else "qwen3_vl_moe", "tie_word_embeddings": tied, "image_token_id": 90,
        "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
        "text_config": {
            "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": vocabulary, "intermediate_size": 3 * hidden, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "attention_bias": False, "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
            **({} if dense else moe),
        },
        "vision_config": {
            "depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 344,
            "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "in_channels": 3, "num_position_embeddings": 144, "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0, 2],
        },
    }  # fmt: skip


PARTS = {"vision_encoder": "vision", "vision_projector": "projector", "text_decoder": "text"}


def case(
    samples: list[tuple[int, int, int]] = EVEN, *flags: str, processes: int = 1, micro_batches: int = 1,
    trains: str = "text", fsdp: dict[str, Any] | None = None, **model_config: Any,
) -> dict[str, Any]:
    """A case for the estimate and for the measurement; ``trains`` names parts, of vision, projector and text."""
    context = int(flags[flags.index("--context-parallel-size") + 1]) if "--context-parallel-size" in flags else 1
    batch = len(samples) * micro_batches * processes // context
    return {
        "processes": processes,
        "config": config(**model_config),
        "flags": ["--mm-data", "-", "--mm-model", "-", "--seq-length", "4096", "--train-iters", "2", "--lr", "1e-5",
                  "--use-torch-fsdp2", "--clip-grad", "0", "--micro-batch-size", str(len(samples)),
                  "--global-batch-size", str(batch), *flags],
        "fsdp": fsdp or {},
        "frozen": [part for part, name in PARTS.items() if name not in trains],
        "samples": samples,
        "micro_batches": micro_batches,
    }  # fmt: skip


FULL = ("--recompute-granularity", "full")
EP2, CP2 = ("--expert-model-parallel-size", "2"), ("--context-parallel-size", "2")
ATTENTION, LORA, ALL = (
    ("--lora-target-modules", *groups, "--lora-r", "16", "--frozen-param-dtype", "bf16")
    for groups in (["attention"], ["attention", "experts"], ["all"])
)
RANK4 = ("--lora-expert-r", "4")
LARGE = {"layers": 6, "hidden": 384, "experts": 32, "inner": 192, "vocabulary": 8192}
QUICK = {
    "FSDP, packed": case(PACKED, processes=2),
    "EP 2, full recompute, vision trains": case(EVEN, *EP2, *FULL, processes=2, trains="vision projector text"),
    "LoRA, FSDP, full recompute": case(EVEN, *LORA, *FULL, processes=2),
    "EP 2, int8 moments": case(EVEN, *EP2, "--moment-dtype", "int8", processes=2),
}
CASES = {
    "one process": case(),
    "one process, packed, fp32": case(PACKED, fsdp={"param_dtype": "fp32"}),
    "one process, full recompute": case(EVEN, *FULL),
    "one process, selective, packed": case(PACKED, "--recompute-granularity", "selective"),
    "one process, vision trains": case(PACKED, trains="vision projector text"),
    "one process, dense": case(PACKED, dense=True),
    **QUICK,
    "FSDP": case(processes=2),
    "FSDP, kept after forward, aligned": case(
        processes=2, fsdp={"reshard_after_forward": False, "align_fsdp_param_groups": True}),
    "FSDP, 2 layers at a time": case(EVEN, *FULL, "--recompute-num-layers", "2", processes=2),
    "FSDP, the first 2 layers": case(
        EVEN, *FULL, "--recompute-method", "block", "--recompute-num-layers", "2", processes=2),
    "FSDP, projector trains": case(processes=2, trains="projector"),
    "FSDP, dense, tied": case(processes=2, dense=True, tied=True),
    "FSDP, much weight": case(SHORT, processes=2, **LARGE),
    "FSDP, much weight, 2 micro-batches, full": case(SHORT, *FULL, processes=2, micro_batches=2, **LARGE),
    "FSDP, much weight, bf16 moments": case(SHORT, "--moment-dtype", "bf16", processes=2, **LARGE),
    "FSDP, prefetch 3": case(processes=2, fsdp={"num_to_forward_prefetch": 3, "num_to_backward_prefetch": 3}),
    "two copies (HSDP), 2 micro-batches": case(processes=2, micro_batches=2, fsdp={"sharding_size": 1}),
    "EP 2": case(EVEN, *EP2, processes=2),
    "CP 2, packed, selective": case(PACKED, *CP2, "--recompute-granularity", "selective", processes=2),
    "LoRA, attention, one process": case(EVEN, *ATTENTION),
    "LoRA, one process": case(EVEN, *LORA),
    "LoRA, one process, full recompute": case(EVEN, *LORA, *FULL),
    "LoRA, one process, packed, vision too": case(PACKED, *ALL, trains="vision projector text"),
    "LoRA, one process, selective, rank 4": case(EVEN, *LORA, *RANK4, "--recompute-granularity", "selective"),
    "LoRA, one process, dense": case(PACKED, *ALL, dense=True),
    "LoRA, attention, FSDP": case(EVEN, *ATTENTION, processes=2),
    "LoRA, FSDP": case(EVEN, *LORA, processes=2),
    "LoRA, FSDP, much weight": case(SHORT, *LORA, processes=2, **LARGE),
    "LoRA, FSDP, aligned, 2 micro-batches": case(
        EVEN, *LORA, *FULL, processes=2, micro_batches=2, fsdp={"align_fsdp_param_groups": True}),
    "LoRA, EP 2": case(EVEN, *LORA, *EP2, processes=2),
    "LoRA, EP 2, much weight, full recompute": case(SHORT, *LORA, *EP2, *FULL, processes=2, **LARGE),
}  # fmt: skip


def plan_of(one: dict[str, Any]) -> Plan:
    """The estimate's plan of a case."""
    args, frozen = parse_args(one["flags"]), one["frozen"]
    model = ModelOptions.model_validate({
        "model_id": one["config"]["model_type"], "init_from_hf_path": "-",
        "image_encoder": {"vision_encoder": {"freeze": "vision_encoder" in frozen},
                          "vision_projector": {"freeze": "vision_projector" in frozen}},
        "text_decoder": {"freeze": "text_decoder" in frozen},
    })  # fmt: skip
    tokens, images, target_tokens = (sum(values) for values in zip(*one["samples"], strict=True))
    plan = plan_run(
        args, model, FSDPConfig(**one["fsdp"]), model_config=Qwen3VLConfig.from_config(one["config"]),
        world_size=one["processes"], load=Load(tokens, images * SIDE**2, target_tokens),
    )  # fmt: skip
    # segments of one length are attended to in one call
    uneven = len({length for length, _, _ in one["samples"]}) > 1
    return dataclasses.replace(plan, kernels=dataclasses.replace(WRITTEN_OUT, joins_segments=uneven))


def measure(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the steps allocate and exchange."""
    results: dict[str, dict[str, Any]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in sorted({one["processes"] for one in cases.values()}):
        with tempfile.TemporaryDirectory() as directory:
            given, out = Path(directory, "cases.json"), Path(directory, "out.json")
            given.write_text(json.dumps({name: one for name, one in cases.items() if one["processes"] == processes}))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            run = subprocess.run([*command, str(ROOT / "tests/drivers/memory_steps.py"), str(given), str(out)],
                                 env=environment, capture_output=True, text=True, timeout=900)  # fmt: skip
            assert run.returncode == 0, run.stderr[-3000:]
            results |= json.loads(out.read_text())
    return results


def differences(result: Estimate, seen: dict[str, Any]) -> dict[str, float]:
    """Estimate over measurement, less one."""
    static = seen["parameters"] + seen["optimizer"]
    # gradients of an earlier micro-batch are not among what forward allocates
    after = result.after_forward.total - result.after_forward.amounts["gradients"]
    return {
        **{name: getattr(result, name) / seen[name] - 1 for name in ("parameters", "gradients", "optimizer")},
        "after forward": (after - result.parameters - result.optimizer) / seen["kept"] - 1,
        "peak": result.peak.total / (static + seen["peak"]) - 1,
    }


def received(plan: Plan) -> dict[str, int]:
    """The volumes by the kind of collective."""
    amounts = volumes(plan)
    return {
        "all_gather": amounts["all_gather"] + amounts["vision_all_gather"],
        "reduce_scatter": amounts["reduce_scatter"],
        "all_reduce": amounts["all_reduce"],
        "all_to_all": amounts["expert_all_to_all"] + amounts["context_all_to_all"],
    }


def check(name: str, one: dict[str, Any], seen: dict[str, Any]) -> None:
    """Hold the estimate of a case against its measurement."""
    plan = plan_of(one)
    found = differences(estimate(plan), seen)
    assert [found[key] for key in ("parameters", "gradients", "optimizer")] == [0.0, 0.0, 0.0], name
    assert abs(found["after forward"]) <= TOLERANCE and abs(found["peak"]) <= TOLERANCE, (name, found)
    for kind, expected in received(plan).items():
        # a step also sums a few numbers, and processes tell each other how many rows will come
        slack = 100_000 if kind == "all_to_all" else 1000
        assert abs(seen["received"].get(kind, 0) - expected) <= slack, (name, kind)


def test_quick_cases() -> None:
    seen = measure(QUICK)
    for name, one in QUICK.items():
        check(name, one, seen[name])
    name, one = next(iter(QUICK.items()))
    for wrong in ({"samples": EVEN * 2}, {"fsdp": {"param_dtype": "fp32"}}, {"processes": 1}):
        with pytest.raises(AssertionError):
            check(name, {**one, **wrong}, seen[name])


@pytest.mark.slow
def test_every_case() -> None:
    cases = {name: one for name, one in CASES.items() if name not in QUICK}
    seen = measure(cases)
    for name, one in cases.items():
        check(name, one, seen[name])


def main() -> None:
    """Print the table."""
    seen = measure(CASES)
    print("| processes | case | held after forward, MB | estimate | at most, MB | estimate |\n|" + " --- |" * 6)
    for name, one in CASES.items():
        result, measured = estimate(plan_of(one)), seen[name]
        found = differences(result, measured)
        peak = (measured["parameters"] + measured["optimizer"] + measured["peak"]) / 1e6
        print(f"| {one['processes']} | {name} | {measured['kept'] / 1e6:.1f} | {found['after forward']:+.1%} | "
              f"{peak:.1f} | {found['peak']:+.1%} |")
        check(name, one, measured)


if __name__ == "__main__":
    main()
