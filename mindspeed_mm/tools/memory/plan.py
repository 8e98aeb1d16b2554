"""What the estimate is asked about: one process of a run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig

BYTES = {"bf16": 2, "fp32": 4}
MASTER = 4
"""Bytes of a parameter, of its gradient and of each of AdamW's two moments: fp32 whatever the compute types are."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What implementations keep for backward besides what every one of them keeps.

    Attributes:
        fused_norm: RMSNorm keeps its input; written out it keeps two fp32 tensors of that size.
        fused_swiglu: SwiGLU keeps its input; written out also silu(gate).
        rotary_keeps_input: the rotary product keeps query and key as they were before it.
        softmax_bytes: statistics of the softmax per token and head.
        joins_segments: attention runs segment by segment and joins the results, which then exist twice.
        reduction_copies: the collective library reduces a copy of what it is given.
        fp32_weighting: the gradient of the experts' weights is computed from fp32 copies of all rows.
        inner_again: grouped experts keep what enters SwiGLU, and compute what leaves it again.
    """

    fused_norm: bool
    fused_swiglu: bool
    rotary_keeps_input: bool
    softmax_bytes: int
    joins_segments: bool
    fp32_weighting: bool
    inner_again: bool
    reduction_copies: bool


WRITTEN_OUT = Kernels(
    fused_norm=True, fused_swiglu=False, rotary_keeps_input=False, softmax_bytes=4, joins_segments=True,
    fp32_weighting=False, inner_again=True, reduction_copies=True,
)
"""PyTorch's operations, as on a CPU."""
FUSED = Kernels(
    fused_norm=True, fused_swiglu=True, rotary_keeps_input=True, softmax_bytes=64, joins_segments=False,
    fp32_weighting=False, inner_again=False, reduction_copies=False,
)
"""An accelerator's own kernels; its attention keeps the softmax's maximum and sum, eight fp32 copies of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One process of a run.

    Attributes:
        geometry: of the model.
        world_size: processes.
        sharding_size: processes that share one copy of the parameters.
        expert_size: processes over which experts are spread.
        context_size: processes that share a micro-batch.
        tokens: packed tokens of a micro-batch, vision included, over all processes that share it.
        patches: vision patches of it.
        supervised: supervised tokens of it.
        micro_batches: per optimizer step.
        compute_bytes: of a number in forward and backward.
        reduce_bytes: of a number in the reduction of gradients.
        reshard: whether gathered parameters are freed after forward and gathered again for backward.
        forward_prefetch: units gathered ahead in forward.
        backward_prefetch: units gathered ahead in backward.
        small_in_root: whether decoder layers' norms and routers are gathered once per step.
        shards_on_host: whether parameters, gradients and optimizer state are in the host's memory.
        train_vision: whether the vision encoder trains.
        train_projector: whether the mergers train.
        train_text: whether the decoder trains.
        recompute: see the flags.
        recompute_method: see the flags.
        recompute_layers: see the flags.
        activations_on_host: whether what decoder layers keep is moved to the host.
        loss_chunk: supervised positions whose logits exist at a time; None for all.
        imbalance: rows that the busiest process's experts get, relative to the mean.
        kernels: what the implementations keep.
    """

    model_config: Qwen3VLConfig
    world_size: int
    sharding_size: int
    expert_size: int = 1
    context_size: int = 1
    tokens: int
    patches: int
    target_tokens: int
    micro_batches: int = 1
    compute_bytes: int = 2
    reduce_bytes: int = 4
    reshard: bool = True
    forward_prefetch: int = 1
    backward_prefetch: int = 1
    small_in_root: bool = False
    shards_on_host: bool = False
    train_vision: bool = False
    train_projector: bool = False
    train_text: bool = True
    recompute: Literal["none", "full", "selective"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    activations_on_host: bool = False
    loss_chunk: int | None = None
    imbalance: float = 1.0
    kernels: Kernels = FUSED

    @property
    def local_tokens(self) -> int:
        """Tokens on this process."""
        return -(-self.tokens // self.context_size)

    @property
    def local_patches(self) -> int:
        """Patches on this process; one merge block stands for none."""
        unit = self.model_config.vision.merge_unit
        return max(1, -(-self.patches // (unit * self.context_size))) * unit

    @property
    def local_target_tokens(self) -> int:
        """Supervised tokens on this process, taken to be spread evenly."""
        return -(-self.target_tokens // self.context_size)

    @property
    def is_single_device(self) -> bool:
        """Whether one process holds all parameters, without FSDP2, beside a copy in the compute type."""
        return self.world_size == 1 and not self.shards_on_host

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.world_size // self.sharding_size


@dataclasses.dataclass(frozen=True)
class Load:
    """A micro-batch as large as it can become: see :attr:`Plan.tokens`, ``patches`` and ``supervised``."""

    tokens: int
    patches: int
    target_tokens: int

    @classmethod
    def largest(cls, args: TrainingArgs, model_config: Qwen3VLConfig, *, pixels: int) -> Load:
        """Samples of the full sequence length with one picture of ``pixels`` each, and the rest an answer."""
        vision = model_config.vision
        tokens = args.micro_batch_size * args.seq_length
        most = args.micro_batch_size * pixels // vision.patch_size**2
        merged = min(most // vision.merge_unit, tokens // 2)
        return cls(tokens, merged * vision.merge_unit, tokens - merged)


def plan_run(
    args: TrainingArgs,
    model: ModelOptions,
    fsdp: FSDPConfig,
    *,
    model_config: Qwen3VLConfig,
    world_size: int,
    load: Load,
    imbalance: float = 1.0,
) -> Plan:
    """The plan of a run that the flags and files describe, already checked against each other."""
    encoder, projector = model.image_encoder.vision_encoder, model.image_encoder.vision_projector
    decoder, loss = model.text_decoder, model.loss_cfg
    samples_at_once = args.micro_batch_size * (world_size // args.context_parallel_size)
    return Plan(
        model_config=model_config,
        world_size=world_size,
        sharding_size=world_size if fsdp.sharding_size == "auto" else int(fsdp.sharding_size),
        expert_size=args.expert_model_parallel_size,
        context_size=args.context_parallel_size,
        tokens=load.tokens,
        patches=load.patches,
        target_tokens=load.target_tokens,
        micro_batches=(args.global_batch_size or samples_at_once) // samples_at_once,
        compute_bytes=BYTES[fsdp.param_dtype],
        reduce_bytes=BYTES[fsdp.reduce_dtype],
        reshard=fsdp.reshard_after_forward,
        forward_prefetch=fsdp.num_to_forward_prefetch,
        backward_prefetch=fsdp.num_to_backward_prefetch,
        small_in_root=fsdp.align_fsdp_param_groups,
        shards_on_host=fsdp.offload_to_cpu,
        train_vision=not encoder.freeze,
        train_projector=not projector.freeze,
        train_text=not decoder.freeze,
        recompute=args.recompute_granularity or "none",  # type: ignore[arg-type]
        recompute_method=args.recompute_method,  # type: ignore[arg-type]
        recompute_layers=args.recompute_num_layers,
        activations_on_host=decoder.activation_offload,
        loss_chunk=loss.chunk_size if loss.compute_mode == "chunk" else None,
        imbalance=imbalance,
    )
