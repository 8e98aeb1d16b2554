"""LoRA in every parallel layout against one process: losses, gradients, and adapters after three steps."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.models.lora import LoraOptions, is_adapter
from tests.helpers.hf_model import tiny_model
from tests.helpers.layouts import BF16, DENSE, PAIRS, STEPS, case, errors, is_bf16, one_process, run_layouts
from tests.helpers.lora import adapted_at_random
from tests.st.test_parallel_layouts import BF16 as ROUNDING
from tests.st.test_parallel_layouts import BF16_GRADIENT, BOUNDS

ALL = {"targets": ["all"], "r": 4, "alpha": 8, "expert_r": 4}
TEXT = {"targets": ["attention", "experts"], "r": 3, "alpha": 6, "expert_r": 5}  # ranks that no kernel is aligned to
# In bf16, random adapters of twice the layer's scale make the next step's norm a matter of the processor: 2 % apart
SMALL = {**TEXT, "alpha": 1.5}
NO_EXPERTS = {"targets": ["attention"], "r": 4, "alpha": 8, "expert_r": 4}
LAYOUTS = {
    2: {
        "FSDP": case(4, lora=ALL),
        "FSDP, text, recompute": case(4, lora=TEXT, choices={"recompute_granularity": "full"}),
        "FSDP, bf16": case(4, lora=ALL, fsdp=BF16),
        "EP2": case(4, lora=ALL, expert_size=2),
        "EP2, text, bf16": case(4, lora=SMALL, expert_size=2, fsdp=BF16),
        "CP2": case(8, lora=ALL, context_size=2),
    },
    4: {
        "HSDP x EP2 x CP2": case(4, lora=ALL, expert_size=2, context_size=2, **PAIRS),
        "EP2, recompute": case(2, lora=ALL, expert_size=2, choices={"recompute_granularity": "full"}),
        "EP4": case(2, lora=ALL, expert_size=4),
        "EP4, attention": case(2, lora=NO_EXPERTS, expert_size=4),
    },
}
SLOW = {
    "HSDP": case(4, lora=ALL, fsdp={"sharding_size": 1}),
    "FSDP, aligned groups, accumulation 2": case(2, lora=ALL, fsdp={"align_fsdp_param_groups": True}),
    "FSDP, text": case(4, lora=TEXT),
    "FSDP, attention": case(4, lora=NO_EXPERTS),
    "FSDP, dense": case(4, lora=ALL, model=DENSE),
    "FSDP, recompute": case(4, lora=ALL, choices={"recompute_granularity": "full"}),
    "FSDP, selective recompute": case(4, lora=ALL, choices={"recompute_granularity": "selective"}),
    "FSDP, activations on the host": case(4, lora=ALL, choices={"activation_offload": True}),
    "FSDP, parameters on the host": case(4, lora=ALL, fsdp={"offload_to_cpu": True}),
    "FSDP, prefetch 0 and 3": case(4, lora=TEXT, fsdp={"num_to_forward_prefetch": 0, "num_to_backward_prefetch": 3}),
    "EP2, text": case(4, lora=TEXT, expert_size=2),
    "EP2, loop over experts": case(4, lora=ALL, expert_size=2, choices={"fused_experts": False}),
}


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, LAYOUTS[2], id="2"),
        pytest.param(2, SLOW, id="2, further ones", marks=pytest.mark.slow),
        pytest.param(4, LAYOUTS[4], id="4", marks=pytest.mark.slow),
    ],
)
def test_layouts_equal_one_process(tmp_path, processes, cases):
    """And the base keeps its bits."""
    alone = one_process(list(cases.values()), tmp_path)
    for name, ours in run_layouts(processes, cases, tmp_path).items():
        of = cases[name]
        theirs = alone(of)
        assert len(ours["losses"]) == STEPS
        assert ours["gradients"] and all(map(is_adapter, ours["gradients"])), name
        found, bounds = errors(ours, theirs), BOUNDS
        if is_bf16(of):
            bounds = {**ROUNDING, "gradients": max(BF16_GRADIENT[key] for key in ("", *of["layout"]))}
        assert all(found[key] <= bound for key, bound in bounds.items()), (name, found)
        if not of["model"]:
            model, _ = adapted_at_random(tiny_model(), LoraOptions(**of["lora"]), dtype=of["fsdp"]["param_dtype"])
            before = dict(model.named_parameters())
            assert before.keys() == ours["parameters"].keys()
            changed = {key for key in before if not torch.equal(before[key].detach(), ours["parameters"][key])}
            assert changed == set(filter(is_adapter, before)), name
