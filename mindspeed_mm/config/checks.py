"""Rules among options, and between options, the model and the number of ranks. Other packages assert, not check."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.flags import LoraArgs, OptimizerArgs, TrainingArgs, option_name
from mindspeed_mm.config.fsdp_config import FSDPConfig
from mindspeed_mm.config.model_options import LossMode, ModelOptions
from mindspeed_mm.config.schema import EFFECTIVE, nearest, role_of, split_words
from mindspeed_mm.errors import UserError

METRICS = ("validation_loss", "validation_token_accuracy", "validation_exact_match")
"""Metrics of evaluations, by which checkpoints can be compared."""
_OF_DECAY_STYLE = {
    "lr_wsd_decay_iters": "WSD", "lr_wsd_decay_style": "WSD", "lr_decay_power": "polynomial",
    "lr_num_cycles": "cosine-with-restarts",
}


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the rules read of a model. Its :class:`~mindspeed_mm.models.spec.ModelSpec` fills this in.

    Attributes:
        model_type: as in ``config.json``.
        attention_heads: name of a stack of layers, such as ``text`` -> (query heads, key/value heads).
        num_experts: routed experts of a sparse layer; 0 without any.
        expert_widths: name in ``config.json`` -> width of the axes of an expert's matrices that FSDP2 may cut.
        options: dotted path in the model file -> (name in ``config.json``, value there), for each option of the model
            file that repeats what ``config.json`` says.
    """

    model_type: str
    attention_heads: Mapping[str, tuple[int, int]]
    num_experts: int = 0
    expert_widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)


def check_flags(args: TrainingArgs) -> None:
    """Rules among flags alone.

    Raises:
        UserError: naming the flags and values that do not go together.
    """
    if not args.use_torch_fsdp2:
        raise UserError("--use-torch-fsdp2 is missing: sharding and compute types are FSDP2's; add it")
    if args.train_epochs is not None and "train_iters" in args.given:
        raise UserError(
            f"--train-iters {args.train_iters} and --train-epochs {args.train_epochs:g} exclude each other; keep one"
        )
    check_schedule_flags(args)
    if args.calculate_per_token_loss and args.calculate_per_sample_loss:
        raise UserError("--calculate-per-token-loss and --calculate-per-sample-loss exclude each other; keep one")
    for name in ("recompute_method", "recompute_num_layers"):
        if name in args.given and args.recompute_granularity != "full":
            raise UserError(
                f"{option_name(name)} {getattr(args, name)} belongs to --recompute-granularity full; "
                f"add that, or leave {option_name(name)} out"
            )
    if args.exit_on_hang and not args.hang_watch_factor:
        raise UserError("--exit-on-hang needs the watchdog that --hang-watch-factor 0 switches off; drop one of them")
    if args.random_init and args.load is not None:
        raise UserError(f"--random-init and --load {args.load} exclude each other; keep one")
    if args.random_init and args.save_trainable_only:
        raise UserError("--save-trainable-only needs loaded weights as a base, which --random-init skips; drop one")
    if args.load_base is not None and args.load is None:
        raise UserError(f"--load-base {args.load_base} is the base of what --load names; add --load DIR")
    if args.finetune and args.load is None:
        raise UserError("--finetune starts from the weights that --load names; add --load DIR, or leave --finetune out "
                        "to start from init_from_hf_path of the model file")
    for name in ("save_trainable_only", "async_save", "keep_last", "keep_every", "keep_best", "save_hf_interval",
                 "save_hf_at_end"):
        if getattr(args, name) and args.save is None:
            raise UserError(f"{option_name(name)} has no effect without --save; add --save DIR")
    if args.keep_every is not None and args.keep_last is None:
        raise UserError(f"--keep-every {args.keep_every} has no effect without --keep-last; add --keep-last N")
    if args.save_hf_interval is not None and args.save_interval and args.save_hf_interval % args.save_interval:
        raise UserError(
            f"--save-hf-interval {args.save_hf_interval} must be a multiple of --save-interval {args.save_interval}: "
            "checkpoints are exported"
        )
    if args.save_hf_interval is not None and args.save_hf_at_end:
        raise UserError(f"--save-hf-interval {args.save_hf_interval} exports the last step too; leave --save-hf-at-end "
                        "out, or the former to export the last step alone")
    if args.save_hf_dtype != "auto" and args.save_hf_interval is None and not args.save_hf_at_end:
        raise UserError(f"--save-hf-dtype {args.save_hf_dtype} has no effect without an export; add --save-hf-interval "
                        "STEPS or --save-hf-at-end")
    if args.save_interval is not None and args.save is None and "save_interval" in args.given:
        raise UserError(f"--save-interval {args.save_interval} has nowhere to save to; add --save DIR")


