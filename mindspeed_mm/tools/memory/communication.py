"""Bytes that one rank receives from others in an optimizer step; it sends as many."""

from __future__ import annotations

from mindspeed_mm.models.memory import Plan, others
from mindspeed_mm.models.spec import get_spec
from mindspeed_mm.tools.memory.plan import units_of

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
    exchanges = get_spec(plan.model_config.model_type).memory_exchanges(plan)
    step = dict.fromkeys(COLLECTIVES, 0.0) | _sharding(plan) | exchanges
    return {name: round(plan.micro_batches * value) for name, value in step.items()}


def _sharding(plan: Plan) -> dict[str, float]:
    result = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}
    reached = False
    for unit in units_of(plan):
        # behind what trains, frozen embeddings too: they are gathered ahead in backward, though nothing happens to them
        reached |= unit.runs_backward
        again = reached and unit.kind not in ("root", "head")
        times = 2 if plan.reshard_after_forward and again else 1
        if unit.kind == "experts" and plan.recompute_granularity == "full":
            times += int(plan.reshard_after_forward)  # FSDP2 frees them again behind the recomputed forward pass
        trained = plan.reduce_bytes * unit.gathered(training_only=True)
        result["all_gather"] += times * plan.compute_bytes * unit.gathered() * others(unit.shards)
        result["reduce_scatter"] += trained * others(unit.shards)
        result["all_reduce"] += 2 * trained / unit.shards * others(plan.replicas)
    return result
