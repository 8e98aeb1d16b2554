"""Copies between safetensors and distributed checkpoints of any model, with another prefix of the names.

The names and options are those of MindSpeed-MM's ``GenericDCPConverter``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindspeed_mm.checkpoint.conversion import DTYPES, open_reader
from mindspeed_mm.checkpoint.dcp_to_hf import Output, write_safetensors
from mindspeed_mm.checkpoint.directory import check_huggingface, find_checkpoint, verify_directory
from mindspeed_mm.checkpoint.hf_to_dcp import write_checkpoint
from mindspeed_mm.checkpoint.huggingface import INDEX, SINGLE, SafetensorsReader, read_headers, read_weight_map
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.safetensors_io import CODES, Header, listed, read_header
from mindspeed_mm.checkpoint.safetensors_io import DTYPES as STORED_DTYPES
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, shorten
from mindspeed_mm.models.state_dict import copy_rule


def hf_to_dcp(
    hf_dir: str | Path,
    dcp_dir: str | Path,
    *,
    hf_prefix: str = "",
    dcp_prefix: str = "",
    tie_weight_mapping: Mapping[str, str] | None = None,
    fused_linear_names: Sequence[str] = (),
    dtype: str = "keep",
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``dcp_dir/release`` and the tracker from a directory of safetensors files; returns the checkpoint's path.

    Args:
        hf_dir: with safetensors files; other files are not needed.
        dcp_dir: created if needed.
        hf_prefix, dcp_prefix: a name that begins with the first gets the second instead of it.
        tie_weight_mapping: names that get a copy of another tensor: target -> source.
        fused_linear_names: parts of names of tensors [E, a, b] that are stored as [E x a, b].
        dtype: ``keep``, ``bf16`` or ``fp32``; integers keep theirs.
        workers: threads; None for the default.
        overwrite: replace an existing ``release``.

    Raises:
        UserError: if the source is damaged, two tensors get the same name, or the target cannot be written.
    """
    path, tied = Path(hf_dir), dict(tie_weight_mapping or {})
    check_huggingface(path, "--hf_dir")
    headers = {file: _fused(header, fused_linear_names) for file, header in _headers(path).items()}
    shapes = {name: tensor.shape for header in headers.values() for name, tensor in header.tensors.items()}
    if absent := listed("missing", sorted(set(tied.values()) - shapes.keys())):
        raise UserError(f"--tie_weight_mapping names sources that {path} does not have: {absent[0]}; correct them")
    for name in sorted(tied.keys() & shapes.keys()):
        print(f"note: {name} of {path} is replaced by {tied[name]} (--tie_weight_mapping)")
    for part in fused_linear_names:
        if not any(part in name for name in shapes):
            print(f"note: no tensor of {path} has {shorten(part)} in its name (--fused_linear_names)")
    if hf_prefix and not any(name.startswith(hf_prefix) for name in shapes):
        print(f"note: no tensor of {path} begins with {shorten(hf_prefix)} (--hf_prefix)")
    origins = dict(zip(shapes, shapes, strict=True)) | tied
    names = _renamed(list(origins), hf_prefix, dcp_prefix)
    rules = [copy_rule(target, origins[name], shapes[origins[name]]) for target, name in names.items()]
    # in the manifest, and so in the plan by which an interrupted conversion with other options is not resumed
    facts = {
        "names": {
            "hf_prefix": hf_prefix, "dcp_prefix": dcp_prefix, "tied": tied, "fused": list(fused_linear_names),
        }
    }
    reader = SafetensorsReader(path, headers, rules)
    return write_checkpoint(reader, dcp_dir, dtype=dtype, facts=facts, workers=workers, overwrite=overwrite)