def check_evaluation(args: TrainingArgs, data: DataConfig) -> None:
    """Rules of the flags that compare evaluations.

    Raises:
        UserError: if there is nothing to compare, or no such metric.
    """
    deciding = [name for name in ("keep_best", "early_stopping_patience") if getattr(args, name)]
    if not deciding:
        for name in ("metric_for_best", "early_stopping_threshold"):
            if name in args.given and getattr(args, name) != type(args).model_fields[name].default:
                raise UserError(f"{option_name(name)} {getattr(args, name)} has no effect without --keep-best or "
                                "--early-stopping-patience; add one, or leave it out")
        return
    metric, slash, name = args.metric_for_best.partition("/")
    if metric not in METRICS or (slash and not name):
        named = f"validation_{metric}"
        guess = named if named in METRICS else nearest(metric, list(METRICS))
        remedy = f"did you mean {guess}{slash}{name}?" if guess else f"choose {', '.join(METRICS)}, or <metric>/<name>"
        raise UserError(f"--metric-for-best {args.metric_for_best} is no metric of evaluations; {remedy}")
    names = [one.name for one in data.val_datasets or data.train_datasets if one.name]
    if name and names and not any(f"{name}/".startswith(f"{one}/") for one in names):
        guess = nearest(name, names)
        remedy = f"did you mean {metric}/{guess}?" if guess else f"choose {', '.join(names)}, or <data set>/<channel>"
        raise UserError(f"--metric-for-best {args.metric_for_best}: {name} is no data set of evaluations; {remedy}")
    if args.early_stopping_threshold and not args.early_stopping_patience:
        raise UserError(f"--early-stopping-threshold {args.early_stopping_threshold} has no effect without "
                        "--early-stopping-patience; add it, or leave the threshold out")
    basic, flag = data.dataset_param.basic_parameters, option_name(deciding[0])
    if not (basic.val_dataset or basic.val_rate):
        raise UserError(f"{flag} {getattr(args, deciding[0])} needs held-out data; set val_dataset or val_rate in "
                        f"{args.mm_data}, or leave it out")
    if not args.eval_iters:
        raise UserError(f"{flag} {getattr(args, deciding[0])} needs evaluations, which --eval-iters 0 switches off; "
                        "drop one of them")


def check_schedule_flags(args: TrainingArgs) -> None:
    """Rules among the flags of learning rate and weight decay.

    Raises:
        UserError: naming the flags and values that do not go together.
    """
    if args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} exceeds --lr {args.lr}; lower it")
    if args.lr_warmup_init > args.lr:
        raise UserError(f"--lr-warmup-init {args.lr_warmup_init} exceeds --lr {args.lr}; lower it")
    if args.lr_warmup_fraction and args.lr_warmup_iters:
        raise UserError("--lr-warmup-fraction and --lr-warmup-iters exclude each other; keep one")
    if args.lr_decay_iters is not None and args.lr_decay_fraction is not None:
        raise UserError("--lr-decay-iters and --lr-decay-fraction exclude each other; keep one")
    decay_iters = args.decay_iters
    if decay_iters is not None and args.lr_warmup_iters >= decay_iters:  # None: checked when the data set is known
        raise UserError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be less than the {decay_iters} steps of the decay "
            "(--lr-decay-iters, --lr-decay-fraction, --train-iters, or --train-epochs)"
        )
    for name, style in _OF_DECAY_STYLE.items():
        if name in args.given and args.lr_decay_style != style:
            raise UserError(
                f"{option_name(name)} {getattr(args, name)} has no effect with --lr-decay-style {args.lr_decay_style}; "
                f"leave it out, or set --lr-decay-style {style}"
            )
    if args.lr_decay_style == "inverse-square-root" and not (args.lr_warmup_fraction or args.lr_warmup_iters):
        raise UserError("--lr-decay-style inverse-square-root decays with the length of the warm-up; add "
                        "--lr-warmup-iters or --lr-warmup-fraction")
    if args.lr_decay_style == "WSD":
        _check_wsd(args, decay_iters)
    _check_weight_decay(args)


