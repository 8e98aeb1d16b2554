"""All of a layout applied to a model, in the one order that works."""

from __future__ import annotations

from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.qwen3_vl.model import Qwen3VLModel
from mindspeed_mm.parallel.context_parallel import apply_context_parallelism
from mindspeed_mm.parallel.expert_parallel import shard_experts
from mindspeed_mm.parallel.fsdp import shard_model
from mindspeed_mm.parallel.mesh import Layout
from mindspeed_mm.parallel.single_device import apply_mixed_precision


def parallelise(model: Qwen3VLModel, *, layout: Layout, config: FSDPConfig) -> None:
    """Spread experts, share micro-batches, shard parameters; in place, on meta tensors or on real ones.

    Raises:
        UserError: if the model does not fit the layout.
    """
    _check_expert_shards(model, layout)
    experts = shard_experts(model, layout.expert_mesh) if layout.expert_mesh is not None else []
    if layout.context_mesh is not None:
        apply_context_parallelism(model, layout.context_mesh)
    if layout.world_size == 1 and not config.offload_to_cpu:
        apply_mixed_precision(model, model.wrap_units(), config)
        return
    small = model.root_group_modules() if config.align_fsdp_param_groups else []
    shard_model(model, model.wrap_units(), layout=layout, config=config, experts=experts, small=small)


def _check_expert_shards(model: Qwen3VLModel, layout: Layout) -> None:
    """FSDP2 cuts axis 1 of spread experts, which unlike axis 0 must come out even."""
    if layout.expert_shard_mesh is None:
        return
    text, holders = model.text_decoder.model_config, layout.expert_shard_mesh.size(-1)
    for name, width in (("hidden_size", text.hidden_size), ("moe_intermediate_size", text.moe_intermediate_size)):
        if width % holders:
            raise UserError(
                f"each expert would be cut into {holders} parts, which does not divide {name} {width}; raise "
                "--expert-model-parallel-size, or lower sharding_size in the FSDP2 file"
            )
