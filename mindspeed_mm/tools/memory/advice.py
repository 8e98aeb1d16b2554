"""Settings with which a run needs less memory, found by estimating the run with them.

Each is named as the user sets it: a launcher's variable, or a field of a file. The flags are changed as the launcher
would change them, and pass the checks of a run. Samples per step stay the same, by gradient accumulation, as far as the
number of ranks allows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from mindspeed_mm.config.checks import context_parallel_sizes, expert_parallel_sizes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.optimizer_state import MomentDtype
from mindspeed_mm.tools.memory.estimate import Estimate, estimate
from mindspeed_mm.tools.memory.plan import Run, units_of

NODE = 8
"""Ranks between which an all-to-all is assumed to be fast."""
TIMES = (2, 4, 8, 16, 32, 64)
"""How many times the ranks of a run are tried."""
SHORTEST = 256
"""Tokens of the shortest samples that are tried."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory of one device, in bytes.

    Attributes:
        size: in all.
        reserve: of it, for the driver, the collective library's buffers and fragmentation.
    """

    size: int
    reserve: int

    @property
    def free(self) -> int:
        """Without what is reserved."""
        return self.size - self.reserve

    def fits(self, result: Estimate) -> bool:
        """Whether a step fits."""
        return result.peak.total <= self.free


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One option of a run to change.

    Attributes:
        topic: of several changes with the same topic a setting has one.
        variables: of the launcher.
        field: of a file, and its value and the file; or the number of ranks.
        note: what the user should know.
        args: fields of the flags.
        fsdp: fields of the FSDP2 file.
        overrides: fields of the plan that depend on the model file.
        times: factor on the ranks.
        one_micro_batch: whether a step becomes a single micro-batch.
    """

    topic: str
    variables: Mapping[str, object] = dataclasses.field(default_factory=dict)
    field: str = ""
    note: str = ""
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fsdp: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: int = 1
    one_micro_batch: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options to change together.

    Attributes:
        text: how the user sets them.
        notes: what the user should know.
        total: peak memory with them, in bytes.
        host: of the host, per rank, in bytes.
        fits: whether that fits into the device.
        changes: these options.
        run: the changed run.
    """

    text: str
    notes: tuple[str, ...]
    total: int
    host: int
    fits: bool
    changes: list[Change] = dataclasses.field(repr=False)
    run: Run = dataclasses.field(repr=False)

    def has_all_of(self, other: Setting) -> bool:
        """Whether the other one's changes are among these."""
        return all(change in self.changes for change in other.changes)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What would help a run.

    Attributes:
        estimate: of the run as it is.
        single: settings of one change, in the order of what they cost in speed.
        fitting: settings with which the run fits, in that order; none if it fits as it is.
    """

    estimate: Estimate
    single: list[Setting]
    fitting: list[Setting]


def advise(run: Run, device: Device) -> Advice:
    """Estimate a run, and with changed options.

    Settings that fit are the single changes that do; if there are none, several changes together; and besides these
    moments in fewer bits, the smallest multiple of the ranks, offload to the host, and LoRA, each with other changes as
    far as they are needed.
    """
    search = _Search(run, device)
    moments, offload = [], []
    if not run.fsdp.offload_to_cpu:
        moments, offload = list(_moments(run)), [_offload(run)]
    others = [*offload, *_lora(run)]
    tried = [(change, search.setting([change])) for change in (*search.changes, _more_ranks(run, 2), *moments, *others)]
    single = _found(*(setting for _, setting in tried))
    if device.fits(search.before):
        return Advice(search.before, single, [])
    first: dict[str, Setting] = {}
    for change, setting in tried[: len(search.changes)]:
        if setting is not None and setting.fits:
            first.setdefault(change.topic, setting)
    fitting = list(first.values())
    if not fitting:
        fitting += _found(search.combined())
    # moments in fewer bits, more ranks or the host are no help to what fits without
    found = _found(search.first(moments), search.more_ranks(), *(search.combined(change) for change in others))
    fitting += [other for other in found if not any(other.has_all_of(setting) for setting in fitting)]
    return Advice(search.before, single, fitting)


def _found(*settings: Setting | None) -> list[Setting]:
    return [setting for setting in settings if setting is not None]


class _Search:
    """Estimates of one run with changed options."""

    def __init__(self, run: Run, device: Device) -> None:
        self.run, self.device = run, device
        self.before = estimate(run.plan)
        self.changes = list(_changes(run))

    def setting(self, changes: Sequence[Change]) -> Setting | None:
        """These changes together; None where a check refuses them, or they change nothing."""
        run = self.run
        try:
            changed = run.changed(
                args={name: value for change in changes for name, value in change.args.items()},
                fsdp={name: value for change in changes for name, value in change.fsdp.items()},
                overrides={name: value for change in changes for name, value in change.overrides.items()},
                world_size=math.prod(change.times for change in changes) * run.world_size,
                samples=1 if any(change.one_micro_batch for change in changes) else run.args.global_batch_size,
            )
        except UserError:
            return None
        if changed.plan == run.plan:
            return None
        result = estimate(changed.plan)
        text, notes = _described(changes, run, changed)
        return Setting(text, notes, result.peak.total, result.host, self.device.fits(result), list(changes), changed)

    def combined(self, fixed: Change | None = None) -> Setting | None:
        """The setting that fits with ``fixed`` and other changes, none of them needless, the slow ones left out first.

        None if there is none. Without ``fixed`` changes that train on something else are tried last.
        """
        taken = [] if fixed is None else [fixed]
        best = self.setting(taken)
        if not self.has_room(taken) or (fixed is not None and best is None):
            return None
        lowest = self.before.peak.total if best is None else best.total
        changes = [*self.changes, *_last_resorts(self.run)] if best is None else _changes(best.run)
        for change in changes:
            if best is not None and best.fits:
                break
            others = [one for one in taken if one.topic != change.topic]
            tried = self.setting([*others, change])
            if tried is not None and tried.total < lowest:
                best, lowest, taken = tried, tried.total, [*others, change]
        if best is None or not best.fits:
            return None
        for change in reversed(taken[:-1]):  # the last one is what made it fit
            tried = None if change is fixed else self.setting([one for one in taken if one is not change])
            if tried is not None and tried.fits:
                best, taken = tried, tried.changes
        return best

    def has_room(self, changes: Sequence[Change]) -> bool:
        """Whether the device can hold the parameters and the optimizer state, which other changes do not make fewer."""
        plan = self.run.plan
        if plan.offload_to_cpu or any(change.topic in ("offload", "lora") for change in changes):
            return True
        optimizer = self.before.optimizer
        for change in changes:
            if change.topic == "moments":
                layout = dataclasses.replace(plan.optimizer_state, **change.args)
                optimizer = sum(unit.optimizer_bytes(layout) for unit in units_of(plan))
        whole = (self.before.parameters + optimizer) * plan.sharding_size
        return whole <= self.device.free * plan.world_size * math.prod(change.times for change in changes)

    def first(self, changes: Sequence[Change]) -> Setting | None:
        """The setting with the first of these changes with which the run fits."""
        tried = (self.combined(change) for change in changes)
        return next((setting for setting in tried if setting is not None), None)

    def more_ranks(self) -> Setting | None:
        """The smallest multiple of the ranks with which the run fits."""
        with_room = [more for more in (_more_ranks(self.run, times) for times in TIMES) if self.has_room([more])]
        # with four times the first of them, parameters and optimizer take a quarter at most: the rest is activations
        return self.first(with_room[:3])


def _described(changes: Sequence[Change], run: Run, changed: Run) -> tuple[str, tuple[str, ...]]:
    """How the user sets the changes, and what to know of them."""
    variables = {name: value for change in changes for name, value in change.variables.items()}
    if changed.plan.micro_batches != run.plan.micro_batches:
        variables["GRAD_ACC_STEP"] = changed.plan.micro_batches
    words = [" ".join(f"{name}={value}" for name, value in variables.items())]
    text = ", ".join(word for word in (*words, *(change.field for change in changes)) if word)
    notes = [change.note for change in changes if change.note]
    if changed.args.global_batch_size != run.args.global_batch_size:
        notes.append(f"{changed.args.global_batch_size} samples per step")
    return text, tuple(notes)


def _fsdp_file(run: Run) -> str:
    return run.args.fsdp2_config_path or "the --fsdp2-config-path file"


def _changes(run: Run) -> Iterator[Change]:
    """All changes that need neither more ranks nor other data, those that cost the least time first."""
    args, plan, file = run.args, run.plan, _fsdp_file(run)
    if plan.loss_chunk_size is None:
        size = run.model.loss_cfg.chunk_size
        yield Change(topic="loss", field=f"loss_cfg.compute_mode: chunk in {args.mm_model}",
                     overrides={"loss_chunk_size": size})  # fmt: skip
    if plan.sharding_size != plan.world_size:
        yield Change(topic="sharding", field=f"sharding_size: auto in {file}", fsdp={"sharding_size": "auto"})
    if not plan.reshard_after_forward:
        yield Change(topic="reshard", field=f"reshard_after_forward: true in {file}",
                     fsdp={"reshard_after_forward": True})  # fmt: skip
    sizes = [
        size for size in expert_parallel_sizes(run.fsdp, run.facts, world_size=run.world_size)
        if size > plan.expert_size
    ]
    near = [size for size in sizes if size <= NODE]
    yield from (_expert_parallel(run, size) for size in near[-1:])
    yield from (
        Change(topic="micro-batch", variables={"MBS": size}, args={"micro_batch_size": size})
        for size in _divided(args.micro_batch_size)
    )
    if plan.recompute_granularity is None:
        yield _recompute("selective")
    if (plan.recompute_granularity, plan.recompute_method, plan.recompute_num_layers) != ("full", "uniform", 1):
        yield _recompute("full")
    yield from (
        Change(topic="context", variables={"CP": size}, args={"context_parallel_size": size})
        for size in context_parallel_sizes(run.facts, world_size=run.world_size)
        if size > plan.context_size and size % plan.context_size == 0
    )
    # for 0 in backward FSDP2 gathers one ahead by itself
    fewest = {"num_to_forward_prefetch": 0, "num_to_backward_prefetch": 1}
    if fewest := {name: value for name, value in fewest.items() if getattr(plan, name) > value}:
        fields = " and ".join(f"{name}: {value}" for name, value in fewest.items())
        yield Change(topic="prefetch", field=f"{fields} in {file}", fsdp=fewest)
    if not plan.activation_offload:
        yield Change(topic="activations", field=f"text_decoder.activation_offload: true in {args.mm_model}",
                     overrides={"activation_offload": True}, note="slow")  # fmt: skip
    yield from (_expert_parallel(run, size) for size in sizes[len(near) : len(near) + 1])


def _more_ranks(run: Run, times: int) -> Change:
    return Change(topic="ranks", field=f"NPUS_PER_NODE x NNODES = {times * run.world_size} devices", times=times)


def _moments(run: Run) -> Iterator[Change]:
    """The optimizer's moments in fewer bits, which an exact resume does not allow to change."""
    dtypes = list(get_args(MomentDtype))
    for dtype in dtypes[dtypes.index(run.args.moment_dtype) + 1 :]:
        yield Change(topic="moments", field=f"--moment-dtype {dtype}", args={"moment_dtype": dtype},
                     note=f"moments rounded to {dtype}")  # fmt: skip


