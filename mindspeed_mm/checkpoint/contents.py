"""Whether a checkpoint holds what a run needs, by names, shapes and dtypes. Imports no torch: also checked before any
rank is started.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.directory import MODEL_CONFIG_KEY, verify_directory
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX, OPTIMIZER_PREFIX, Entry, read_entries
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base
from mindspeed_mm.checkpoint.progress import Progress
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten, shown
from mindspeed_mm.models.lora import LORA_KEY, is_adapter
from mindspeed_mm.models.optimizer_state import OptimizerStateLayout

# fields of a config that change nothing that is computed with given weights, or that their shapes tell; transformers
# adds some when it saves a config
_NOT_COMPARED = ("initializer_range", "router_aux_loss_coef", "max_position_embeddings", "intermediate_size")
_NARROW = ("bfloat16", "float16")  # whose values float32 represents exactly


def check_contents(
    path: Path,
    manifest: Mapping[str, Any],
    stored: Mapping[str, Entry],
    parameters: Mapping[str, Entry],
    *,
    trained: Collection[str],
    optimizer: OptimizerStateLayout | None,
) -> None:
    """Refuse a checkpoint that does not fit the model, or holds another optimizer's state, or of other parameters.

    Args:
        path: of the checkpoint, for the message.
        manifest: of the checkpoint.
        stored: all tensors of the checkpoint.
        parameters: all of the model, by their names in a checkpoint.
        trained: names of those that train.
        optimizer: the state that is to be loaded, if the checkpoint has any; None for none.

    Raises:
        UserError: naming the first differences.
    """
    frozen = parameters.keys() - trained
    # converted weights may be in bf16, and so may parameters that did not train in the run that saved them
    flags = manifest["metadata"].get("flags")
    frozen_dtype = flags.get("--frozen-param-dtype", "fp32") if isinstance(flags, Mapping) else "fp32"
    exact = Progress.is_training(path) and frozen_dtype == "fp32"
    partial = BASE_KEY in manifest["metadata"]
    expected = {name: entry for name, entry in parameters.items() if not partial or name in stored}
    compare(path, expected, beginning_with(MODEL_PREFIX, stored), exact=exact, frozen=frozen)
    state = beginning_with(OPTIMIZER_PREFIX, stored)
    if optimizer is None or not state:
        return
    shapes = {name.removeprefix(MODEL_PREFIX): parameters[name][0] for name in trained}
    _check_trained(path, shapes.keys(), state)
    _check_optimizer(path, flags, optimizer)
    compare(path, {
        f"{OPTIMIZER_PREFIX}{name}.{key}": entry
        for name, shape in shapes.items() for key, entry in optimizer.tensors(name, shape).items()
    }, state)


def check_adapters(
    path: Path, manifest: Mapping[str, Any], names: Collection[str], stored: Collection[str], *,
    lora: Mapping[str, Any] | None, new_stage: bool,
) -> bool:
    """Whether a checkpoint holds the adapters of this run; otherwise it has weights, over which new ones are trained.

    Args:
        path: of the checkpoint, for the message.
        manifest: of the checkpoint.
        names: of the run's adapters, in a checkpoint.
        stored: names of the checkpoint's tensors.
        lora: what the run records of its adapters; None for full fine-tuning.
        new_stage: whether the run counts from 0 (``--finetune``).

    Raises:
        UserError: if it holds adapters that are not this run's, or is of a run of full fine-tuning that would go on.
    """
    recorded = manifest["metadata"].get(LORA_KEY)
    if lora is None and recorded is None:
        return False
    if lora is None:
        raise UserError(
            f"{path} holds LoRA adapters; continue with that run's --lora flags, or merge them into the weights first "
            "(mm-convert: merge_lora)"
        )
    if recorded is None:
        if Progress.is_training(path) and not new_stage:
            raise UserError(
                f"{path} is of a run of full fine-tuning; add --finetune to train adapters over its weights"
            )
        return False
    if not isinstance(recorded, Mapping):
        raise UserError(f"{path}: manifest.json: {LORA_KEY} must be an object; restore the checkpoint")
    flags = {"r": "--lora-r", "alpha": "--lora-alpha", "expert_r": "--lora-expert-r", "use_rslora": "--lora-use-rslora"}
    if all(one.get("expert_r") == one.get("r") for one in (recorded, lora)):
        del flags["expert_r"]  # it follows --lora-r
    differing = [f"{flag} {_number(recorded.get(name))}, now {_number(lora[name])}" for name, flag in flags.items()
                 if recorded.get(name) != lora[name]]
    adapted = {name for name in stored if name.startswith(MODEL_PREFIX) and is_adapter(name)}
    if adapted != set(names):
        targets = recorded.get("targets")
        words = " ".join(map(str, targets)) if isinstance(targets, list) else shown(targets)
        now = " ".join(lora["targets"])
        same = " (the same, of other parts: see freeze and --lora-apply-modules)" if words == now else ""
        differing.append(f"--lora-target-modules {shorten(words, 200)}, now {now}{same}")
    if differing:
        raise UserError(
            f"{path} has other adapters: {'; '.join(differing)}; pass that run's flags, or merge its adapters into the "
            "weights first (mm-convert: merge_lora)"
        )
    return True


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(value)


def check_model_config(path: Path, manifest: Mapping[str, Any], model_config: Any, *, source: Path) -> None:
    """Refuse a checkpoint whose weights were made for, or trained in, another computation of the same shapes.

    Args:
        path: of the checkpoint, for the message.
        manifest: of the checkpoint; older ones record no config, and nothing is compared.
        model_config: a dataclass, from ``config.json``.
        source: that ``config.json``, for the message.

    Raises:
        UserError: naming the first differences.
    """
    recorded = _flat(manifest["metadata"].get(MODEL_CONFIG_KEY))
    now = _flat(json.loads(json.dumps(dataclasses.asdict(model_config))))
    differing = [f"{name} {shown(recorded[name])}, now {shown(now[name])}"
                 for name in now if recorded.get(name, now[name]) != now[name] and not name.endswith(_NOT_COMPARED)]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{path} belongs to a model with another config.json: {'; '.join(differing[:3])}{more} in {source}; "
            "restore that file, or convert the weights again with it"
        )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested objects by their dotted paths; none for anything else."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content} if prefix else {}
    return {path: value for name, inner in content.items() for path, value in _flat(inner, f"{prefix}{name}.").items()}


def check_base_contents(
    base: Base, names: Collection[str], parameters: Mapping[str, Entry], *, trained: Collection[str]
) -> None:
    """Refuse a base, a checkpoint, that does not have the parameters that a partial checkpoint lacks.

    Args:
        base: of the partial checkpoint.
        names: of these parameters.
        parameters: all of the model.
        trained: names of those that train.

    Raises:
        UserError: naming the first differences, or if the base is incomplete.
    """
    path = Path(base.path)
    stored = read_entries(path, verify_directory(path))
    compare(
        path,
        {name: parameters[name] for name in names},
        {name: entry for name, entry in stored.items() if name in names},
        exact=False,
        frozen=parameters.keys() - trained,
    )


def beginning_with(prefix: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors whose names begin with ``prefix``."""
    return {name: entry for name, entry in entries.items() if name.startswith(prefix)}


