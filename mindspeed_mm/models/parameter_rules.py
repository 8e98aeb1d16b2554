"""Parameter rules: one ordered list that decides which parameters train, with which learning rate and weight decay, in
which dtype they are kept, and which of them checkpoints hold.

The recipe's ``freeze`` switches, MindSpeed's ``freeze`` and ``lr_scaling_plan``, ``weight_decay_scaling_plan`` and the
flags compile into the list; nothing else reads them. Names and shapes are enough to resolve it, so that this module
imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.matrices import Matrices

if TYPE_CHECKING:
    from torch import nn

Dtype = Literal["fp32", "bf16"]
REGEX = "regex:"
Parts = Mapping[str, Sequence[str]]
"""Name of a part of the model -> globs of its parameters' names, as :attr:`ModelSpec.parts`."""


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """One parameter of a model.

    Attributes:
        name: in the mcore model, without the checkpoint's ``model.`` prefix.
        shape: before sharding.
        hf_names: the Hugging Face tensors that hold its values.
    """

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRule:
    """Sets some attributes of the parameters that a pattern matches. None leaves an attribute as earlier rules set it.

    Attributes:
        pattern: a glob over whole names, or without wildcards a parameter or the path of a module that contains it;
            of the mcore model or of the Hugging Face one. After :data:`REGEX` a regular expression for the beginning of
            the names of Hugging Face tensors.
        source: the flag or file and field that the rule comes from, for messages.
        frozen_only: skip parameters that earlier rules left trainable.
        trainable: whether the parameter trains.
        lr_scale: factor on the learning rate.
        decay_scale: factor on the weight decay.
        dtype: in which the parameter is kept; forward and backward compute in the FSDP2 file's ``param_dtype``.
        saved: whether checkpoints hold it.
    """

    pattern: str
    source: str
    frozen_only: bool = False
    trainable: bool | None = None
    lr_scale: float | None = None
    decay_scale: float | None = None
    dtype: Dtype | None = None
    saved: bool | None = None

    def changes(self) -> dict[str, object]:
        """The attributes that the rule sets."""
        return {name: getattr(self, name) for name in _ATTRIBUTES if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterSettings:
    """All attributes of one parameter; see :class:`ParameterRule`.

    Attributes:
        part: of the model, as :attr:`ModelSpec.parts` names it.
        shape: before sharding.
        adapter: whether it is a factor of an adapter, not a weight of the model.
        matrices: that it holds, if Muon trains it; None for AdamW.
    """

    part: str
    shape: tuple[int, ...]
    adapter: bool = False
    matrices: Matrices | None = None
    trainable: bool = True
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    dtype: Dtype = "fp32"
    saved: bool = True

    @property
    def size(self) -> int:
        """Number of elements before sharding."""
        return math.prod(self.shape)


_ATTRIBUTES = ("trainable", "lr_scale", "decay_scale", "dtype", "saved")
Settings = Mapping[str, ParameterSettings]
"""Name of a parameter -> its settings, in the model's order."""


def compile_rules(args: TrainingArgs, options: ModelOptions, *, parts: Parts) -> list[ParameterRule]:
    """The rules that flags and model file describe; later ones override earlier ones.

    Args:
        args: the flags.
        options: the model file.
        parts: of the model.

    Raises:
        UserError: if a flag names a part that the model does not have.
    """
    file = args.mm_model
    rules = [
        ParameterRule(pattern=glob, source=f"{file}: {switch}", trainable=False)
        for part, switch in options.frozen_parts.items() for glob in parts.get(part, ())
    ]
    rules += [ParameterRule(pattern=name, source=f"{file}: freeze", trainable=False) for name in options.freeze]
    rules += [
        ParameterRule(pattern=entry.match, source=f"{file}: lr_scaling_plan", lr_scale=entry.scale)
        for entry in options.lr_scaling_plan
    ]
    rules += [
        ParameterRule(pattern=entry.match, source=f"{file}: weight_decay_scaling_plan", decay_scale=entry.scale)
        for entry in options.weight_decay_scaling_plan
    ]
    for flag, part, rate in (
        ("--vision-lr", "vision_encoder", args.vision_lr), ("--projector-lr", "vision_projector", args.projector_lr),
    ):
        if rate is not None and part not in parts:
            raise UserError(f"{flag} {rate}: this model has no {part}; leave the flag out")
        if rate is not None:
            rules += [ParameterRule(pattern=g, source=f"{flag} {rate}", lr_scale=rate / args.lr) for g in parts[part]]
    if args.frozen_param_dtype != "fp32":
        source = f"--frozen-param-dtype {args.frozen_param_dtype}"
        rules.append(ParameterRule(pattern="*", source=source, frozen_only=True, dtype=args.frozen_param_dtype))
    if args.save_trainable_only:
        rules.append(ParameterRule(pattern="*", source="--save-trainable-only", frozen_only=True, saved=False))
    return rules


def resolve(
    rules: Sequence[ParameterRule], parameters: Iterable[ParameterInfo], *, parts: Parts, frozen: Collection[str] = ()
) -> Settings:
    """Apply ``rules`` in order. Before them vectors (norms and biases) have no weight decay.

    Args:
        rules: the list.
        parameters: all parameters of the model.
        parts: of the model; every parameter is in one of them.
        frozen: names of the parameters that do not train, whatever the rules say.

    Raises:
        UserError: if a rule matches nothing, or some of the tensors that are fused into one parameter; if it sets the
            learning rate or weight decay of frozen parameters only, or is for frozen ones and there are none; or if
            nothing trains.
    """
    parameters = list(parameters)
    settings = {
        info.name: ParameterSettings(
            part=_part_of(info.name, parts),
            shape=info.shape,
            trainable=info.name not in frozen,
            decay_scale=float(len(info.shape) > 1),
        )
        for info in parameters
    }
    for rule in rules:
        matched = [info.name for info in filter(_applies(rule), parameters)]
        if not matched:
            raise UserError(_explain_no_match(rule, parameters))
        if rule.frozen_only:
            matched = [name for name in matched if not settings[name].trainable]
            if not matched:
                raise UserError(f"{rule.source} has no effect, since all parameters train; freeze some or leave it out")
        for name in matched:
            settings[name] = dataclasses.replace(settings[name], **rule.changes())
        scales = {"learning rate": rule.lr_scale, "weight decay": rule.decay_scale}
        if not any(settings[name].trainable for name in matched):
            for scaled in (name for name, scale in scales.items() if scale is not None):
                raise UserError(
                    f"{rule.source}: {rule.pattern} is frozen, so its {scaled} has no effect; unfreeze it or leave "
                    "this out"
                )
    _check_fused(rules, parameters)
    if not any(setting.trainable for setting in settings.values()):
        switches = dict.fromkeys(rule.source for rule in rules if rule.trainable is False)
        raise UserError(f"no parameter is trained: all are frozen by {' and '.join(switches)}; unfreeze some")
    return settings


def with_muon(settings: Settings, matrices: Mapping[str, Matrices]) -> Settings:
    """The settings of a run with Muon.

    Args:
        settings: of all parameters.
        matrices: of the parameters that it can train.

    Raises:
        UserError: if none of them trains.
    """
    chosen = {name for name, setting in settings.items() if setting.trainable and name in matrices}
    if not chosen:
        reason = "no weight matrix of a layer trains" if matrices else "this model's family names no matrices for it"
        raise UserError(f"--optimizer-selection muon: {reason}; use fused_torch_adamw")
    return {
        name: dataclasses.replace(setting, matrices=matrices[name]) if name in chosen else setting
        for name, setting in settings.items()
    }


def apply_settings(model: nn.Module, settings: Settings) -> None:
    """Freeze and convert the parameters of ``model``, in place. Call before sharding, on meta tensors or on real ones.

    Raises:
        KeyError: if the model has a parameter without settings.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(settings[name].trainable)
        if settings[name].dtype == "bf16":
            parameter.data = parameter.data.bfloat16()


def frozen_parts(settings: Settings) -> frozenset[str]:
    """Names of the parts of which no weight trains, whether or not they have adapters."""
    weights = [setting for setting in settings.values() if not setting.adapter]
    return frozenset({setting.part for setting in weights} - {s.part for s in weights if s.trainable})


def describe(settings: Settings, *, lr: float, weight_decay: tuple[float, float]) -> list[str]:
    """Lines of a table: each part's parameters by their settings.

    Args:
        settings: of all parameters.
        lr: peak learning rate where ``lr_scale`` is 1.
        weight_decay: where ``decay_scale`` is 1, at the start and at the end of the run.
    """
    first, last = weight_decay
    groups: dict[tuple[str, ...], list[int]] = {}
    muon = any(setting.matrices is not None for setting in settings.values())
    for setting in settings.values():
        rate, decay = f"{lr * setting.lr_scale:g}", f"{first * setting.decay_scale:g}"
        if first != last and setting.decay_scale:
            decay += f" to {last * setting.decay_scale:g}"
        of_training = ("yes", rate, decay) if setting.trainable else ("no", "-", "-")
        part, saved = setting.part + ", adapters" * setting.adapter, "yes" if setting.saved else "no"
        optimizer = ("-" if not setting.trainable else "AdamW" if setting.matrices is None else "Muon",) if muon else ()
        row = (part, *of_training, setting.dtype, saved, *optimizer)
        groups.setdefault(row, []).append(setting.size)
    titles = ("part", "tensors", "parameters", "trainable", "peak lr", "weight decay", "dtype", "saved")
    rows = [(*titles, *["optimizer"] * muon)]
    rows += [(row[0], f"{len(sizes):,}", f"{sum(sizes):,}", *row[1:]) for row, sizes in groups.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_right = {1, 2}
    return [
        "  ".join(
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _part_of(name: str, parts: Parts) -> str:
    for part, globs in parts.items():
        if any(_matcher(glob)(name) for glob in globs):
            return part
    raise ValueError(f"parameter {name} is in none of the spec's parts {', '.join(parts)}; add a glob that matches it")


def _applies(rule: ParameterRule) -> Callable[[ParameterInfo], bool]:
    """Whether a rule is for a parameter: by any of its names, or by a regular expression for its tensors' alone.

    Raises:
        UserError: if the regular expression is not one.
    """
    if rule.pattern == REGEX:
        raise UserError(f"{rule.source}: {rule.pattern!r} names nothing; write a regular expression after it")
    try:
        matches = _matcher(rule.pattern)
    except re.error as error:
        raise UserError(f"{rule.source}: {rule.pattern!r} is not a regular expression: {error}; correct it") from None
    if rule.pattern.startswith(REGEX):
        return lambda info: any(map(matches, info.hf_names))
    return lambda info: any(map(matches, (info.name, *info.hf_names)))


def _matcher(pattern: str) -> Callable[[str], object]:
    if pattern.startswith(REGEX):
        return re.compile(pattern.removeprefix(REGEX)).match
    if any(character in pattern for character in "*?["):
        return re.compile(fnmatch.translate(pattern)).match
    return lambda name: name == pattern or name.startswith(f"{pattern}.")


def _check_fused(rules: Sequence[ParameterRule], parameters: Sequence[ParameterInfo]) -> None:
    """Refuse rules that name q without k and v, say, where one parameter holds all three."""
    groups: dict[tuple[object, ...], list[ParameterRule]] = defaultdict(list)
    for rule in rules:
        groups[(rule.source, *rule.changes().items())].append(rule)
    for (source, *_), same in groups.items():
        matchers = [_matcher(rule.pattern) for rule in same]
        of_all_names = [_matcher(rule.pattern) for rule in same if not rule.pattern.startswith(REGEX)]
        for info in parameters:
            named = [name for name in info.hf_names if any(matches(name) for matches in matchers)]
            whole = any(matches(info.name) for matches in of_all_names)
            if not named or len(named) == len(info.hf_names) or whole:
                continue
            others = [name for name in info.hf_names if name not in named]
            raise UserError(
                f"{source}: {named[0]} is kept in one parameter, {info.name}, with {' and '.join(others)}; "
                "name all of them or none"
            )


def _explain_no_match(rule: ParameterRule, parameters: Sequence[ParameterInfo]) -> str:
    """The message, with the modules and parameters whose names are nearest."""
    names = [name.split(".") for info in parameters for name in (info.name, *info.hf_names)]
    paths = sorted({".".join(words[:count]) for words in names for count in range(1, len(words) + 1)})
    near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.6)
    beginnings = sorted({".".join(words[:2]) for words in names})
    hint = f"did you mean {' or '.join(near)}?" if near else f"names begin with {', '.join(beginnings)}"
    inside = f"{rule.pattern}.*"
    if rule.pattern.startswith(REGEX):
        hint = f"it is compared with the beginning of Hugging Face names, such as {parameters[0].hf_names[0]}"
    elif any(map(_matcher(inside), (".".join(words) for words in names))):  # a glob over whole names, not over modules'
        hint = f"did you mean {inside}?"
    return f"{rule.source}: {rule.pattern!r} matches no parameter; {hint}"
