"""Bytes that one process receives from others in an optimizer step; it sends as many."""

from __future__ import annotations

from mindspeed_mm.tools.memory.parameters import Unit, units_of
from mindspeed_mm.tools.memory.plan import Plan

COLLECTIVES = {
    "all_gather": "all-gather of parameters",
    "reduce_scatter": "reduce-scatter of gradients",
    "all_reduce": "all-reduce of gradients between copies",
    "expert_all_to_all": "all-to-all of tokens to experts and back",
    "context_all_to_all": "all-to-all around attention",
    "vision_all_gather": "all-gather of vision embeddings",
}


def volumes(plan: Plan) -> dict[str, int]:
    """Bytes by collective, one of ``COLLECTIVES``."""
    step = {
        **_sharding(plan),
        "expert_all_to_all": _experts(plan),
        "context_all_to_all": _attention(plan),
        "vision_all_gather": _vision(plan),
    }
    return {name: round(plan.micro_batches * value) for name, value in step.items()}


def _others(size: int) -> float:
    """Share of a whole that lies with the others."""
    return (size - 1) / size


def _passes(*, trains: bool, again: bool) -> int:
    """How often an exchange in a layer happens: forward, backward, and forward run again."""
    return 1 if not trains else 3 if again else 2


def _sharding(plan: Plan) -> dict[str, float]:
    result = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}
    for unit in units_of(plan):
        times = 2 if plan.reshard and unit.kind not in ("root", "head") and _runs_backward(plan, unit) else 1
        if unit.kind == "experts" and plan.recompute == "full":
            times += int(plan.reshard)  # FSDP2 frees them once more behind the forward pass that is run again
        trained = plan.reduce_bytes * unit.gathered(training_only=True)
        result["all_gather"] += times * plan.compute_bytes * unit.gathered() * _others(unit.holders)
        result["reduce_scatter"] += trained * _others(unit.holders)
        result["all_reduce"] += 2 * trained / unit.holders * _others(plan.replicas)
    return result


def _runs_backward(plan: Plan, unit: Unit) -> bool:
    if unit.kind == "vision":
        return plan.train_vision
    if unit.kind == "merger":
        return plan.train_vision or plan.train_projector
    return True  # embeddings too: they are gathered ahead, though nothing happens to frozen ones


def _experts(plan: Plan) -> float:
    text = plan.model_config.text
    layers = sum(text.is_moe_layer(layer) for layer in range(text.num_layers))
    rows = plan.local_tokens * text.num_experts_per_token * plan.imbalance
    one_way = rows * text.hidden_size * plan.compute_bytes * _others(plan.expert_size)
    return 2 * layers * one_way * _passes(trains=True, again=plan.recompute == "full")


def _attention(plan: Plan) -> float:
    text, vision, size = plan.model_config.text, plan.model_config.vision, plan.context_size
    query, key = text.num_heads * text.head_dim, max(text.num_kv_heads, size) * text.head_dim
    numbers = 0
    for layers, rows, there, back, trains in (
        (text.num_layers, plan.local_tokens, query + 2 * key, query, True),
        (vision.depth, plan.local_patches, 3 * vision.hidden_size, vision.hidden_size, plan.train_vision),
    ):
        # running the core attention again ends before its result is sent back, which nothing is computed from
        there *= _passes(trains=trains, again=plan.recompute != "none")
        back *= _passes(trains=trains, again=plan.recompute == "full")
        numbers += layers * rows * (there + back)
    return numbers * plan.compute_bytes * _others(size)


def _vision(plan: Plan) -> float:
    vision = plan.model_config.vision
    merged = plan.patches // vision.merge_unit * (1 + len(vision.deepstack_visual_indexes))
    passes = _passes(trains=plan.train_vision or plan.train_projector, again=False)
    return passes * merged * vision.out_hidden_size * plan.compute_bytes * _others(plan.context_size)
