"""No host-device synchronisation inside a step, except one per layer under expert parallelism."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.helpers.layouts import BF16, case, run_layouts

LAYERS = 3  # of the tiny model, all sparse
EXCHANGE = ("tolist", "mindspeed_mm/parallel/expert_parallel.py:__call__")
LOOP = ("tolist", "mindspeed_mm/backend/kernels/experts.py:reference_experts")
# torch 2.7 has no grouped_mm on a CPU, so the reference loop, which synchronises, replaces it
ALLOWED = set() if hasattr(torch.nn.functional, "grouped_mm") else {LOOP}
LORA = {"targets": ["all"], "r": 4, "alpha": 8, "expert_r": 4}
pytestmark = pytest.mark.st


def reads_of(layouts, processes, directory):
    """Name -> the reads of each step, without the allowed ones."""
    cases = {name: {**layout, "host_reads": True} for name, layout in layouts.items()}
    return {
        name: [[read for read in step if read not in ALLOWED] for step in outcome["host_reads"]]
        for name, outcome in run_layouts(processes, cases, directory).items()
    }


def test_one_process_reads_nothing(tmp_path):
    layouts = {
        "fp32": case(8),
        "bf16, accumulation": case(4, fsdp=BF16),
        "recompute and chunks": case(8, choices={"recompute_granularity": "full", "loss_chunk_size": 3}),
        "adapters": case(8, lora=LORA),
        "balance": {**case(4), "router_aux_loss_coef": 0.1, "loss_mode": "per_sample"},
    }
    for name, steps in reads_of(layouts, 1, tmp_path).items():
        assert len(steps) == 3, name
        assert not any(steps), (name, steps)


def test_expert_parallelism_reads_split_sizes_once_a_layer(tmp_path):
    layouts = {
        "EP2": case(4, expert_size=2),
        "EP2, recompute": case(4, choices={"recompute_granularity": "selective"}, expert_size=2),
        "EP2, adapters": case(4, expert_size=2, lora=LORA),
        "CP2": case(8, context_size=2),
        "reference experts": case(4, choices={"fused_experts": False}),
    }
    reads = reads_of(layouts, 2, tmp_path)
    assert not any(reads.pop("CP2"))
    # a check that reads are found: the reference loop reads the tokens per expert
    assert bool(ALLOWED) or LOOP in reads["reference experts"][0]
    reads.pop("reference experts")
    for name, steps in reads.items():
        for found in steps:
            assert Counter(found) == {EXCHANGE: LAYERS}, name
