"""Keys of MindSpeed-MM's "v1" recipe whose values mean something else here, or that depend on other keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mindspeed_mm.config.data_config import DatasetParam
from mindspeed_mm.config.schema import nested_model
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shown

TRANSLATED = {
    "data.val_dataset_param": "data.dataset_param.basic_parameters.val_dataset",
    "training.lr_decay_ratio": "gpt_args.lr_decay_fraction",
    "training.lr_scaling_plan": "model.lr_scaling_plan",
    "training.no_decay_params": "model.weight_decay_scaling_plan",
    "training.no_decay_modules": "model.weight_decay_scaling_plan",
    "training.lora.enable": "lora_args",
    "training.save_format": "gpt_args.save_hf_interval",
}
"""Key of the file -> key of this project that holds what it becomes."""
OPTIMIZERS = {"adamw": "fused_torch_adamw", "muon": "muon"}
_OF_MUON = ("training.muon_momentum", "training.ns_steps", "training.matched_adamw_rms")
_TRAINING_DATA, _VALIDATION_DATA = "data.dataset_param", "data.val_dataset_param"
_BASIC = f"{_TRAINING_DATA}.basic_parameters"
_OF_TRAINING = re.compile(r"basic_parameters\.(cache_dir|overwrite_cache|preprocessing_\w+)")
_LORA_TARGETS = ("training.lora.target_modules", "lora_args.lora_target_modules", "lora_args.lora_target_parameters")
_ALL_BATCHES = 1_000_000
_LEFT_OUT = object()


def translate_values(leaves: dict[str, Any], source: str) -> tuple[dict[str, str], list[str]]:
    """Replace the keys in ``leaves`` whose value takes more than another name.

    Args:
        leaves: dotted path -> value, of the file; changed in place. New keys are this project's.
        source: names the file in messages.

    Returns:
        The key here of each key that has moved -> its key in the file; and a sentence for each without effect.

    Raises:
        UserError: for a value that cannot act here.
    """
    moved: dict[str, str] = {}
    ignored: list[str] = []
    for translate in (
        _lora, _save_format, _optimizer, _quantization, _decay_ratio, _learning_rates, _weight_decay, _evaluation
    ):
        translate(leaves, source, moved, ignored)
    return moved, ignored


def leaves_of(content: Mapping[str, Any], whole: frozenset[str] = frozenset(), prefix: str = "") -> Iterator[
    tuple[str, Any]
]:
    """Dotted path and value of all that is in nested objects, but for the objects in ``whole``."""
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in whole:
            yield from leaves_of(value, whole, f"{path}.")
        else:
            yield path, value


def _lora(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    enabled = leaves.pop("training.lora.enable", False)
    if not isinstance(enabled, bool):
        raise UserError(f"{source}: training.lora.enable is {shown(enabled)}; it must be true or false")
    if enabled and not any(leaves.get(path) for path in _LORA_TARGETS):
        raise UserError(f"{source}: training.lora.enable is true, and training.lora.target_modules names no weights to "
                        "adapt; name some, such as [q_proj, v_proj]")
    for path in [path for path in leaves if path.startswith("training.lora.") and not enabled]:
        del leaves[path]
        ignored.append(f"{path}: training.lora.enable is false")


def _save_format(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    """Checkpoints are always DCP; with ``hf`` each is exported as well. Comes after LoRA's keys."""
    if leaves.get("training.save_format") != "hf":
        return
    del leaves["training.save_format"]
    if any(path.startswith("training.lora.") for path in leaves):
        ignored.append("training.save_format: with LoRA each checkpoint has a PEFT directory")
    elif leaves.get("gpt_args.save", leaves.get("training.save")) is None:
        ignored.append("training.save_format: there is no save")
    elif "gpt_args.save_hf_interval" in leaves:
        ignored.append("training.save_format: gpt_args.save_hf_interval is given")
    else:
        interval = leaves.get("gpt_args.save_interval", leaves.get("training.save_interval"))
        leaves["gpt_args.save_hf_interval"] = interval or 1
        moved["gpt_args.save_hf_interval"] = "training.save_format"


