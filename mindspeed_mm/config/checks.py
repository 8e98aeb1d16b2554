"""Rules that join several options, or options with the model and the number of ranks: each stands here only."""

from __future__ import annotations

import dataclasses
from typing import Protocol, cast

from mindspeed_mm.config.flags import TrainingArgs, option_name
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import LossMode, ModelOptions
from mindspeed_mm.errors import UserError


class _Text(Protocol):
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    max_position_embeddings: int
    num_experts: int


class _Vision(Protocol):
    depth: int
    hidden_size: int
    num_heads: int


class ModelConfigLike(Protocol):
    """What the rules read of the model's geometry (``mindspeed_mm.models.qwen3_vl.config.Qwen3VLConfig``)."""

    model_type: str
    text: _Text
    vision: _Vision


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is split over ranks and micro-batches.

    Attributes:
        world_size: ranks of the job.
        data_parallel_size: ranks with different samples.
        global_batch_size: samples per optimizer step.
        micro_batches: forward passes per rank and optimizer step.
    """

    world_size: int
    data_parallel_size: int
    global_batch_size: int
    micro_batches: int


def check_flags(args: TrainingArgs) -> None:
    """Rules among flags alone.

    Raises:
        UserError: naming the flags and values that do not go together.
    """
    if not args.use_torch_fsdp2:
        raise UserError("--use-torch-fsdp2 is missing: sharding and compute types are FSDP2's; add it")
    if args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} exceeds --lr {args.lr}; lower it")
    if args.lr_warmup_init > args.lr:
        raise UserError(f"--lr-warmup-init {args.lr_warmup_init} exceeds --lr {args.lr}; lower it")
    if args.calculate_per_token_loss and args.calculate_per_sample_loss:
        raise UserError("--calculate-per-token-loss and --calculate-per-sample-loss exclude each other; keep one")
    for name in ("recompute_method", "recompute_num_layers"):
        if name in args.given and args.recompute_granularity != "full":
            raise UserError(
                f"{option_name(name)} {getattr(args, name)} belongs to --recompute-granularity full; "
                f"add that, or leave {option_name(name)} out"
            )
    if args.lr_warmup_fraction is not None and args.lr_warmup_iters:
        raise UserError("--lr-warmup-fraction and --lr-warmup-iters exclude each other; keep one")
    decay_iters = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_iters >= decay_iters:
        raise UserError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be less than the {decay_iters} steps of the decay "
            "(--lr-decay-iters, or --train-iters)"
        )
    if args.exit_on_hang and not args.hang_watch_factor:
        raise UserError("--exit-on-hang needs the watchdog that --hang-watch-factor 0 switches off; drop one of them")
    for name in ("async_save", "keep_last", "keep_every"):
        if getattr(args, name) and args.save is None:
            raise UserError(f"{option_name(name)} has no effect without --save; add --save DIR")
    if args.keep_every is not None and args.keep_last is None:
        raise UserError(f"--keep-every {args.keep_every} has no effect without --keep-last; add --keep-last N")
    if args.save_interval is not None and args.save is None and "save_interval" in args.given:
        raise UserError(f"--save-interval {args.save_interval} has nowhere to save to; add --save DIR")


def check_parallel(args: TrainingArgs, *, world_size: int) -> BatchPlan:
    """Rules of divisibility, and the batch plan that follows.

    Args:
        args: the flags, after :func:`check_flags`.
        world_size: number of processes.

    Raises:
        UserError: naming the values and the nearest ones that are possible.
    """
    expert, context = args.expert_model_parallel_size, args.context_parallel_size
    for name, size in (("context_parallel_size", context), ("expert_model_parallel_size", expert)):
        if world_size % size:
            raise UserError(
                f"{name} {size} does not divide the number of processes {world_size}; "
                f"choose one of {_divisors(world_size)}"
            )
    data_parallel_size = world_size // context
    samples_at_once = args.micro_batch_size * data_parallel_size
    global_batch_size = samples_at_once if args.global_batch_size is None else args.global_batch_size
    if global_batch_size % samples_at_once:
        below = global_batch_size // samples_at_once * samples_at_once
        options = " or ".join(str(size) for size in (below, below + samples_at_once) if size)
        raise UserError(
            f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {args.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {samples_at_once}; choose {options}"
        )
    return BatchPlan(
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        global_batch_size=global_batch_size,
        micro_batches=global_batch_size // samples_at_once,
    )


def check_degrees(args: TrainingArgs, *, model_config: ModelConfigLike) -> None:
    """Rules between the parallel degrees and the model.

    Raises:
        UserError: naming both numbers and the degrees that are possible.
    """
    expert, context, experts = (
        args.expert_model_parallel_size,
        args.context_parallel_size,
        model_config.text.num_experts,
    )
    if expert > 1 and not experts:
        raise UserError(f"expert_model_parallel_size {expert} needs experts, and this model has none; set it to 1")
    if expert > 1 and experts % expert:
        raise UserError(
            f"expert_model_parallel_size {expert} does not divide num_experts {experts}; "
            f"choose one of {_divisors(experts)}"
        )
    for kind, heads in (("text", model_config.text.num_heads), ("vision", model_config.vision.num_heads)):
        if heads % context:
            raise UserError(
                f"context_parallel_size {context} does not divide the {kind} attention heads {heads}; "
                f"choose one of {_divisors(heads)}"
            )
    key_heads = model_config.text.num_kv_heads
    if key_heads % context and context % key_heads:
        raise UserError(
            f"context_parallel_size {context} neither divides the {key_heads} key/value heads nor is a multiple of "
            f"them; choose one of {_divisors(key_heads)} or a multiple of {key_heads}"
        )


def join_expert_sizes(args: TrainingArgs, fsdp: FSDPConfig) -> TrainingArgs:
    """The flags, with ``expert_parallel_size`` of the FSDP2 file as ``--expert-model-parallel-size``.

    Raises:
        UserError: if both are given and differ.
    """
    size = fsdp.expert_parallel_size
    if size is None or size == args.expert_model_parallel_size:
        return args
    if "expert_model_parallel_size" in args.given:
        raise UserError(
            f"{args.fsdp2_config_path}: expert_parallel_size {size} contradicts --expert-model-parallel-size "
            f"{args.expert_model_parallel_size}; leave it out of the file"
        )
    return args.replace(expert_model_parallel_size=size)


def loss_mode(args: TrainingArgs, model: ModelOptions) -> LossMode:
    """Which mean of the token losses is minimised: by a flag, else ``loss_cfg.loss_type``, else ``default``.

    Raises:
        UserError: if both are given and differ.
    """
    flags: dict[LossMode, bool] = {
        "per_token": args.calculate_per_token_loss, "per_sample": args.calculate_per_sample_loss
    }
    by_flag = next((mode for mode, given in flags.items() if given), None)
    loss_type = model.loss_cfg.loss_type
    by_file = None if loss_type is None else cast("LossMode", loss_type.removesuffix("_loss"))
    if by_flag and by_file and by_flag != by_file:
        raise UserError(
            f"{args.mm_model}: loss_cfg.loss_type {loss_type} contradicts "
            f"{option_name(f'calculate_{by_flag}_loss')}; keep one of the two"
        )
    return by_flag or by_file or "default"


def router_aux_loss_coef(args: TrainingArgs, model: ModelOptions) -> float:
    """Coefficient of the routers' load-balancing loss: the flag's, else the model file's, else 0.

    The Hugging Face config's value of the same name, which the model was pretrained with, is not used.

    Raises:
        UserError: if both are given and differ.
    """
    by_flag, by_file = args.moe_aux_loss_coeff, model.loss_cfg.router_aux_loss_coef
    if by_flag is not None and by_file is not None and by_flag != by_file:
        raise UserError(
            f"{args.mm_model}: loss_cfg.router_aux_loss_coef {by_file} contradicts --moe-aux-loss-coeff {by_flag}; "
            "keep one of the two"
        )
    return next((value for value in (by_flag, by_file) if value is not None), 0.0)


def check_sharding(args: TrainingArgs, *, sharding_size: int | str, world_size: int) -> None:
    """Rules between the YAML's ``sharding_size`` and the numbers of processes.

    Raises:
        UserError: naming the values and those that are possible.
    """
    shard = world_size if sharding_size == "auto" else int(sharding_size)
    if world_size % shard:
        raise UserError(
            f"{args.fsdp2_config_path}: sharding_size {shard} does not divide the number of processes {world_size}; "
            f"choose auto or one of {_divisors(world_size)}"
        )
    expert = args.expert_model_parallel_size
    if shard % expert:
        raise UserError(
            f"expert_model_parallel_size {expert} does not divide the {shard} processes that share parameters "
            f"(sharding_size in {args.fsdp2_config_path}); choose one of {_divisors(shard)}"
        )


def check_model_config(model: ModelOptions, *, file: str, model_config: ModelConfigLike, source: str) -> None:
    """Compare every geometry field that the model file mentions with the Hugging Face config.

    Args:
        model: the model file's content.
        file: its name, for messages.
        geometry: the Hugging Face config's content.
        source: where that was read.

    Raises:
        UserError: naming both files, the field and both values.
    """
    vision, text = model_config.vision, model_config.text
    encoder, decoder = model.image_encoder.vision_encoder, model.text_decoder
    pairs = [
        ("model_id", model.model_id, "model_type", model_config.model_type),
        *(
            (f"image_encoder.vision_encoder.{name}", getattr(encoder, name), f"vision_config.{theirs}", value)
            for name, theirs, value in (
                ("num_layers", "depth", vision.depth),
                ("hidden_size", "hidden_size", vision.hidden_size),
                ("num_attention_heads", "num_heads", vision.num_heads),
            )
        ),
        *(
            (f"text_decoder.{name}", getattr(decoder, name), f"text_config.{theirs}", value)
            for name, theirs, value in (
                ("num_layers", "num_hidden_layers", text.num_layers),
                ("hidden_size", "hidden_size", text.hidden_size),
                ("num_attention_heads", "num_attention_heads", text.num_heads),
                ("max_position_embeddings", "max_position_embeddings", text.max_position_embeddings),
            )
        ),
    ]
    for path, ours, name, theirs in pairs:
        if ours is not None and ours != theirs:
            remedy = "use the model file of this model" if path == "model_id" else "correct it or leave it out"
            raise UserError(f"{file}: {path} {ours} contradicts {name} {theirs} in {source}; {remedy}")


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
