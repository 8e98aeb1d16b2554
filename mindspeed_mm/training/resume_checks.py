"""Whether a run can start from a checkpoint, by the files that describe it. Imports no torch: also checked before any
rank is started.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.contents import check_adapters, check_base_contents, check_contents, check_model_config
from mindspeed_mm.checkpoint.directory import RELEASE, checkpoint_to_load
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX, read_entries
from mindspeed_mm.checkpoint.partial import check_expert_layout, find_base
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.config.flags import OptimizerArgs, TrainingArgs, option_name
from mindspeed_mm.config.job import JobConfig
from mindspeed_mm.config.schema import EFFECTIVE, walk
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten, shown
from mindspeed_mm.models.lora import LoraOptions, is_adapter
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout
from mindspeed_mm.models.parameter_rules import ParameterSettings, Settings
from mindspeed_mm.models.spec import ModelConfig, ModelSpec

_OF_STYLE = {  # fields of the schedule that only one decay style has
    "WSD": ("wsd_decay_steps", "lr_wsd_decay_style"), "polynomial": ("lr_decay_power",),
    "cosine-with-restarts": ("lr_num_cycles",),
}
_LENGTHS = ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps")  # in samples
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_COMPARED_FLAGS = (
    *(name for name in OptimizerArgs.model_fields if name != "override_opt_param_scheduler"),
    "micro_batch_size", "global_batch_size", "seq_length", "frozen_param_dtype",
)
# Fields of the files that decide where something is, or how and where it is computed, but not what; that repeat what
# config.json says; or that are another name of one
_NOT_COMPARED = frozenset(
    """dataset dataset_dir cache_dir overwrite_cache preprocessing_batch_size preprocessing_num_workers streaming
    preprocess_on_fly val_dataset val_max_samples pin_memory model_name_or_path init_from_hf_path attn_implementation
    use_npu_fused_moe synchronize_per_layer activation_offload chunk_size compute_mode sharding_size
    reshard_after_forward num_to_forward_prefetch num_to_backward_prefetch offload_to_cpu align_fsdp_param_groups
    expert_parallel_size sampler_type dataloader_mode neat_packing num_layers hidden_size num_attention_heads
    max_position_embeddings model_id""".split()
)
_SCHEDULE_FLAGS = {  # fields of Megatron's schedule -> what sets them
    "max_lr": "--lr", "min_lr": "--min-lr", "lr_warmup_steps": "warm-up (--lr-warmup-fraction, --lr-warmup-iters)",
    "lr_decay_steps": "decay (--train-iters, --lr-decay-iters, --lr-decay-fraction)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay", "end_wd": "--weight-decay", "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "growth of the weight decay (--train-iters)", "wsd_decay_steps": "--lr-wsd-decay-iters",
    "lr_wsd_decay_style": "--lr-wsd-decay-style", "lr_decay_power": "--lr-decay-power",
    "lr_num_cycles": "--lr-num-cycles",
}
_GROWING_FLAGS = {"start_wd": "--start-weight-decay", "end_wd": "--end-weight-decay"}
_DATASET = "dataset_param.basic_parameters.dataset"
_MOST_NAMED = 8
_ABSENT = object()


def check_start(
    args: TrainingArgs, spec: ModelSpec, model_config: ModelConfig, settings: Settings, *, model_directory: str
) -> None:
    """Refuse what the ranks would refuse of ``--load``, as far as its small files tell.

    Args:
        args: the flags; ``--load`` is given.
        spec: of the model.
        model_config: of the model.
        settings: of its parameters.
        model_directory: of its ``config.json``.

    Raises:
        UserError: if the checkpoint is incomplete or of another model, or the run cannot continue from it.
    """
    plain = args.check_load == "none"
    path, manifest = checkpoint_to_load(args.load, plain=plain)
    check_expert_layout(args.expert_layout, manifest, path)
    base = find_base(manifest, path, moved_to=args.load_base, option="--load-base")
    stored = read_entries(path, manifest)
    adapters = {MODEL_PREFIX + name for name in settings if is_adapter(name)}
    options = LoraOptions.from_args(args)
    recorded = None if options is None else options.recorded()
    if check_adapters(path, manifest, adapters, stored, lora=recorded, new_stage=args.finetune):
        if args.load == args.load_base_model:
            raise UserError(f"--load-base-model {args.load} holds LoRA adapters, not a base; name it by --load")
        if args.lora_init_from is not None:
            raise UserError(
                f"--lora-init-from {args.lora_init_from} would replace the adapters that {path} holds; leave it out"
            )
    else:
        settings = {name: setting for name, setting in settings.items() if not is_adapter(name)}
    parameters = {MODEL_PREFIX + name: (s.shape, _DTYPES[s.dtype]) for name, s in settings.items()}
    trained = {MODEL_PREFIX + name for name, setting in settings.items() if setting.trainable}
    optimizer = None if args.finetune or args.no_load_optim else OptimizerStateLayout.of(args, settings)
    check_contents(path, manifest, stored, parameters, trained=trained, optimizer=optimizer)
    check_model_config(path, manifest, model_config, source=Path(model_directory, "config.json"))
    progress = Progress.read(path, None if plain else manifest)
    if base is not None and base.kind == "checkpoint":
        check_base_contents(base, parameters.keys() - stored.keys(), parameters, trained=trained)
    if not args.finetune and args.train_iters is not None:  # with --train-epochs the ranks check, who know the data
        check_steps_remain(progress, args)
        check_schedule(args, progress, {**schedule_settings(args), "lr_scales": lr_scales(settings)})
    if args.save_trainable_only:
        check_base_is_kept(args, path if base is None else Path(base.path))


def changed_settings_warning(job: JobConfig, defaults: Mapping[str, Any]) -> str | None:
    """A line with the settings that are not those under which the checkpoint of ``--load`` was written, else None.

    Only settings that change what is learned, of a run that continues, and as far as the checkpoint records them.

    Args:
        job: the run.
        defaults: what null means in fields of the files whose default is the model family's.
    """
    if job.args.load is None or job.args.finetune:
        return None
    path, manifest = checkpoint_to_load(job.args.load, plain=job.args.check_load == "none")
    saved = manifest["metadata"]
    if not Progress.is_training(path) or not isinstance(saved.get("flags"), dict):
        return None
    changed = []
    # without this flag the length of the schedule is compared by check_schedule
    for name in (*_COMPARED_FLAGS, *["train_iters"] * job.args.override_opt_param_scheduler):
        now = getattr(job.args, name)
        before = saved["flags"].get(option_name(name), TrainingArgs.model_fields[name].default)
        if before != now and not (name == "global_batch_size" and before is None):
            changed.append(f"{option_name(name)} was {shorten(before, 40)} and is {now}")
    files = (("data", job.args.mm_data, job.data), ("model", job.args.mm_model, job.model),
             ("fsdp2", job.args.fsdp2_config_path, job.fsdp))
    for key, file, config in files:
        fields = config.model_dump(mode="json")
        for use in walk(config):
            *_, name = use.path.split(".")
            if use.role == EFFECTIVE and name not in _NOT_COMPARED:
                before, now = (
                    defaults.get(name) if value is None else value
                    for value in (_field(saved.get(key), use.path), _field(fields, use.path))
                )
                if before is not _ABSENT and before != now:
                    changed.append(f"{name} in {file} was {shown(before)} and is {shown(now)}")
    changed += _changed_mixture(_field(saved.get("data"), _DATASET), _field(job.data.model_dump(mode="json"), _DATASET))
    if not changed:
        return None
    more = f"; and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    return f"resuming {path} with changed settings: {'; '.join(changed[:_MOST_NAMED])}{more}"


def _changed_mixture(before: Any, now: Any) -> list[str]:
    """What has changed in the shares of the data sets of a mixture; the names of files without one may change."""
    former, current = ({} if not isinstance(entries, dict) else entries for entries in (before, now))
    if before is _ABSENT or not (former or current):
        return []
    changed = [f"data set {name} was left out" for name in former if name not in current]
    for name, entry in current.items():
        if not isinstance(former.get(name), dict):
            changed.append(f"data set {name} is new")
            continue
        changed += [
            f"{field} of data set {name} was {shown(former[name].get(field))} and is {shown(entry[field])}"
            for field in ("weight", "repeat", "max_samples", "formatting") if former[name].get(field) != entry[field]
        ]
    return changed


def _field(content: Any, path: str) -> Any:
    """The value at a dotted path in nested objects; ``_ABSENT`` where there is none."""
    for name in path.split("."):
        if not isinstance(content, dict) or name not in content:
            return _ABSENT
        content = content[name]
    return content


def check_base_is_kept(args: TrainingArgs, base: Path) -> None:
    """Refuse ``--keep-last`` where it would delete the base of the run's partial checkpoints.

    Raises:
        UserError: if the base is a training checkpoint in ``--save``.
    """
    base = base.resolve()
    deletable = args.save is not None and base.parent == Path(args.save).resolve() and base.name != RELEASE
    if args.keep_last is not None and deletable:
        raise UserError(
            f"--keep-last {args.keep_last} would delete {base}, the base of this run's checkpoints; save to "
            "another directory, or leave --keep-last out"
        )


def check_steps_remain(progress: Progress, args: TrainingArgs) -> None:
    """Refuse a run that has no steps left, which would report success without training.

    A restart by torchrun after the last save is accepted: the run has trained, and ends.

    Raises:
        UserError: if the checkpoint's iteration is not below ``--train-iters``.
    """
    if progress.iteration >= args.train_iters and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raise UserError(
            f"nothing to train: {args.load} has done iteration {progress.iteration}, and --train-iters is "
            f"{args.train_iters}; raise it and add --override-opt-param-scheduler, or start a new stage "
            "from these weights with --finetune"
        )


def schedule_settings(args: TrainingArgs) -> dict[str, Any]:
    """What the flags make of Megatron's learning-rate schedule, counted in samples, by the names of its state."""
    assert args.global_batch_size is not None, "load_job_config fills it in"
    start_wd, end_wd = args.weight_decay_range
    of_style = {
        "wsd_decay_steps": (args.lr_wsd_decay_iters or 0) * args.global_batch_size,
        "lr_wsd_decay_style": args.lr_wsd_decay_style,
        "lr_decay_power": args.lr_decay_power,
        "lr_num_cycles": args.lr_num_cycles,
    }
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": args.warmup_samples,
        "lr_decay_steps": args.decay_samples,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": start_wd,
        "end_wd": end_wd,
        "wd_incr_steps": args.train_iters * args.global_batch_size,
        "wd_incr_style": args.weight_decay_incr_style,
        **{name: of_style[name] for name in _OF_STYLE.get(args.lr_decay_style, ())},
    }