def _optimizer(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    optimizer = leaves.get("training.optimizer", "adamw")
    if optimizer not in list(OPTIMIZERS):
        raise UserError(f"{source}: training.optimizer is {shown(optimizer)}; choose {' or '.join(OPTIMIZERS)}")
    for path in _OF_MUON if optimizer != "muon" else ():
        if leaves.pop(path, _LEFT_OUT) is not _LEFT_OUT:
            ignored.append(f"{path}: it belongs to optimizer muon")


def _quantization(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    plan = leaves.get("training.quantization_plan")
    if isinstance(plan, dict) and plan.get("recipe_name") is None and plan.get("quant_recipe") is None:
        del leaves["training.quantization_plan"]
        ignored.append("training.quantization_plan: it names no recipe")


def _decay_ratio(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    """There the decay may be shorter than the run, and the warm-up is a share of the run; here of the decay."""
    ratio, style = leaves.pop("training.lr_decay_ratio", 1.0), leaves.get("training.lr_decay_style", "constant")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 0:
        raise UserError(f"{source}: training.lr_decay_ratio is {shown(ratio)}; it must be a number greater than 0")
    if ratio == 1:
        return
    if "gpt_args.lr_decay_fraction" in leaves:
        ignored.append("training.lr_decay_ratio: gpt_args.lr_decay_fraction is given")
        return
    if style != "cosine":
        ignored.append(f"training.lr_decay_ratio: it belongs to lr_decay_style cosine, not {style}")
        return
    leaves["gpt_args.lr_decay_fraction"] = float(ratio)
    moved["gpt_args.lr_decay_fraction"] = "training.lr_decay_ratio"
    warmup = leaves.get("training.lr_warmup_ratio")
    if isinstance(warmup, (int, float)) and not isinstance(warmup, bool):
        if warmup >= ratio:
            raise UserError(f"{source}: training.lr_warmup_ratio {warmup} is not less than training.lr_decay_ratio "
                            f"{ratio}, and both are parts of the run; lower the first")
        leaves["training.lr_warmup_ratio"] = warmup / ratio


def _learning_rates(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    plan, here = leaves.pop("training.lr_scaling_plan", None), TRANSLATED["training.lr_scaling_plan"]
    if not plan:
        return
    if not isinstance(plan, list) or not all(isinstance(entry, dict) for entry in plan):
        raise UserError(f"{source}: training.lr_scaling_plan is {shown(plan)}; it must be a list of match and scale")
    if here in leaves:
        raise UserError(f"{source}: training.lr_scaling_plan and {here} exclude each other; keep one")
    entries = [{"scale": 1.0, **entry} for entry in reversed(plan)]  # there the first match wins, here the last
    leaves[here] = [
        {**entry, "match": f"regex:{entry['match']}"} if isinstance(entry.get("match"), str) else entry
        for entry in entries
    ]
    moved[here] = "training.lr_scaling_plan"


def _weight_decay(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    """Norms and biases, which are what these lists are for, never decay here."""
    here = TRANSLATED["training.no_decay_params"]
    entries = []
    for name in ("no_decay_modules", "no_decay_params"):
        words = leaves.pop(f"training.{name}", None) or []
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise UserError(f"{source}: training.{name} is {shown(words)}; it must be a list of names")
        for word in words:
            if "norm" in word.lower() or "bias" in word:
                ignored.append(f"training.{name}: {word}: norms and biases have no weight decay")
            elif name == "no_decay_modules":
                raise UserError(f"{source}: training.no_decay_modules has {shown(word)}, a class of another "
                                "implementation; put a part of its parameters' names into training.no_decay_params")
            else:
                entries.append({"match": f"regex:.*{re.escape(word)}", "scale": 0.0})
    if entries:
        if here in leaves:
            raise UserError(f"{source}: training.no_decay_params and {here} exclude each other; keep one")
        leaves[here] = entries
        moved[here] = "training.no_decay_params"


def _evaluation(leaves: dict[str, Any], source: str, moved: dict[str, str], ignored: list[str]) -> None:
    """A second data set, with the settings of the first; evaluated in full every ``val_interval`` steps."""
    data = leaves.pop(_VALIDATION_DATA, None)
    interval = leaves.get("training.val_interval", 0)
    if interval == 0 and leaves.pop("training.val_interval", None) is not None:
        ignored.append("training.val_interval: 0 switches evaluation off")
        leaves.setdefault("gpt_args.eval_iters", 0)
    if data is None:
        return
    if not isinstance(data, dict):
        raise UserError(f"{source}: {_VALIDATION_DATA} is {shown(data)}; it must hold what {_TRAINING_DATA} holds")
    if interval == 0:
        ignored.append(f"{_VALIDATION_DATA}: training.val_interval is 0")
        return
    theirs = dict(leaves_of(data, frozenset(("basic_parameters.dataset",))))
    ours = {path.removeprefix(f"{_TRAINING_DATA}."): value for path, value in leaves.items()
            if path.startswith(f"{_TRAINING_DATA}.") and not f"{path}.".startswith(f"{_BASIC}.dataset.")}
    files = theirs.pop("basic_parameters.dataset", None)
    if not files:
        raise UserError(f"{source}: {_VALIDATION_DATA}.basic_parameters.dataset is missing; add it")
    if ours.get("basic_parameters.val_dataset") or ours.get("basic_parameters.val_rate"):
        raise UserError(f"{source}: {_VALIDATION_DATA}, and val_dataset or val_rate in {_BASIC} exclude each other; "
                        "keep one")
    most = theirs.pop("basic_parameters.max_samples", None)
    for path in sorted((theirs.keys() | ours.keys()) - {"basic_parameters.max_samples"}):
        value, wanted = (found.get(path, _default(path)) for found in (theirs, ours))
        if value == wanted:
            continue
        if _OF_TRAINING.fullmatch(path):
            if path in theirs:
                ignored.append(f"{_VALIDATION_DATA}.{path}: that of {_TRAINING_DATA} is used")
            continue
        said, other = ("left out" if one is _LEFT_OUT else shown(one) for one in (value, wanted))
        raise UserError(f"{source}: {_VALIDATION_DATA}.{path} is {said}, but {_TRAINING_DATA}.{path} is {other}; "
                        "evaluation reads its data as training does: give both the same value")
    leaves[f"{_BASIC}.val_dataset"], leaves[f"{_BASIC}.val_max_samples"] = files, most
    moved[f"{_BASIC}.val_dataset"] = f"{_VALIDATION_DATA}.basic_parameters.dataset"
    moved[f"{_BASIC}.val_max_samples"] = f"{_VALIDATION_DATA}.basic_parameters.max_samples"
    leaves.setdefault("gpt_args.eval_iters", _ALL_BATCHES)


@functools.cache
def _default(path: str) -> Any:
    """Default of a field of the data set that is left out; ``_LEFT_OUT`` where it has none."""
    owner: Any = DatasetParam
    *parents, name = path.split(".")
    for parent in parents:
        owner = nested_model(owner.model_fields[parent]) if owner and parent in owner.model_fields else None
    info = owner.model_fields.get(name) if owner else None
    return _LEFT_OUT if info is None or info.is_required() else info.default