def compare(
    path: Path,
    expected: Mapping[str, Entry],
    stored: Mapping[str, Entry],
    *,
    exact: bool = True,
    frozen: Collection[str] = (),
) -> None:
    """Refuse a checkpoint whose names, shapes or dtypes differ from the model's.

    Args:
        path: of the checkpoint, for the message.
        expected: tensors of the model or optimizer.
        stored: the checkpoint's.
        exact: require equal dtypes; otherwise the expected dtype must represent all stored values exactly.
        frozen: names of parameters that do not train, whose dtype may be another: bf16 where the model computes in it.

    Raises:
        UserError: naming the first three differences of the first kind.
    """
    common = sorted(expected.keys() & stored.keys())
    shapes = [
        f"{name} {stored[name][0]} instead of {expected[name][0]}"
        for name in common
        if stored[name][0] != expected[name][0]
    ]
    types = [
        f"{name} {stored[name][1]} instead of {expected[name][1]}"
        for name in common
        if not _fits(stored[name][1], expected[name][1], exact=exact)
        and not (name in frozen and {stored[name][1], expected[name][1]} == {"bfloat16", "float32"})
    ]
    for kind, names in (
        ("lacks", sorted(expected.keys() - stored.keys())),
        ("has unexpected", sorted(stored.keys() - expected.keys())),
        ("has other shapes:", shapes),
        ("has other types:", types),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{path} is a checkpoint of another model: it {kind} {', '.join(names[:3])}{more}; "
                "convert the weights that model_name_or_path and the model JSON describe"
            )


def _fits(stored: str, dtype: str, *, exact: bool) -> bool:
    return stored == dtype or (not exact and dtype == "float32" and stored in _NARROW)


def _check_optimizer(path: Path, flags: Any, optimizer: OptimizerStateLayout) -> None:
    """Refuse the state of an optimizer that the run's flags do not select.

    ``flags``: what the manifest records of the run that wrote the state, if it does; those not given had their default.
    """
    if not isinstance(flags, Mapping):
        return
    then = {flag: shorten(flags.get(flag, default), 40) for flag, (_, default) in optimizer.flags.items()}
    differing = [flag for flag, (now, _) in optimizer.flags.items() if then[flag] != now]
    if differing:
        before = " ".join(f"{flag} {then[flag]}" for flag in differing)
        raise UserError(
            f"{path} holds optimizer state of {before}, which a run with "
            f"{' '.join(f'{flag} {optimizer.flags[flag][0]}' for flag in differing)} cannot continue; pass {before}, "
            "or add --no-load-optim to start the optimizer's state from zero"
        )


def _check_trained(path: Path, now: Collection[str], state: Collection[str]) -> None:
    """Refuse optimizer state of other parameters than those that train now."""
    then = {name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0] for name in state}
    differences = [
        f"{', '.join(sorted(names)[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''} {what}"
        for names, what in ((set(now) - then, "did not train then"), (then - set(now), "did, and do not now")) if names
    ]
    if differences:
        raise UserError(
            f"{path} is of a run that trained other parameters: {'; '.join(differences)}. Freeze what that run froze, "
            "or add --no-load-optim to start the optimizer's state from zero"
        )
