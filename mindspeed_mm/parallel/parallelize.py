"""All of a layout applied to a model, in the one order that works."""

from __future__ import annotations

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel
from mindspeed_mm.parallel.context_parallel import apply_context_parallelism
from mindspeed_mm.parallel.expert_parallel import shard_experts
from mindspeed_mm.parallel.fsdp import shard_model
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.parallel.single_device import apply_mixed_precision


def parallelise(model: Qwen3VLModel, *, layout: Layout, config: FSDPConfig) -> None:
    """Spread experts, share micro-batches, shard parameters; in place, on meta tensors or on real ones.
    """
    experts = shard_experts(model, layout.expert_mesh) if layout.expert_mesh is not None else []
    if layout.context_mesh is not None:
        apply_context_parallelism(model, layout.context_mesh)
    if layout.world_size == 1 and not config.offload_to_cpu:
        apply_mixed_precision(model, model.wrap_units(), config)
        return
    small = model.root_group_modules() if config.align_fsdp_param_groups else []
    shard_model(model, model.wrap_units(), layout=layout, config=config, experts=experts, small=small)
