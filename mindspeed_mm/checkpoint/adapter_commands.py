"""The commands of mm-convert for LoRA: adapters to and from other programs' forms, into a model, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.adapter_formats import (
    ADAPTER_WEIGHTS,
    adapter_bytes,
    form_notes,
    one_rank,
    refit,
    write_adapter,
)
from mindspeed_mm.checkpoint.adapters import (
    AdapterCheckpoint,
    AdapterConfig,
    AdapterDirectory,
    AdapterSource,
    recorded_options,
)
from mindspeed_mm.checkpoint.contents import check_model_config
from mindspeed_mm.checkpoint.conversion import (
    DTYPES,
    ProgressBar,
    counted,
    digest,
    locked,
    open_reader,
    remaining,
    resumable,
    writing,
)
from mindspeed_mm.checkpoint.dcp_to_hf import (
    Output,
    check_parameters,
    print_notes,
    trained_processors,
    write_safetensors,
)
from mindspeed_mm.checkpoint.directory import (
    ADAPTER_CONFIG,
    MODEL_CONFIG_KEY,
    AtomicDirectory,
    check_huggingface,
    find_checkpoint,
    is_huggingface,
    read_manifest,
    verify_directory,
)
from mindspeed_mm.checkpoint.files import file_checksum
from mindspeed_mm.checkpoint.hf_to_dcp import write_checkpoint
from mindspeed_mm.checkpoint.huggingface import LAYOUT_KEY, HFReader, check_replaceable
from mindspeed_mm.checkpoint.metadata_file import MODEL_PREFIX
from mindspeed_mm.checkpoint.partial import BASE_KEY, Base, model_of_base
from mindspeed_mm.checkpoint.shards import Rows
from mindspeed_mm.checkpoint.storage import CheckpointReader
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, shorten
from mindspeed_mm.models.lora import ALL, LORA_KEY, Adapter, LoraOptions
from mindspeed_mm.models.spec import ModelSpec, spec_of
from mindspeed_mm.models.state_dict import WeightRule, hf_shapes

_TOLERANCE = 1e-6
"""Relative difference of two deltas that rounding a scale into factors in fp32 explains."""
_WARN_LOST = 0.1
_KEPT_FACTORS = 4
"""Factors in memory: both of the tensors of two files that are written at a time."""


@dataclasses.dataclass(frozen=True)
class OpenAdapters:
    """Adapters and the base model that they are for.

    Attributes:
        source: of the adapters.
        spec: of the base model.
        model_config: likewise.
        config_dir: Hugging Face directory that the config is from.
        manifest: of the checkpoint that holds them; None for a directory of adapters.
    """

    source: AdapterSource
    spec: ModelSpec
    model_config: Any
    config_dir: Path
    manifest: Mapping[str, Any] | None

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each Hugging Face tensor of the base model."""
        return hf_shapes(self.spec.weight_rules(self.model_config, expert_layout="hub"))


def open_adapters(path: Path, option: str, hf_dir: str | Path | None) -> OpenAdapters:
    """Open a directory of adapters in any form, a checkpoint of a LoRA run, or a directory with a tracker file.

    Args:
        path: of these.
        option: that named it, for messages.
        hf_dir: Hugging Face directory of the base model, of which the config is read; None for the recorded one.

    Raises:
        UserError: if the adapters are damaged or do not fit the base model, or its config is nowhere.
    """
    if is_present(path / ADAPTER_CONFIG):
        named = AdapterConfig(path).base
        config_dir = _config_dir(path, hf_dir, named)
        if is_huggingface(Path(named)) and not os.path.samefile(named, config_dir):
            print(f"note: {path} names another base model, {named}; its weights are not compared with {config_dir}")
        spec = spec_of(config_dir)
        model_config = spec.read_config(config_dir)
        return OpenAdapters(AdapterDirectory(path, spec, model_config), spec, model_config, config_dir, None)
    checkpoint = find_checkpoint(path, option)
    manifest = verify_directory(checkpoint)
    recorded_options(checkpoint, manifest)  # first, as what is missing of another checkpoint does not matter
    config_dir = _config_dir(checkpoint, hf_dir, _recorded_model(manifest))
    spec = spec_of(config_dir)
    model_config = spec.read_config(config_dir)
    check_model_config(checkpoint, manifest, model_config, source=config_dir / "config.json")
    source = AdapterCheckpoint(checkpoint, manifest, spec, model_config)
    return OpenAdapters(source, spec, model_config, config_dir, manifest)