def _check_wsd(args: TrainingArgs, decay_iters: int | None) -> None:
    """Warm-up and decay of WSD must fit into ``decay_iters``, the length of the schedule; None: not yet known."""
    if args.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters, the steps of the decay at its end; add it")
    if decay_iters is None:
        return
    warmup = args.lr_warmup_iters or math.ceil((args.lr_warmup_fraction or 0) * decay_iters)
    if warmup + args.lr_wsd_decay_iters > decay_iters:
        before = f" and the {warmup} steps of the warm-up exceed" if warmup else " exceeds"
        raise UserError(
            f"--lr-wsd-decay-iters {args.lr_wsd_decay_iters}{before} the {decay_iters} steps of the schedule "
            "(--lr-decay-iters, --lr-decay-fraction, --train-iters, or --train-epochs); lower --lr-wsd-decay-iters"
        )


def _check_weight_decay(args: TrainingArgs) -> None:
    """The flags of a growing weight decay belong together."""
    start, end, style = args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style
    for flag, value in (("--start-weight-decay", start), ("--end-weight-decay", end)):
        if style == "constant" and value is not None:
            raise UserError(f"{flag} {value} has no effect with --weight-decay-incr-style constant; leave it out, or "
                            "set --weight-decay-incr-style linear or cosine")
        if style != "constant" and value is None:
            raise UserError(f"--weight-decay-incr-style {style} needs {flag}; add it")
    if start is not None and end is not None and start > end:
        raise UserError(f"--start-weight-decay {start} exceeds --end-weight-decay {end}, and weight decay can only "
                        "grow; lower it")


def with_train_iters(args: TrainingArgs, *, samples_per_epoch: int) -> TrainingArgs:
    """The flags with ``--train-epochs`` as ``--train-iters``.

    Raises:
        UserError: if the warm-up does not end within the run.
    """
    assert args.train_epochs is not None and args.global_batch_size is not None, "load_job_config fills it in"
    samples = Fraction(str(args.train_epochs)) * samples_per_epoch  # exact: 0.1 of 30 samples are 3
    args = args.replace(train_iters=math.ceil(samples / args.global_batch_size))
    check_flags(args)
    return args


def check_frozen_dtype(args: TrainingArgs, fsdp: FSDPConfig) -> None:
    """Frozen parameters may be kept in the compute type only: in a narrower one they would compute something else.

    Raises:
        UserError: naming both values.
    """
    if args.frozen_param_dtype == "bf16" and fsdp.param_dtype != "bf16":
        raise UserError(
            f"--frozen-param-dtype bf16 would change the results with param_dtype {fsdp.param_dtype} in "
            f"{args.fsdp2_config_path}; set that to bf16, or leave the flag out"
        )


def check_muon(args: TrainingArgs, fsdp: FSDPConfig) -> None:
    """Rules between Muon and other options.

    Raises:
        UserError: naming both.
    """
    given = [name for name in OptimizerArgs.model_fields if name.startswith("muon_") and name in args.given]
    if given and not args.muon:
        raise UserError(
            f"{option_name(given[0])} has no effect without --optimizer-selection muon; add that, or leave it out"
        )
    if args.muon and args.lora:
        raise UserError(
            "--optimizer-selection muon does not go with LoRA: it orthogonalizes updates of weights, which the two "
            "factors of an adapter are not; use fused_torch_adamw"
        )
    if args.muon and args.moment_dtype != "fp32":
        raise UserError(
            f"--moment-dtype {args.moment_dtype} is of AdamW's moments, and Muon's momentum is fp32; leave it out, or "
            "use --optimizer-selection fused_torch_adamw"
        )
    if args.muon and fsdp.offload_to_cpu:
        raise UserError(
            f"{args.fsdp2_config_path}: offload_to_cpu true would orthogonalize Muon's updates on the host, which "
            "takes far longer than a step; set it to false, or use --optimizer-selection fused_torch_adamw"
        )