def names_of_scales(settings: Iterable[ParameterSettings]) -> dict[float, str]:
    """Learning-rate scale -> the parts of the model that have it, and the scale too where a part has several."""
    parts: dict[float, dict[str, None]] = defaultdict(dict)
    for setting in settings:
        parts[setting.lr_scale][setting.part] = None
    names = {scale: "+".join(of_scale) for scale, of_scale in parts.items()}
    several = {name for name, count in Counter(names.values()).items() if count > 1}
    return {scale: f"{name}*{scale:g}" if name in several else name for scale, name in names.items()}


def lr_scales(settings: Settings) -> dict[str, float]:
    """``lr_scales`` of the schedule's state: group -> factor on its learning rate, unless that is 1."""
    names = names_of_scales(setting for setting in settings.values() if setting.trainable)
    return {name: scale for scale, name in names.items() if scale != 1.0}


def _without_order(scales: Any) -> Any:
    """``lr_scales`` by groups whose parts have no order, which is the model's or the weight map's."""
    if not isinstance(scales, Mapping):
        return scales
    names = {name: name.partition("*") for name in scales}
    return {(*sorted(parts.split("+")), factor): scales[name] for name, (parts, _, factor) in names.items()}


def check_schedule(args: TrainingArgs, progress: Progress, current: Mapping[str, Any]) -> None:
    """Refuse another learning-rate schedule than the checkpoint's, unless ``--override-opt-param-scheduler`` is given.

    Args:
        args: the flags.
        progress: of the checkpoint.
        current: the new state of the schedule; what it lacks is not compared.

    Raises:
        UserError: naming what differs.
    """
    saved = {"lr_scales": {}, **(progress.schedule or {})}
    differing = [
        _in_flags(key, value, current[key], args)
        for key, value in saved.items()
        if progress.schedule and key in current and key not in _not_compared(current)
        and (current[key] != value if key != "lr_scales" else _without_order(current[key]) != _without_order(value))
    ]
    if differing and not args.override_opt_param_scheduler:
        if batch := _former_batch_size(args, saved, current):
            raise UserError(
                f"the global batch size was {batch} samples in {args.load} and is {args.global_batch_size}, and the "
                "learning-rate schedule counts samples; pass the first run's --global-batch-size, or "
                "--override-opt-param-scheduler to continue under the new schedule"
            )
        changes = "; ".join(dict.fromkeys(differing))
        raise UserError(
            f"the learning-rate schedule of {args.load} differs from the flags' ({changes}); "
            "pass the first run's, or --override-opt-param-scheduler to continue under the new schedule"
        )


