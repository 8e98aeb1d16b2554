"""The held-out data of a training: its ``val_dataset``, or the records that ``val_rate`` keeps from training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.checkpoint.directory import METADATA, read_manifest
from mindspeed_mm.config.files import load_config
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, shown

if TYPE_CHECKING:
    from mindspeed_mm.config.data_config import DataConfig, NamedDataset
    from mindspeed_mm.evaluation.model_source import ModelSource
    from mindspeed_mm.models.spec import ModelSpec

_SEED = 42  # of the launcher


def held_out_data(
    path: str, source: ModelSource | None, spec: ModelSpec, *, seq_length: int | None, seed: int | None
) -> tuple[list[NamedDataset], frozenset[str] | None]:
    """The data sets that a training's data file evaluates on, and which of their records.

    Args:
        path: of the data file.
        source: of the model; the checkpoint of a training has its settings.
        spec: of the model family.
        seq_length: of the training, where ``val_rate`` decides; None: that of the checkpoint.
        seed: likewise.

    Returns:
        The data sets, and the names of the records as messages have them; None for all.

    Raises:
        UserError: if the file holds nothing out, or it is not known what.
    """
    from mindspeed_mm.config.data_config import DataConfig

    config = load_config(path, DataConfig, flag="--mm-data")
    basic = config.dataset_param.basic_parameters
    if not basic.val_rate:
        for name, value in (("seq-length", seq_length), ("val-seed", seed)):
            if value is not None:
                raise UserError(f"--{name} goes with val_rate, and --mm-data {path} has none; leave it out")
    if config.val_datasets:
        return _named(config.val_datasets), None
    if not basic.val_rate:
        raise UserError(f"--mm-data {path} has neither val_dataset nor val_rate; add one, or give --data FILE")
    recorded = _recorded(source)
    flags = recorded.get("flags", {})
    if seq_length is None and seed is None:
        _check_same(path, basic, recorded)
    seq_length = flags.get("--seq-length") if seq_length is None else seq_length
    if seq_length is None:
        raise UserError(f"--mm-data {path}: which records val_rate {basic.val_rate} holds out depends on --seq-length "
                        "and --seed of the training; give its checkpoint as --model, or --seq-length N and --val-seed "
                        "N")
    return _named(config.train_datasets), _held_out(
        config, spec, path, seq_length=seq_length, seed=flags.get("--seed", _SEED) if seed is None else seed
    )


def _named(data_sets: Sequence[NamedDataset]) -> list[NamedDataset]:
    return [dataclasses.replace(one, name=one.name or Path(one.files[0]).stem) for one in data_sets]


def _recorded(source: ModelSource | None) -> Mapping[str, Any]:
    """Training settings that a checkpoint's manifest records; empty for any other model."""
    if source is None or not is_file(Path(source.name) / METADATA):
        return {}
    return read_manifest(Path(source.name))["metadata"]


def _check_same(path: str, basic: Any, recorded: Mapping[str, Any]) -> None:
    """Check that training held out the same records, so that none is evaluated that the model was trained on."""
    trained = recorded.get("data", {}).get("dataset_param", {}).get("basic_parameters", {})
    for name in ("val_rate", "max_samples") if trained else ():
        now = getattr(basic, name)
        if trained.get(name) != now:
            raise UserError(f"--mm-data {path} has {name} {shown(now)}, and --model was trained with "
                            f"{shown(trained.get(name))}; give the data file of its training")


def _held_out(config: DataConfig, spec: ModelSpec, path: str, *, seq_length: int, seed: int) -> frozenset[str]:
    """Sources of the held-out records, from the data set that training builds; records it skips are in neither part."""
    from mindspeed_mm.data.dataset import build_datasets  # imports torch

    print(f"preparing the data of --mm-data {path}, for the records that val_rate holds out", flush=True)
    spec.check_data_config(config)
    model_config = spec.read_config(config.dataset_param.preprocess_parameters.model_name_or_path)
    media = spec.read_media_settings(config, model_config)
    _, evaluated = build_datasets(config, spec=spec, media=media, seq_length=seq_length, seed=seed)
    if evaluated is None:
        raise UserError(f"--mm-data {path}: its val_rate holds out no record; raise it, or give --data FILE")
    return frozenset(map(evaluated.describe, range(len(evaluated))))
