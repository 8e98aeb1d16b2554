"""The estimate as text: its terms, whether it fits, and which options would save memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mindspeed_mm.models.memory import Plan
from mindspeed_mm.models.spec import get_spec
from mindspeed_mm.tools.memory.communication import COLLECTIVES, volumes
from mindspeed_mm.tools.memory.estimate import TERMS, Estimate, estimate
from mindspeed_mm.tools.memory.plan import units_of

GIB = 2**30
RESERVE_GB = 4.0
"""GiB of a device that the driver, buffers of the collective library and fragmentation are assumed to need."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory of one device, in bytes.

    Attributes:
        size: in all.
        reserve: of it, for the driver, the collective library's buffers and fragmentation.
    """

    size: int
    reserve: int

    def fits(self, result: Estimate) -> bool:
        """Whether a step fits."""
        return result.peak.total <= self.size - self.reserve


@dataclasses.dataclass(frozen=True)
class Knob:
    """A change that saves memory: the option to set, and peak memory with it in bytes."""

    text: str
    total: int
    fits: bool


def knobs(plan: Plan, device: Device) -> list[Knob]:
    """Changes that save at least 2% of peak memory, the largest saving first."""
    before = estimate(plan).peak.total
    found = []
    for text, changes in _candidates(plan):
        after = estimate(dataclasses.replace(plan, **changes))
        if after.peak.total < 0.98 * before:
            found.append(Knob(text, after.peak.total, device.fits(after)))
    return sorted(found, key=lambda knob: knob.total)


def _candidates(plan: Plan) -> Iterator[tuple[str, dict[str, object]]]:
    experts, everyone = plan.model_config.num_experts, plan.sharding_size == plan.world_size
    if not everyone:
        yield "sharding_size: auto", {"sharding_size": plan.world_size}
    sharding = 2 * plan.sharding_size if everyone else plan.sharding_size
    yield f"{2 * plan.world_size} ranks", {"world_size": 2 * plan.world_size, "sharding_size": sharding}
    if not plan.offload_to_cpu:
        yield "offload_to_cpu: true (slow: the optimizer then runs on the host)", {"offload_to_cpu": True}
    if plan.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        yield "--recompute-granularity full", full
    if plan.recompute_granularity is None:
        yield "--recompute-granularity selective", {"recompute_granularity": "selective"}
    if not plan.activation_offload:
        yield "activation_offload true", {"activation_offload": True}
    for size in (8, 4, 2) if experts else ():
        if plan.expert_size < size and not plan.sharding_size % size and not experts % size:
            yield f"--expert-model-parallel-size {size}", {"expert_size": size}
            break
    if plan.loss_chunk_size is None:
        yield "compute_mode chunk with chunk_size 1024", {"loss_chunk_size": 1024}
    if plan.num_to_forward_prefetch or plan.num_to_backward_prefetch:
        # for 0 in backward FSDP2 gathers one ahead by itself
        fewest = {"num_to_forward_prefetch": 0, "num_to_backward_prefetch": 1}
        yield ", ".join(f"{name} {value}" for name, value in fewest.items()), fewest
    if plan.compute_bytes < plan.frozen_param_bytes:
        yield "--frozen-param-dtype bf16", {"frozen_param_bytes": plan.compute_bytes}
    training = [part for part in get_spec(plan.model_config.model_type).parts if plan.trains(part)]
    for part in training if len(training) > 1 else ():
        yield f"freeze true in {part}", {"frozen": {*plan.frozen, part}}


def table(plan: Plan, device: Device) -> list[str]:
    """The whole report."""
    result = estimate(plan)
    return [
        *_heading(plan),
        "",
        *_held(plan, result),
        "",
        *_peak(result, device),
        *_advice(plan, device, result),
        "",
        *_exchanged(plan),
    ]


def warning(plan: Plan, device: Device) -> str | None:
    """One line about a run that is not likely to fit, or None."""
    result = estimate(plan)
    if device.fits(result):
        return None
    helping = [knob.text for knob in knobs(plan, device) if knob.fits][:3]
    advice = f"each of these alone would: {'; '.join(helping)}" if helping else "no single change would make it fit"
    return (
        f"full samples ({plan.tokens} tokens per micro-batch) are estimated to need {verdict(result, device)}; "
        f"{advice}. Details: python -m mindspeed_mm.tools.memory --nproc {plan.world_size} and the launcher's flags"
    )


def _row(text: str, value: int) -> str:
    return f"  {text:<70}{value / GIB:>9.2f}"


def _count(parameters: int) -> str:
    """In billions (B), or in millions (M) below half a billion."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 5e8 else f"{parameters / 1e6:.2f} M"