def check_parallel(args: TrainingArgs, fsdp: FSDPConfig, *, world_size: int) -> int:
    """Rules between the number of ranks, the FSDP2 file and the batch.

    Expert and context parallelism are left to :func:`check_model`, which knows all the numbers that they must divide.

    Args:
        args: the flags, after :func:`check_flags` and :func:`join_expert_sizes`.
        fsdp: the FSDP2 file.
        world_size: number of ranks.

    Returns:
        The global batch size in samples: the flag's, else one micro-batch per data-parallel rank.

    Raises:
        UserError: naming the values and the nearest ones that are possible.
    """
    shard, context = shard_size(fsdp, world_size), args.context_parallel_size
    if world_size % shard:
        raise UserError(
            f"{args.fsdp2_config_path}: sharding_size {shard} does not divide the number of ranks {world_size}; "
            f"set it to auto, or {_choice(_divisors(world_size))}"
        )
    data_parallel_size = world_size // context
    if world_size % context:  # check_model refuses it
        return args.global_batch_size or args.micro_batch_size
    samples_at_once = args.micro_batch_size * data_parallel_size
    global_batch_size = samples_at_once if args.global_batch_size is None else args.global_batch_size
    if global_batch_size % samples_at_once:
        below = global_batch_size // samples_at_once * samples_at_once
        options = " or ".join(str(size) for size in (below, below + samples_at_once) if size)
        raise UserError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {args.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {samples_at_once}; choose {options}"
        )
    return global_batch_size


def check_model(
    args: TrainingArgs, fsdp: FSDPConfig, model: ModelOptions, facts: ModelFacts, *, world_size: int
) -> None:
    """Rules between the options and the model.

    Raises:
        UserError: if the model file contradicts ``config.json``, or a parallel degree or the loss does not fit the
            model or the number of ranks; with both values and those that meet all rules.
    """
    _check_model_file(args, model, facts)
    expert, context = args.expert_model_parallel_size, args.context_parallel_size
    file = args.fsdp2_config_path
    if problem := _expert_size_problem(expert, fsdp, facts, world_size=world_size, file=str(file)):
        sizes = expert_parallel_sizes(fsdp, facts, world_size=world_size)
        raise UserError(f"expert_model_parallel_size {expert} {problem}; {_choice(sizes)}")
    if problem := _context_size_problem(context, facts, world_size=world_size):
        sizes = context_parallel_sizes(facts, world_size=world_size)
        raise UserError(f"context_parallel_size {context} {problem}; {_choice(sizes)}")
    coefficient = router_aux_loss_coef(args, model)
    if coefficient and not facts.num_experts:
        raise UserError(
            f"router_aux_loss_coef {coefficient} needs routers, and this model has none; "
            "leave it and --moe-aux-loss-coeff out"
        )


def expert_parallel_sizes(fsdp: FSDPConfig, facts: ModelFacts, *, world_size: int) -> list[int]:
    """Values of ``--expert-model-parallel-size`` that :func:`check_model` accepts, ascending."""
    sizes = _divisors(shard_size(fsdp, world_size))
    return [size for size in sizes if not _expert_size_problem(size, fsdp, facts, world_size=world_size)]


def context_parallel_sizes(facts: ModelFacts, *, world_size: int) -> list[int]:
    """Values of ``--context-parallel-size`` that :func:`check_model` accepts, ascending."""
    return [size for size in _divisors(world_size) if not _context_size_problem(size, facts, world_size=world_size)]


def _expert_size_problem(
    size: int, fsdp: FSDPConfig, facts: ModelFacts, *, world_size: int, file: str = ""
) -> str | None:
    """Why experts cannot be sharded over ``size`` ranks, or None."""
    if size == 1:
        return None
    if not facts.num_experts:
        return "needs experts, and this model has none"
    shard = shard_size(fsdp, world_size)
    for number, what in (
        (world_size, "the number of ranks"), (shard, f"sharding_size of {file},"), (facts.num_experts, "num_experts")
    ):
        if number % size:
            return f"does not divide {what} {number}"
    parts = shard // size
    for name, width in facts.expert_widths.items():
        if width % parts:
            return f"would cut each expert into {parts} parts, which do not divide {name} {width}"
    return None


def _context_size_problem(size: int, facts: ModelFacts, *, world_size: int) -> str | None:
    """Why ``size`` ranks cannot share a micro-batch, or None."""
    if world_size % size:
        return f"does not divide the number of ranks {world_size}"
    for stack, (heads, key_heads) in facts.attention_heads.items():
        if heads % size:
            return f"does not divide the {stack} attention heads {heads}"
        if key_heads % size and size % key_heads:
            return f"neither divides the {key_heads} key/value heads nor is a multiple of them"
    return None


def shard_size(fsdp: FSDPConfig, world_size: int) -> int:
    """Ranks that share one copy of the parameters."""
    return world_size if fsdp.sharding_size == "auto" else int(fsdp.sharding_size)


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


