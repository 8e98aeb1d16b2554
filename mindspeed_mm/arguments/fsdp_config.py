"""``--fsdp2-config-path``: how parameters are sharded, and in which types the model computes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from mindspeed_mm.arguments.fields import StrictModel, effective, refused


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
    num_to_backward_prefetch: int = effective(1, "layers gathered ahead of time in backward; 0: none", ge=0)
    offload_to_cpu: bool = effective(False, "keep parameters, gradients and optimizer state in host memory")
    align_fsdp_param_groups: bool = refused(
        False, "FSDP2 pads every parameter by itself; there are no groups to align"
    )

    @field_validator("sharding_size", mode="plain")
    @classmethod
    def _auto_or_count(cls, value: Any) -> Any:
        # plain, since a union would report one error for each of its members
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("must be auto or a number of processes, at least 1")