def _heading(plan: Plan) -> list[str]:
    units = units_of(dataclasses.replace(plan, world_size=1, sharding_size=1, expert_size=1))
    whole, trained = (_count(sum(u.shard(training_only=only) for u in units)) for only in (False, True))
    names = {2: "bf16", 4: "fp32"}
    return [
        f"{plan.model_config.model_type}: {whole} parameters, {trained} of them trained; "
        f"{plan.world_size} ranks, parameters over {plan.sharding_size}, experts over {plan.expert_size}, "
        f"a micro-batch over {plan.context_size}",
        f"micro-batch: {plan.tokens} tokens, {plan.patches} patches, {plan.target_tokens} target tokens; "
        f"{plan.micro_batches} per step; computed in {names[plan.compute_bytes]}, gradients summed in "
        f"{names[plan.reduce_bytes]}; recompute: {plan.recompute_granularity or 'none'}",
    ]


def _held(plan: Plan, result: Estimate) -> list[str]:
    where = "in host memory" if plan.offload_to_cpu else "on the device"
    lines = [f"{f'persistent memory of each rank, {where}':<72}{'GiB':>9}"]
    for name in ("parameters", "gradients", "optimizer"):
        lines.append(_row(TERMS[name], getattr(result, name)))
    if result.host and not plan.offload_to_cpu:
        lines.append(_row("activations in host memory", result.host))
    return lines


def _peak(result: Estimate, device: Device) -> list[str]:
    lines = [f"{f'peak ({result.peak.when})':<72}{'GiB':>9}"]
    amounts = sorted(result.peak.amounts.items(), key=lambda item: -item[1])
    lines += [_row(TERMS[name], value) for name, value in amounts if value]
    lines.append(_row("total", result.peak.total))
    return lines


def verdict(result: Estimate, device: Device) -> str:
    """One sentence: whether it fits, and by how much."""
    left = device.size - device.reserve - result.peak.total
    asked = f"{result.peak.total / GIB:.1f} GiB of {device.size / GIB:.0f} GiB"
    rest = f"{device.reserve / GIB:.0f} GiB set aside for the driver, collectives and fragmentation"
    return f"{asked}, with {rest}: " + (
        f"fits, {left / GIB:.1f} GiB are left" if left >= 0 else f"does not fit, {-left / GIB:.1f} GiB are missing"
    )


def _advice(plan: Plan, device: Device, result: Estimate) -> list[str]:
    lines = [verdict(result, device), "", f"{'with one change':<72}{'GiB':>9}"]
    for knob in knobs(plan, device):
        lines.append(_row(knob.text, knob.total) + ("   fits" if knob.fits else ""))
    return lines


def _exchanged(plan: Plan) -> list[str]:
    lines = [f"{'received by each rank in a step':<72}{'GiB':>9}"]
    return lines + [_row(COLLECTIVES[name], value) for name, value in volumes(plan).items() if value]


def as_json(plan: Plan, device: Device) -> dict[str, object]:
    """The same as plain values, in bytes."""
    result = estimate(plan)
    return {
        "parameters": result.parameters,
        "gradients": result.gradients,
        "optimizer": result.optimizer,
        "host": result.host,
        "peak": {"when": result.peak.when, "total": result.peak.total, **result.peak.amounts},
        "fits": device.fits(result),
        "knobs": [dataclasses.asdict(knob) for knob in knobs(plan, device)],
        "received": volumes(plan),
    }
