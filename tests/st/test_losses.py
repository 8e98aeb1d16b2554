"""Loss modes, auxiliary loss and dense models under FSDP2 on several processes, against Hugging Face."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from tests.drivers.run_layouts import in_order
from tests.helpers.hf_model import hf_inputs, hf_router_logits, tiny_model
from tests.helpers.layouts import ADAM_EPS, BATCH, CLIP, GRADIENT, LOSS, LR, PARAMETER, case, errors, run_layouts
from tests.helpers.mcore_model import to_mcore

STEPS, COEFFICIENT, MICRO = 2, 0.3, 2
pytestmark = pytest.mark.st


def hugging_face(mode: str, *, coefficient: float = 0.0, **model_options: bool) -> dict[str, Any]:
    """A plain loop with Hugging Face's model, each sample by itself, the whole step in one backward pass."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    torch.set_num_threads(1)
    model = tiny_model(**model_options)
    model_config = Qwen3VLConfig.from_config(model.config.to_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=ADAM_EPS, weight_decay=0.0)
    result: dict[str, Any] = {"losses": [], "router_losses": [], "norms": [], "gradients": {}}
    for step in range(STEPS):
        means, counts, routed = [], [], []
        with hf_router_logits(model) as logits:
            for sample in in_order(step, BATCH):
                inputs = hf_inputs(sample)
                labels = inputs.pop("labels")[0, 1:]
                means.append(F.cross_entropy(model(**inputs).logits[0, :-1], labels, ignore_index=-100))
                counts.append(int((labels != -100).sum()))
                routed.append(list(logits))
                logits.clear()
        sums = [sum(counts[i // MICRO * MICRO : (i // MICRO + 1) * MICRO]) for i in range(len(counts))]
        shares = {
            "per_token": counts,
            "per_sample": [1] * len(counts),
            "square": [math.sqrt(n) for n in counts],
            "default": [n / total for n, total in zip(counts, sums, strict=True)],
        }[mode]
        loss = sum(share * mean for share, mean in zip(shares, means, strict=True)) / sum(shares)
        result["losses"].append(loss.item())
        if coefficient:
            layers = tuple(torch.cat(of_layer) for of_layer in zip(*routed, strict=True))
            text = model_config.text
            balance = load_balancing_loss_func(layers, text.num_experts, text.num_experts_per_token) * coefficient
            result["router_losses"].append(balance.item())
            loss = loss + balance
        loss.backward()
        result["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        if not result["gradients"]:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            result["gradients"] = to_mcore(model_config, gradients)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {**result, "parameters": to_mcore(model_config, parameters)}


def two_steps(micro_batch: int, **options: Any) -> dict[str, Any]:
    """A case of the layouts' matrix, shortened, with further options of its own."""
    own = {key: options.pop(key) for key in ("model", "loss_mode", "router_aux_loss_coef") if key in options}
    made = case(micro_batch, **options)
    return {**made, **own, "flags": [*made["flags"], "--train-iters", str(STEPS)]}


BALANCED = {"router_aux_loss_coef": COEFFICIENT}
TIED = {"dense": True, "tied": True}
# by (loss mode, auxiliary coefficient, model): number of processes -> layouts
LOSSES: dict[tuple[str, float, str], dict[int, dict[str, dict[str, Any]]]] = {
    ("per_sample", COEFFICIENT, "sparse"): {
        2: {
            "FSDP": two_steps(4, loss_mode="per_sample", **BALANCED),
            "FSDP, accumulation 4": two_steps(1, loss_mode="per_sample", **BALANCED),
            "CP2": two_steps(8, context_size=2, loss_mode="per_sample", **BALANCED),
            "CP2, accumulation 2": two_steps(4, context_size=2, loss_mode="per_sample", **BALANCED),
            "EP2, accumulation 2": two_steps(2, expert_size=2, loss_mode="per_sample", **BALANCED),
            "chunks of 3": two_steps(4, choices={"loss_chunk_size": 3}, loss_mode="per_sample", **BALANCED),
        },
        4: {
            "EP2 x CP2, accumulation 2": two_steps(
                2, expert_size=2, context_size=2, loss_mode="per_sample", **BALANCED
            ),
        },
    },
    ("square", 0.0, "sparse"): {
        2: {
            "FSDP, accumulation 2": two_steps(2, loss_mode="square"),
            "CP2": two_steps(8, context_size=2, loss_mode="square"),
            "EP2, chunks of 3": two_steps(4, expert_size=2, choices={"loss_chunk_size": 3}, loss_mode="square"),
        },
    },
    # Alone among the modes it depends on the micro-batches: all of these have the same.
    ("default", COEFFICIENT, "sparse"): {
        2: {
            "FSDP, accumulation 2": two_steps(MICRO, loss_mode="default", **BALANCED),
            "EP2, accumulation 2": two_steps(MICRO, expert_size=2, loss_mode="default", **BALANCED),
            "CP2, accumulation 4": two_steps(MICRO, context_size=2, loss_mode="default", **BALANCED),
            "chunks of 3": two_steps(MICRO, choices={"loss_chunk_size": 3}, loss_mode="default", **BALANCED),
        },
        4: {"HSDP": two_steps(MICRO, fsdp={"sharding_size": 2}, loss_mode="default", **BALANCED)},
    },
    ("per_token", 0.0, "dense"): {2: {"FSDP": two_steps(4, model={"dense": True})}},
    ("per_token", 0.0, "tied"): {
        2: {
            "FSDP, accumulation 2": two_steps(2, model=TIED),
            "recomputed by two": two_steps(
                4, model=TIED, choices={"recompute_granularity": "full", "recompute_num_layers": 2}
            ),
        },
        4: {"HSDP": two_steps(2, model=TIED, fsdp={"sharding_size": 2})},
    },
}
MODELS = {"sparse": {}, "dense": {"dense": True}, "tied": TIED}


def numbered(processes: int) -> dict[str, dict[str, Any]]:
    """All layouts of a number of processes, under names of their own."""
    return {
        f"{key}, {name}": layout
        for key, by_processes in LOSSES.items()
        for name, layout in by_processes.get(processes, {}).items()
    }


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, float, str], dict[str, Any]]:
    return {
        (mode, coefficient, model): hugging_face(mode, coefficient=coefficient, **MODELS[model])
        for mode, coefficient, model in LOSSES
    }


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_equal_hugging_face(references, tmp_path, processes):
    outcomes = run_layouts(processes, numbered(processes), tmp_path)
    for key, by_processes in LOSSES.items():
        for name in by_processes.get(processes, {}):
            theirs, ours = references[key], outcomes[f"{key}, {name}"]
            found = errors(ours, theirs)
            print(f"{processes} processes, {key}, {name}: {found}")
            assert found["losses"] <= LOSS and found["norms"] <= GRADIENT, (key, name, found)
            assert found["gradients"] <= GRADIENT and found["parameters"] <= PARAMETER, (key, name, found)
            if key[1]:
                assert ours["router_losses"] == pytest.approx(theirs["router_losses"], rel=LOSS), (key, name)
            else:
                assert ours["router_losses"] == [None] * STEPS