def _recorded_model(manifest: Mapping[str, Any]) -> str:
    """What the adapters of a run are for: a Hugging Face directory, if that can be known."""
    model = manifest["metadata"].get("model")
    named = model.get("init_from_hf_path") if isinstance(model, Mapping) else None
    return model_of_base(Base.recorded(manifest), named if isinstance(named, str) else "")


def _config_dir(path: Path, hf_dir: str | Path | None, recorded: str) -> Path:
    """The Hugging Face directory of the base model."""
    if hf_dir is not None:
        check_huggingface(Path(hf_dir), "--hf_dir")
        return Path(hf_dir)
    if recorded and is_huggingface(Path(recorded)):
        return Path(recorded)
    where = f"its base {shorten(recorded)} is no Hugging Face directory here" if recorded else "it names no base model"
    raise UserError(f"{path}: {where}; name the base model's directory by --hf_dir DIR (dcp_to_hf makes one of a "
                    "training checkpoint)")


def lora_to_hf(
    load_dir: str | Path,
    save_dir: str | Path,
    *,
    format: str = "peft",
    hf_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a directory of adapters that PEFT, vLLM or SGLang load; returns its path.

    Args:
        load_dir: checkpoint of a LoRA run, directory with a tracker file, or directory of adapters in any form.
        save_dir: must not exist, unless empty or ``overwrite``.
        format: of :data:`~mindspeed_mm.checkpoint.adapter_formats.FORMS`.
        hf_dir: the base model; None for the recorded one.
        overwrite: replace ``save_dir``.

    Raises:
        UserError: if the adapters are damaged, the run trained other parameters in full, or the form cannot hold them.
    """
    load, save = Path(load_dir), Path(save_dir)
    opened = open_adapters(load, "--load_dir", hf_dir)
    source, adapters = opened.source, opened.source.adapters
    if isinstance(source, AdapterCheckpoint) and source.others:
        raise UserError(f"{source.path} also has {counted(len(source.others), 'parameter')} that trained in full, such "
                        f"as {source.others[0]}, which no adapter can hold; make a whole model with merge_lora")
    notes = form_notes(adapters, format)
    base = getattr(source, "base", "") or str(opened.config_dir)
    plan = digest([str(source.path.resolve()), source.fingerprint(), format])
    directory = AtomicDirectory(save, overwrite=overwrite or save.is_dir())
    if not directory.is_committed(plan):
        check_replaceable(save, overwrite=overwrite, keep=(source.path, opened.config_dir))
        for kept in (source.path, opened.config_dir):
            if save.resolve().is_relative_to(kept.resolve()):
                raise UserError(f"--save_dir {save} is inside {kept}, which is read from; name another directory")
        progress = ProgressBar("lora_to_hf")
        with writing(save), locked(save), resumable(directory, plan), contextlib.closing(progress):
            progress.begin(remaining(directory, adapter_bytes(adapters, format), {}))
            written = write_adapter(
                directory.partial, adapters, source.read, form=format, base=base,
                weights=opened.weights, advance=progress.advance,
            )
            progress.print_totals()
            directory.commit({"kind": "adapters", "source": {"adapters": str(source.path)}}, written)
    directory.clean_up()  # after the lock file is gone, so that the same command completes this after a kill
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" * bool(notes))
    return save


def lora_hf_to_dcp(
    lora_dir: str | Path,
    hf_dir: str | Path,
    dcp_dir: str | Path,
    *,
    base_dir: str | Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``dcp_dir/release`` and the tracker, from which a LoRA run starts; returns the checkpoint's path.

    Args:
        lora_dir: directory of adapters in any form.
        hf_dir: Hugging Face directory of the base model.
        dcp_dir: created if needed.
        base_dir: the checkpoint whose weights the run loads; None for ``hf_dir``.
        workers: threads; None for the default.
        overwrite: replace an existing ``release``.

    Raises:
        UserError: if the adapters are damaged or do not fit the base model, or the target cannot be written.
    """
    if not is_present(Path(lora_dir) / ADAPTER_CONFIG):
        raise UserError(f"--lora_dir {lora_dir} has no {ADAPTER_CONFIG}, so it is no directory of adapters; a "
                        "checkpoint of a LoRA run is loaded as it is")
    opened = open_adapters(Path(lora_dir), "--lora_dir", hf_dir)
    adapters, options = _uniform(opened)
    base = Base.of(hf_dir, "--hf_dir") if base_dir is None else Base.of(base_dir, "--base_dir")
    _check_base(_reader_of(base, "auto"), opened)
    facts = {
        "weight_map_version": opened.spec.weight_map_version,
        "source": {"adapters": str(lora_dir)},
        MODEL_CONFIG_KEY: dataclasses.asdict(opened.model_config),
        BASE_KEY: dataclasses.asdict(base),
        LORA_KEY: options.recorded(),
    }
    reader = _AdapterReader(opened.source, adapters)
    return write_checkpoint(
        reader, dcp_dir, dtype="keep", facts=facts, workers=workers, overwrite=overwrite, title="lora_hf_to_dcp"
    )


def _uniform(opened: OpenAdapters) -> tuple[list[Adapter], LoraOptions]:
    """The adapters as those of a run, which has one alpha, a rank for linear layers and one for experts."""
    source = opened.source
    adapters = one_rank(source.adapters, by_kind=True)
    ranks = {adapter.is_experts: adapter.rank for adapter in adapters}
    r = ranks.get(False, ranks.get(True, 1))
    first = adapters[0]
    options = LoraOptions(targets=(ALL,), r=r, expert_r=ranks.get(True, r), alpha=first.scale * first.rank)
    # adapters of rsLoRA have one alpha only by its own formula
    stabilized = dataclasses.replace(options, alpha=first.scale * math.sqrt(first.rank), use_rslora=True)
    for choice in (stabilized, options):
        if all(math.isclose(a.scale, choice.scale(a.rank), rel_tol=1e-9) for a in source.adapters):
            options = choice
    options = dataclasses.replace(options, alpha=_whole(options.alpha))
    planned = opened.spec.adapters(opened.model_config, options)
    held = {adapter.name for adapter in adapters}
    partly = {adapter.group for adapter in planned if adapter.name not in held}
    targets = dict.fromkeys(a.module if a.group in partly else a.group for a in planned if a.name in held)
    changed = [a for a, b in zip(source.adapters, (p for p in planned if p.name in held), strict=True)
               if a.rank != b.rank or not math.isclose(a.scale, b.scale, rel_tol=1e-9)]
    if changed:
        print(f"note: {counted(len(changed), 'adapter')} of {source.path}, such as {changed[0].module}, differ in rank "
              f"or scale; ranks are filled up with zeros to {r} and for experts {options.expert_r}, and scales go into "
              "lora_B: the deltas stay")
    return [p for p in planned if p.name in held], dataclasses.replace(options, targets=tuple(targets))


def _whole(value: float) -> float:
    """The whole number that a division and a multiplication have missed by a last bit."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


class _AdapterReader:
    """Adapters as the parameters that :func:`~mindspeed_mm.checkpoint.hf_to_dcp.write_checkpoint` reads."""

    def __init__(self, source: AdapterSource, adapters: Sequence[Adapter]) -> None:
        self.path, self._source = source.path, source
        self._adapters = {name: pair for pair in zip(source.adapters, adapters, strict=True) for name in pair[1].names}
        self.tensors = {
            MODEL_PREFIX + name: (shape, torch.float32) for a in adapters for name, shape in a.shapes.items()
        }
        self._factor = _Cached(self._refitted)

    def read(self, name: str, rows: Rows, reads: list[Any] | None = None) -> Tensor:
        """Rows of a factor; nothing is added to ``reads``, since a factor is no range of a file's bytes."""
        del reads
        return self._factor(name.removeprefix(MODEL_PREFIX))[slice(*rows)].contiguous()

    def _refitted(self, name: str) -> Tensor:
        adapter, target = self._adapters[name]
        factors = refit(adapter, target, *(self._source.read(factor) for factor in adapter.names))
        return factors[adapter.names.index(name)]

    def is_copy(self, name: str) -> bool:
        """See ``SafetensorsReader``."""
        return False

    def read_unused(self) -> list[Any]:
        """See ``SafetensorsReader``."""
        return []

    def fingerprint(self) -> list[list[Any]]:
        """See ``SafetensorsReader``."""
        return self._source.fingerprint()

    def file_facts(self, ranges: Any) -> dict[str, dict[str, Any]]:
        """See ``SafetensorsReader``."""
        files = [self.path / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return {file.name: {"size": file.stat().st_size, "checksum": file_checksum(file)} for file in files}


class _Cached:
    """Keeps the factors read last, since the chunks of a tensor are made one after another."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = functools.lru_cache(maxsize=_KEPT_FACTORS)(read)
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Tensor:
        with self._lock:  # several threads want the same one at a time
            return self._read(name)


def merge_lora(
    hf_dir: str | Path,
    lora_dir: str | Path,
    save_dir: str | Path,
    *,
    dtype: str = "keep",
    expert_layout: str = "auto",
    base_dir: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a directory of the base model's weights plus the adapters' deltas, in the published layout.

    Each sum is computed in fp32 and rounded once. What rounding loses of the update is printed: with D the delta, W the
    base weight and R the rounding to the result's type, ``|R(W + D) - R(W) - D| / |D|`` in the Frobenius norm over all
    adapted weights, which is the relative error of the update's effect on inputs without a preferred direction.

    Args:
        hf_dir: Hugging Face directory of the base model, with its config, tokenizer and processor files.
        lora_dir: checkpoint of a LoRA run, directory with a tracker file, or directory of adapters in any form.
        save_dir: must not exist, unless empty or ``overwrite``.
        dtype: ``keep``, as the base; ``bf16`` or ``fp32``.
        expert_layout: of the base: ``auto``, ``hub`` or ``v5``.
        base_dir: the base weights if they are not those of ``hf_dir``: a checkpoint, which a run has started from.
        max_shard_size: bytes of tensors in one file, at most, unless those of one parameter are more.
        workers: threads; None for the default.
        overwrite: replace ``save_dir``.

    Raises:
        UserError: if the adapters or the base are damaged or do not fit, or the target cannot be written.
    """
    save, assets = Path(save_dir), Path(hf_dir)
    opened = open_adapters(Path(lora_dir), "--lora_dir", assets)
    source, spec, manifest = opened.source, opened.spec, opened.manifest
    reader, own, base = _base_reader(opened, base_dir, expert_layout)
    by_weight = {adapter.source[0]: adapter for adapter in source.adapters}
    factor = _Cached(source.read)
    outputs = [
        _MergedOutput(rule, reader, DTYPES[dtype] or own.tensors[MODEL_PREFIX + rule.target][1], by_weight, factor)
        for rule in spec.weight_rules(opened.model_config, expert_layout="hub")
    ]
    facts = {
        "weight_map_version": spec.weight_map_version,
        LAYOUT_KEY: "hub",
        "source": {
            "adapters": str(source.path), "base": base.path, "digest": digest([source.fingerprint(), base.digest])
        },
    }
    replaced, changes = ({}, []) if manifest is None else trained_processors(manifest, source.path, assets, spec)
    write_safetensors(
        outputs, save, checkpoint=source.path, assets=assets, facts=facts, max_shard_size=max_shard_size,
        workers=workers, overwrite=overwrite, replaced=replaced, title="merge_lora",
    )
    print_notes(save, assets, spec, opened.model_config, changes)
    _print_lost(save, {str(output.dtype).removeprefix("torch.") for output in outputs}, len(by_weight))
    return save


def _base_reader(opened: OpenAdapters, base_dir: str | Path | None, layout: str) -> tuple[Any, Any, Base]:
    """All parameters of the model, those of its base, and what the base is."""
    manifest = opened.manifest
    recorded = None if manifest is None else Base.recorded(manifest)
    if manifest is not None and recorded is not None:
        if base_dir is None and recorded.kind == "huggingface":
            base_dir = opened.config_dir
        reader = open_reader(opened.source.path, manifest, base_dir=base_dir, expert_layout=layout)
        return reader, reader.base, Base(recorded.kind, str(reader.base.path), recorded.digest)
    path = opened.config_dir if base_dir is None else Path(base_dir)
    base = Base.of(path, "--hf_dir" if base_dir is None else "--base_dir")
    reader = _reader_of(base, layout)
    _check_base(reader, opened)
    return reader, reader, base


def _reader_of(base: Base, layout: str) -> HFReader | CheckpointReader:
    path = Path(base.path)
    if base.kind == "huggingface":
        return HFReader(path, expert_layout=layout)
    return CheckpointReader(path, verify_directory(path))


def _check_base(reader: HFReader | CheckpointReader, opened: OpenAdapters) -> None:
    """Refuse a base that is not the whole model of the config.

    Raises:
        UserError: naming what it lacks.
    """
    rules = opened.spec.weight_rules(opened.model_config, expert_layout="hub")
    check_parameters(reader, rules, Path(reader.path), opened.config_dir, remedy="name the base of these adapters")


class _MergedOutput(Output):
    """The Hugging Face tensors of one rule with the deltas of their adapters added, and what rounding has lost."""

    def __init__(
        self,
        rule: WeightRule,
        reader: Any,
        dtype: torch.dtype,
        adapters: Mapping[str, Adapter],
        factor: Callable[[str], Tensor],
    ) -> None:
        """
        Args:
            rule: of the tensors.
            reader: of the base.
            dtype: to write.
            adapters: by the name of the adapted Hugging Face tensor.
            factor: gives a factor by its name.
        """
        super().__init__(rule, reader, dtype)
        self._adapters = {name: adapters[name] for name, _ in rule.sources if name in adapters}
        self._factor = factor
        self._squares: dict[str, list[tuple[float, ...]]] = {name: [] for name in self._adapters}

    def describe(self) -> Iterator[Any]:
        """See :class:`~mindspeed_mm.checkpoint.dcp_to_hf.Output`."""
        yield from super().describe()
        yield from ((name, adapter.rank, adapter.scale) for name, adapter in self._adapters.items())

    def jobs(self) -> Iterator[tuple[int, Callable[[], list[tuple[bool, Tensor]]]]]:
        """See :class:`~mindspeed_mm.checkpoint.dcp_to_hf.Output`; base, delta, sum and error are in fp32."""
        for nbytes, job in super().jobs():
            yield nbytes * (3 if self._adapters else 1), job

    def facts(self, name: str) -> dict[str, Any]:
        """Norm of the update, and of what rounding has lost of it."""
        if name not in self._adapters:
            return {}
        # fsum, so that the order in which the threads come does not matter
        update, lost = (math.sqrt(math.fsum(squares)) for squares in zip(*self._squares[name], strict=True))
        return {"update": update, "lost": lost}

    def _rounded(self, name: str, tensor: Tensor, rows: Rows) -> Tensor:
        adapter = self._adapters.get(name)
        if adapter is None:
            return super()._rounded(name, tensor, rows)
        lora_a, lora_b = map(self._factor, adapter.names)
        part = slice(*rows) if self.rule.row_wise else slice(None)
        if adapter.is_experts:
            delta = torch.bmm(lora_a[part], lora_b[part].transpose(1, 2)).mul_(adapter.scale)
        else:
            delta = (lora_b[part] @ lora_a).mul_(adapter.scale)
        base = tensor.to(torch.float32)
        merged = (base + delta).to(self.dtype)
        rounded = base if tensor.dtype == self.dtype else tensor.to(self.dtype).to(torch.float32)
        lost = merged.to(torch.float32, copy=True).sub_(rounded).sub_(delta)
        self._squares[name].append(tuple(float(torch.linalg.vector_norm(values)) ** 2 for values in (delta, lost)))
        return merged


def _print_lost(save: Path, types: set[str], count: int) -> None:
    """Print what rounding has lost of the update, by the record of a merged directory."""
    tensors = read_manifest(save)["metadata"]["tensors"]
    norms = {name: (fact["update"], fact["lost"]) for name, fact in tensors.items() if "update" in fact}
    update, lost = (math.sqrt(math.fsum(norm**2 for norm in each)) for each in zip(*norms.values(), strict=True))
    if update == 0:
        print(f"warning: the adapters of all {counted(count, 'weight')} are zero, so the result is the base")
        return
    name, (most_update, most_lost) = max(norms.items(), key=lambda item: item[1][1] / (item[1][0] or math.inf))
    share = lost / update
    print(f"merged {counted(count, 'adapted weight')}; rounding to {' and '.join(sorted(types))} loses "
          f"{_percent(share)} of the update (|R(W + D) - R(W) - D| / |D|), most in {name} "
          f"({_percent(most_lost / (most_update or math.inf))})")
    if share > _WARN_LOST:
        print(f"warning: rounding loses more than {100 * _WARN_LOST:.0f} % of the update, which is small against the "
              "weights; keep it with --dtype fp32, or serve the adapters without merging them")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 1 else f"{100 * share:.2g} %"


@dataclasses.dataclass(frozen=True)
class AdapterComparison:
    """The result of :func:`verify_lora`.

    Attributes:
        differing: one line for each adapted weight that differs.
        equal: adapted weights whose factors are equal bit for bit.
        close: those whose deltas are equal up to rounding.
        error: the largest relative difference among the latter.
    """

    differing: list[str]
    equal: int
    close: int
    error: float


def verify_lora(lora_dir: str | Path, other_dir: str | Path, *, hf_dir: str | Path | None = None) -> AdapterComparison:
    """Compare the deltas of two sets of adapters, whatever their forms.

    Args:
        lora_dir: checkpoint of a LoRA run, directory with a tracker file, or directory of adapters in any form.
        other_dir: likewise.
        hf_dir: the base model; None for the one that ``lora_dir`` records.

    Raises:
        UserError: if either side cannot be read.
    """
    opened = open_adapters(Path(lora_dir), "--lora_dir", hf_dir)
    first = opened.source
    second = open_adapters(Path(other_dir), "--other_dir", opened.config_dir).source
    ours, theirs = ({a.module: a for a in source.adapters} for source in (first, second))
    differing = [f"{name}: no adapter in {other_dir}" for name in ours.keys() - theirs.keys()]
    differing += [f"{name}: no adapter in {lora_dir}" for name in theirs.keys() - ours.keys()]
    equal, errors = 0, []
    for name, adapter in ours.items():
        if name not in theirs:
            continue
        error = _difference(adapter, first, theirs[name], second)
        if error is None:
            equal += 1
        elif error <= _TOLERANCE:
            errors.append(error)
        else:
            differing.append(f"{name}: the deltas differ by {error:.2g} of their norm")
    return AdapterComparison(sorted(differing), equal, len(errors), max(errors, default=0.0))


def _difference(adapter: Adapter, first: AdapterSource, other: Adapter, second: AdapterSource) -> float | None:
    """Norm of the difference of two deltas relative to the larger one's; None if the factors are equal bit for bit."""
    ours, theirs = ([source.read(name) for name in adapter.names] for source in (first, second))
    if (adapter.rank, adapter.scale) == (other.rank, other.scale) and all(map(torch.equal, ours, theirs)):
        return None
    (in_1, out_1), (in_2, out_2) = (
        [factor.double() if a.is_experts else factor.double()[None] for factor in factors]
        for a, factors in ((adapter, ours), (other, theirs))
    )
    if not adapter.is_experts:
        in_1, in_2 = in_1.mT, in_2.mT
    out_1, out_2 = out_1 * adapter.scale, out_2 * other.scale
    largest = max(_product_norm(in_1, out_1), _product_norm(in_2, out_2))
    difference = _product_norm(torch.cat([in_1, in_2], dim=2), torch.cat([out_1, -out_2], dim=2))
    return difference / largest if largest else 0.0


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of all ``left @ right^T`` ([n, a, r], [n, b, r]) without making them."""
    triangles = [torch.linalg.qr(factor, mode="r").R for factor in (left, right)]
    return float(torch.linalg.vector_norm(triangles[0] @ triangles[1].mT))
