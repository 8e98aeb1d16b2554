"""``--fsdp2-config-path``: sharding and compute types."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from mindspeed_mm.config.schema import StrictModel, effective, no_effect, refused


class FSDPConfig(StrictModel):
    """The whole file. Parameters and optimizer state are fp32 whatever the compute types are."""

    sharding_size: int | Literal["auto"] = effective(
        "auto", "ranks over which one copy of the parameters is sharded; auto or null: all; fewer: HSDP"
    )
    reshard_after_forward: bool = effective(
        True, "free a layer's gathered parameters after forward and gather them again in backward"
    )
    param_dtype: Literal["bf16", "fp32"] = effective("bf16", "compute type of forward and backward")
    reduce_dtype: Literal["bf16", "fp32"] = effective("fp32", "type in which gradients are reduced over ranks")
    cast_forward_inputs: bool = effective(True, "cast a sharded module's floating-point inputs to param_dtype")
    num_to_forward_prefetch: int = effective(1, "layers whose parameters are prefetched in forward; 0: none", ge=0)
    num_to_backward_prefetch: int = effective(
        1, "layers whose parameters are prefetched in backward; 0: FSDP2's own choice, which is 1", ge=0
    )
    offload_to_cpu: bool = effective(False, "keep parameters, gradients and optimizer state in host memory")
    align_fsdp_param_groups: bool = effective(
        False, "gather the decoder layers' norms and routers once per step, so that each layer's all-gather moves "
        "whole matrices only"
    )
    expert_parallel_size: int | None = effective(
        None, "ranks over which the experts of a layer are sharded; null: --expert-model-parallel-size", ge=1
    )
    reshard_local_experts: bool = refused(
        True, "experts are always sharded over the ranks that hold the same ones"
    )
    moe_modules: list[str] | None = no_effect(None, "the model family names its experts")
    sub_modules_to_wrap: list[str] | None = no_effect(
        None, "the model family names its layers, each of which is one FSDP unit"
    )
    recompute_modules: list[str] | None = effective(
        None, "layers to recompute in backward; any list: all layers, as with --recompute-granularity full"
    )
    ignored_modules: list[str] | None = refused(
        None, "all parameters are sharded; the model file freezes them"
    )

    @field_validator("sharding_size", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        # plain, since a union would report one error for each of its members
        if value is None:
            return "auto"
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("must be auto or a number of ranks, at least 1")