def _not_compared(current: Mapping[str, Any]) -> tuple[str, ...]:
    """The position, and the length over which a constant weight decay would grow."""
    return ("num_steps", "wd_incr_steps") if current.get("wd_incr_style") == "constant" else ("num_steps",)


def _in_flags(key: str, before: Any, now: Any, args: TrainingArgs) -> str:
    """A field of the schedule's state that has changed, by the flags that set it, and in steps instead of samples."""
    growing = _GROWING_FLAGS if args.weight_decay_incr_style != "constant" else {}
    flag = growing.get(key) or _SCHEDULE_FLAGS.get(key, key)
    if key in _LENGTHS and isinstance(before, (int, float)) and args.global_batch_size:
        return f"{flag} {before / args.global_batch_size:g} became {now / args.global_batch_size:g} steps"
    return f"{flag} {before!r} became {now!r}"


def _former_batch_size(args: TrainingArgs, saved: Mapping[str, Any], current: Mapping[str, Any]) -> int | None:
    """The checkpoint's global batch size, if the schedule differs by nothing else."""
    lengths = [name for name in _LENGTHS if name in current]
    try:
        batch = saved["wd_incr_steps"] / args.train_iters
        scaled = all(math.isclose(saved[name] * args.global_batch_size, current[name] * batch) for name in lengths)
        same = all(saved[name] == current[name] for name in saved.keys() & current.keys()
                   if name not in (*lengths, "lr_scales", "num_steps"))
    except (KeyError, TypeError):  # the checkpoint's schedule has other fields
        return None
    return int(batch) if batch == int(batch) != args.global_batch_size and scaled and same else None