def join_recompute(args: TrainingArgs, model: ModelOptions, fsdp: FSDPConfig) -> TrainingArgs:
    """The flags, with what model and FSDP2 file say of recomputation as ``--recompute-granularity``.

    Raises:
        UserError: if two of them differ.
    """
    said: dict[str, str | None] = {
        **{f"{args.mm_model}: {path}": value for path, value in model.recompute_granularity.items()},
        f"{args.fsdp2_config_path}: recompute_modules, which means": "full" if fsdp.recompute_modules else None,
    }
    if "recompute_granularity" in args.given:
        said["--recompute-granularity"] = args.recompute_granularity
    given = {place: value for place, value in said.items() if value is not None}
    if len({*given.values()}) > 1:
        (place, value), *_, (other, theirs) = given.items()
        raise UserError(f"{place} {value} contradicts {other} {theirs}; give both the same value, or leave one out")
    return args.replace(recompute_granularity=next(iter(given.values()), None))


def resolve_lora(args: TrainingArgs, model: ModelOptions, fsdp: FSDPConfig) -> TrainingArgs:
    """The flags with ``lora_args`` of the model file, and with what LoRA implies for others.

    The frozen base is kept in the compute type, which computes the same to the bit; checkpoints hold what trains; and
    ``--load-base-model`` is ``--load``, weights alone, or where that is given ``--load-base``.

    Raises:
        UserError: if flags and file differ, or flags do not go together.
    """
    of_file = {name: getattr(model.lora_args, name) for name in model.lora_args.model_fields_set}
    for name, value in of_file.items():
        if name in args.given and getattr(args, name) != value:
            raise UserError(
                f"{args.mm_model}: lora_args.{name} {value} contradicts {option_name(name)} {getattr(args, name)}; "
                "keep one of the two"
            )
    args = args.replace(**of_file)
    lora = {name: getattr(args, name) for name in (*LoraArgs.model_fields, "load_base_model")}
    given = [name for name in lora if name in args.given or name in of_file]
    if not args.lora:
        effective = [name for name in given if role_of(TrainingArgs.model_fields[name]) == EFFECTIVE]
        if effective:
            raise UserError(
                f"{option_name(effective[0])} has no effect without LoRA; add --lora-target-modules, for example "
                "all, or leave it out"
            )
        return args
    if not split_words(args.lora_target_modules) + split_words(args.lora_target_parameters):
        raise UserError(f"{args.mm_model}: lora_args.lora_target_modules is empty; name what to adapt, for example all")
    if args.lora_mixed_training != (args.lora_apply_modules is not None):
        raise UserError("--lora-mixed-training and --lora-apply-modules belong together; add the other, or drop both")
    if args.load_base_model is not None and args.load_base is not None:
        raise UserError("--load-base-model and --load-base name the same directory; keep one")
    if args.random_init and args.load_base_model is not None:
        raise UserError(f"--random-init and --load-base-model {args.load_base_model} exclude each other; keep one")
    if args.random_init and args.save is not None:
        raise UserError("--random-init has no base that checkpoints of adapters could name; leave out --save or it")
    implied: dict[str, Any] = {"save_trainable_only": args.save is not None}
    if args.load_base_model is not None:
        implied |= {"load_base": args.load_base_model} if args.load is not None else {
            "load": args.load_base_model, "finetune": True
        }
    if "frozen_param_dtype" not in args.given:
        implied["frozen_param_dtype"] = fsdp.param_dtype
    return args.replace(**implied)


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


def _check_model_file(args: TrainingArgs, model: ModelOptions, facts: ModelFacts) -> None:
    source = Path(model.init_from_hf_path) / "config.json"
    if model.model_id != facts.model_type:
        raise UserError(
            f"{args.mm_model}: model_id {model.model_id} contradicts model_type {facts.model_type} in {source}; "
            "use the model file of this model"
        )
    for path, (name, theirs) in facts.options.items():
        ours = functools.reduce(getattr, path.split("."), model)
        if ours is not None and ours != theirs:
            raise UserError(
                f"{args.mm_model}: {path} {ours} contradicts {name} {theirs} in {source}; correct it or leave it out"
            )


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _choice(sizes: list[int]) -> str:
    return f"choose one of {', '.join(str(size) for size in sizes)}" if len(sizes) > 1 else f"set it to {sizes[0]}"
