"""What saves memory or freezes parts changes no gradient, under sharding, expert and context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.hf_model import tiny_model
from tests.helpers.layouts import BF16, case, run_layouts
from tests.helpers.mcore_model import model_like, relative

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP": (2, {}), "EP2": (2, {"expert_size": 2}), "CP2": (4, {"context_size": 2}),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full"},
    "full by two": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "full, the first": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
    "offload": {"activation_offload": True},
    "full and offload": {"recompute_granularity": "full", "activation_offload": True},
    "waiting": {"text_synchronize_per_layer": True, "vision_synchronize_per_layer": True},
}
FROZEN = {
    "encoder": {"frozen": ["vision_encoder"]},
    "vision": {"frozen": ["vision_encoder", "vision_projector"], "recompute_granularity": "full"},
    "text": {"frozen": ["text_decoder"]},
}
PARTS = {
    "encoder": ("vision_encoder",), "vision": ("vision_encoder", "vision_projector"), "text": ("text_decoder",),
}  # fmt: skip
pytestmark = pytest.mark.st


def accumulated(layout: str, **options: Any) -> dict[str, Any]:
    """Two steps of two micro-batches, with balanced experts and without clipping, which frozen parts would change."""
    micro_batch, degrees = LAYOUTS[layout]
    made = case(micro_batch, flags=["--train-iters", "2", "--clip-grad", "0"], **degrees, **options)
    return {**made, "router_aux_loss_coef": 0.3, "loss_mode": "per_sample"}


def cases(layout: str) -> dict[str, dict[str, Any]]:
    """All ways under FSDP, and those that differ where there are exchanges between processes under EP and CP."""
    ways = WAYS if layout == "FSDP" else {name: WAYS[name] for name in ("full by two", "selective", "full and offload")}
    made = {"plain": accumulated(layout), "bf16": accumulated(layout, fsdp=BF16)}
    made.update({name: accumulated(layout, choices=choices) for name, choices in ways.items()})
    made.update({name: accumulated(layout, choices=choices) for name, choices in FROZEN.items()})
    for name in ("full by two", "selective"):
        made[f"bf16, {name}"] = accumulated(layout, fsdp=BF16, choices=WAYS[name])
    return made


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    everything = {f"{layout}/{name}": of for layout in LAYOUTS for name, of in cases(layout).items()}
    found = run_layouts(2, everything, tmp_path_factory.mktemp("ways"))
    return {tuple(name.split("/")): outcome for name, outcome in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_memory_changes_no_bit(outcomes, layout):
    for name in cases(layout).keys() - FROZEN.keys():
        ours = outcomes[layout, name]
        theirs = outcomes[layout, "bf16" if name.startswith("bf16") else "plain"]
        assert ours["losses"] == theirs["losses"] and ours["router_losses"] == theirs["router_losses"], name
        for key in ("gradients", "parameters"):
            assert ours[key].keys() == theirs[key].keys()
            assert [k for k in theirs[key] if not torch.equal(ours[key][k], theirs[key][k])] == [], (name, key)
    assert outcomes[layout, "bf16"]["losses"] != outcomes[layout, "plain"]["losses"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parts_change_no_other_gradient(outcomes, layout):
    """Neither in the parts before nor in those after; what is frozen has no gradient and stays as it was."""
    everything = outcomes[layout, "plain"]
    initial = dict(model_like(tiny_model())[0].named_parameters())
    for name in FROZEN:
        ours = outcomes[layout, name]
        trained = {key for key in everything["gradients"] if not any(part in key for part in PARTS[name])}
        assert ours["gradients"].keys() == trained and ours["losses"][0] == everything["losses"][0], name
        worst = max(relative(ours["gradients"][key], everything["gradients"][key]) for key in trained)
        assert worst <= 1e-6, (name, worst)
        frozen = initial.keys() - trained
        assert [key for key in frozen if not torch.equal(ours["parameters"][key], initial[key])] == [], name
        assert [key for key in trained if torch.equal(ours["parameters"][key], initial[key])] == [], name