def _offload(run: Run) -> Change:
    return Change(topic="offload", field=f"offload_to_cpu: true in {_fsdp_file(run)}", fsdp={"offload_to_cpu": True},
                  note="slow")  # fmt: skip


def _expert_parallel(run: Run, size: int) -> Change:
    """The flag and the FSDP2 file must agree where both give the size."""
    in_file = run.fsdp.expert_parallel_size is not None
    by_flag = not in_file or "expert_model_parallel_size" in run.args.given
    return Change(
        topic="experts", variables={"EP": size} if by_flag else {},
        field=f"expert_parallel_size: {size} in {_fsdp_file(run)}" if in_file else "",
        args={"expert_model_parallel_size": size},
    )


def _recompute(granularity: str) -> Change:
    return Change(
        topic="recompute", variables={"RECOMPUTE_ARGS": f'"--recompute-granularity {granularity}"'},
        args={"recompute_granularity": granularity, "recompute_method": "uniform", "recompute_num_layers": 1},
    )


def _divided(size: int) -> Iterator[int]:
    """Divisors of ``size``, each the largest one of the number before it."""
    while size > 1:
        size //= next((number for number in range(2, math.isqrt(size) + 1) if size % number == 0), size)
        yield size


def _lora(run: Run) -> Iterator[Change]:
    """Adapters instead of full fine-tuning."""
    if not run.args.lora:
        kept = {} if "frozen_param_dtype" in run.args.given else {"frozen_param_dtype": run.fsdp.param_dtype}
        yield Change(
            topic="lora", variables={"LORA_TARGETS": "all", "LORA_R": 16, "LORA_ALPHA": 32},
            args={"lora_target_modules": "all", "lora_r": 16, "lora_alpha": 32.0, **kept},
            note="trains adapters alone",
        )  # fmt: skip


def _last_resorts(run: Run) -> Iterator[Change]:
    """Changes that train on something else."""
    for length in (run.args.seq_length // 2, run.args.seq_length // 4):
        if length >= SHORTEST:
            yield Change(topic="length", variables={"SEQ_LEN": length}, args={"seq_length": length},
                         note="longer samples are truncated")  # fmt: skip
    if run.plan.micro_batches > 1:
        yield Change(topic="step", one_micro_batch=True)