def dcp_to_hf(
    load_dir: str | Path,
    save_dir: str | Path,
    model_assets_dir: str | Path,
    *,
    hf_prefix: str = "",
    dcp_prefix: str = "",
    fused_linear_names: Sequence[str] = (),
    dtype: str = "keep",
    max_shard_size: int = 5_000_000_000,
    workers: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    base_dir: str | Path | None = None,
) -> Path:
    """Write a directory of safetensors files from a distributed checkpoint; returns its path.

    Args:
        load_dir: a checkpoint directory, or a directory with a tracker file.
        save_dir: must not exist, unless empty or ``overwrite``.
        model_assets_dir: gives all other files; if it has an index, only the tensors that this names are written.
        hf_prefix, dcp_prefix: a name that begins with the second gets the first instead of it.
        fused_linear_names: parts of names of tensors [E x a, b] that are written as [E, a, b], where E is
            ``num_experts`` in ``config.json``.
        dtype: ``keep``, ``bf16`` or ``fp32``; integers keep theirs.
        max_shard_size: bytes of tensors in one file, at most, unless those of one tensor are more.
        workers: threads; None for the default.
        overwrite: replace ``save_dir``.
        check: compare checksums; otherwise a checkpoint of torch's own, without a manifest, is accepted too.
        base_dir: directory of a partial checkpoint's base, if it is not where it was.

    Raises:
        UserError: if the checkpoint is incomplete or damaged, lacks a tensor, or the target cannot be written.
    """
    checkpoint, save, assets = find_checkpoint(Path(load_dir), "--load_dir"), Path(save_dir), Path(model_assets_dir)
    check_huggingface(assets, "--model_assets_dir")
    if not assets.is_dir():
        raise UserError(f"--model_assets_dir {assets} is not a directory; name the original Hugging Face directory")
    reader = open_reader(checkpoint, verify_directory(checkpoint, plain=not check), base_dir=base_dir, check=check)
    stored = {name.removeprefix(MODEL_PREFIX): name for name in reader.tensors if name.startswith(MODEL_PREFIX)}
    names = _renamed(list(stored), dcp_prefix, hf_prefix)
    wanted = _indexed_names(assets)
    if wanted is not None:
        if missing := listed("missing", sorted(wanted - names.keys())):
            raise UserError(f"{checkpoint} does not have what {assets / INDEX} names: {missing[0]}; check the prefixes")
        names = {name: target for name, target in names.items() if name in wanted}
        if left_out := len(stored) - len(names):
            print(f"{left_out} of {len(stored)} tensors are not in {assets / INDEX} and are left out")
    if not names:
        raise UserError(f"{checkpoint} has no tensor {MODEL_PREFIX}* to write; name the checkpoint of a model")
    outputs = []
    for name, target in names.items():
        shape, kind = reader.tensors[stored[target]]
        if kind not in CODES:
            raise UserError(f"{checkpoint}: {stored[target]} is {kind}, which no safetensors file can hold; convert it")
        unfused = _unfused(name, shape, assets) if any(part in name for part in fused_linear_names) else None
        outputs.append(Output(copy_rule(target, name, shape), reader, DTYPES[dtype], shape=unfused))
    write_safetensors(
        outputs, save, checkpoint=checkpoint, assets=assets, facts={"source": {"checkpoint": str(checkpoint)}},
        max_shard_size=max_shard_size, workers=workers, overwrite=overwrite,
    )
    return save


def _renamed(names: Sequence[str], old: str, new: str) -> dict[str, str]:
    """Each name by the one that it becomes, with prefix ``new`` instead of ``old``."""
    result: dict[str, str] = {}
    for name in names:
        target = new + name.removeprefix(old) if name.startswith(old) else name
        if target in result:
            raise UserError(f"{result[target]} and {name} both become {target}; correct --hf_prefix or --dcp_prefix")
        result[target] = name
    return result


def _headers(path: Path) -> dict[str, Header]:
    """Headers of the files that transformers reads, or else of all safetensors files."""
    files = sorted(path.glob("*.safetensors"))
    if not files or any(is_present(path / name) for name in (INDEX, SINGLE)):
        return read_headers(path, dtypes=STORED_DTYPES)
    headers = {file.name: read_header(file, dtypes=STORED_DTYPES) for file in files}
    found: dict[str, str] = {}
    for file, header in headers.items():
        if repeated := sorted(found.keys() & header.tensors.keys()):
            raise UserError(f"{path}: {repeated[0]} is in {found[repeated[0]]} and {file}; remove one of the files")
        found.update(dict.fromkeys(header.tensors, file))
    return headers


def _fused(header: Header, parts: Sequence[str]) -> Header:
    """[E, a, b] as [E x a, b], where a tensor's name contains one of ``parts``."""
    tensors = {
        name: dataclasses.replace(tensor, shape=(math.prod(tensor.shape[:2]), tensor.shape[2]))
        if len(tensor.shape) == 3 and any(part in name for part in parts) else tensor
        for name, tensor in header.tensors.items()
    }
    return dataclasses.replace(header, tensors=tensors)


def _unfused(name: str, shape: tuple[int, ...], assets: Path) -> tuple[int, ...] | None:
    """[E x a, b] -> [E, a, b]; None for a tensor of another rank, which was not fused."""
    if len(shape) != 2:
        return None
    file = assets / "config.json"
    config = read_json(file, remedy="--fused_linear_names needs its num_experts")
    thinker = config.get("thinker_config")
    holders = [config, config.get("text_config"), thinker.get("text_config") if isinstance(thinker, dict) else None]
    found = [holder["num_experts"] for holder in holders if isinstance(holder, dict) and holder.get("num_experts")]
    experts = found[0] if found else None
    if type(experts) is not int or experts < 1 or shape[0] % experts:
        raise UserError(
            f"{name} {list(shape)} is not made of the num_experts ({shorten(experts, 40)}) of {file}; correct either"
        )
    return (experts, shape[0] // experts, shape[1])


def _indexed_names(assets: Path) -> set[str] | None:
    """The tensors that the weight index names; None if there is none."""
    return set(read_weight_map(assets)) if is_present(assets / INDEX) else None
