"""Applies expert parallelism, context parallelism and FSDP2 to a model, in the order that they need."""

from __future__ import annotations

from torch import nn

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.models.model import Model
from mindspeed_mm.parallel.context_parallel import apply_context_parallelism
from mindspeed_mm.parallel.expert_parallel import shard_experts
from mindspeed_mm.parallel.fsdp import shard_model
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.parallel.single_device import apply_mixed_precision


def parallelize(model: Model, *, layout: Layout, config: FSDPConfig) -> None:
    """Shard experts, split micro-batches, shard parameters; in place, on meta tensors or on real ones."""
    plan = model.parallel_plan()
    experts: list[nn.Module] = []
    if layout.expert_mesh is not None:
        experts = shard_experts(plan.moe_layers, layout.expert_mesh)
    if layout.context_mesh is not None:
        apply_context_parallelism(plan, layout.context_mesh)
    if layout.world_size == 1 and not config.offload_to_cpu:
        apply_mixed_precision(model, plan.wrap_units, config)
        return
    root_group = plan.root_group if config.align_fsdp_param_groups else ()
    shard_model(model, plan.wrap_units, layout=layout, config=config, experts=experts, root_group=root_group)
