"""``--fsdp2-config-path``: how parameters are sharded, and in which types the model computes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from mindspeed_mm.config.schema import StrictModel, effective, no_effect, refused


class FSDPConfig(StrictModel):
    """The whole file. Parameters and optimizer state are fp32 whatever the compute types are."""

    sharding_size: int | Literal["auto"] = effective(
        "auto", "processes that share one copy of the parameters; auto: all; fewer: copies are kept in step (HSDP)"
    )
    reshard_after_forward: bool = effective(
        True, "free a layer's gathered parameters after forward and gather them again for backward"
    )
    param_dtype: Literal["bf16", "fp32"] = effective("bf16", "type of forward and backward")
    reduce_dtype: Literal["bf16", "fp32"] = effective("fp32", "type in which gradients are summed over processes")
    cast_forward_inputs: bool = effective(True, "cast a sharded module's floating-point inputs to param_dtype")
    num_to_forward_prefetch: int = effective(1, "layers gathered ahead of time in forward; 0: none", ge=0)
    num_to_backward_prefetch: int = effective(
        1, "layers gathered ahead of time in backward; 0: as FSDP2 does by itself, which is one", ge=0
    )
    offload_to_cpu: bool = effective(False, "keep parameters, gradients and optimizer state in host memory")
    align_fsdp_param_groups: bool = effective(
        False, "gather the decoder layers' norms and routers once per step, so that a layer's own gathering moves "
        "whole matrices only"
    )
    expert_parallel_size: int | None = effective(
        None, "processes that the experts of a layer are spread over, as --expert-model-parallel-size says", ge=1
    )
    reshard_local_experts: bool = refused(
        True, "experts are always sharded over the processes that hold the same ones"
    )
    moe_modules: list[str] | None = no_effect(None, "the model knows its experts")
    sub_modules_to_wrap: list[str] | None = refused(None, "the model knows its layers, which are sharded one by one")
    recompute_modules: list[str] | None = refused(None, "--recompute-granularity says what is computed again")
    ignored_modules: list[str] | None = refused(
        None, "all parameters are sharded; what is frozen stands in the model file"
    )

    @field_validator("sharding_size", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        # plain, since a union would report one error for each of its members
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("must be auto or a number of processes, at least 1")
