"""The estimate as text: its terms, whether it fits, and settings with which it would."""

from __future__ import annotations

import dataclasses

from mindspeed_mm.models.memory import Plan
from mindspeed_mm.tools.memory.advice import Advice, Device, Setting, advise
from mindspeed_mm.tools.memory.communication import COLLECTIVES, volumes
from mindspeed_mm.tools.memory.estimate import TERMS, Estimate, estimate
from mindspeed_mm.tools.memory.plan import Run, units_of

GIB = 2**30
RESERVE_GB = 4.0
"""GiB of a device that the driver, buffers of the collective library and fragmentation are assumed to need."""
MOST_OFFERS = 5
"""Settings in a warning."""


def table(run: Run, device: Device) -> list[str]:
    """The whole report."""
    advice, plan = advise(run, device), run.plan
    return [
        *_heading(plan),
        "",
        *_held(plan, advice.estimate),
        "",
        *_peak(plan, advice.estimate, device),
        verdict(advice.estimate, device),
        "",
        *([] if device.fits(advice.estimate) else [*_offered(advice), ""]),
        *_single(advice),
        "",
        *_exchanged(plan),
    ]


def warning(run: Run, device: Device) -> str | None:
    """One line about a run that is not likely to fit, with settings that do; or None."""
    if device.fits(estimate(run.plan)):
        return None
    advice = advise(run, device)
    offers = "; ".join(_offer(setting) for setting in advice.fitting[:MOST_OFFERS])
    remedy = f"these settings fit, the fastest first: {offers}" if offers else "no setting was found that fits"
    return (
        f"full samples ({run.plan.tokens} tokens per micro-batch) are estimated to need "
        f"{verdict(advice.estimate, device)}; {remedy}. "
        f"Details: python -m mindspeed_mm.tools.memory --nproc {run.world_size} and the launcher's flags"
    )


def _offer(setting: Setting) -> str:
    host = [f"{setting.host / GIB:.0f} GiB of host memory per rank"] if setting.host > GIB else []
    return f"{setting.text} ({', '.join([f'{setting.total / GIB:.1f} GiB', *host, *setting.notes])})"


def _offered(advice: Advice) -> list[str]:
    """Settings with which a run fits that does not fit as it is."""
    if not advice.fitting:
        return ["no setting was found that fits"]
    return ["settings that fit, the fastest first", *(f"  {_offer(setting)}" for setting in advice.fitting)]


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
    terms = _terms(plan)
    lines = [f"{f'persistent memory of each rank, {where}':<72}{'GiB':>9}"]
    for name in ("parameters", "gradients", "optimizer"):
        lines.append(_row(terms[name], getattr(result, name)))
    if result.host and not plan.offload_to_cpu:
        lines.append(_row("activations in host memory", result.host))
    return lines


def _terms(plan: Plan) -> dict[str, str]:
    return {**TERMS, "optimizer": f"{plan.optimizer_state.description}, this rank's shards"}


def _peak(plan: Plan, result: Estimate, device: Device) -> list[str]:
    terms = _terms(plan)
    lines = [f"{f'peak ({result.peak.when})':<72}{'GiB':>9}"]
    amounts = sorted(result.peak.amounts.items(), key=lambda item: -item[1])
    lines += [_row(terms[name], value) for name, value in amounts if value]
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


def _single(advice: Advice) -> list[str]:
    """Changes that save at least 2% of peak memory, the largest saving first."""
    saving = [setting for setting in advice.single if setting.total < 0.98 * advice.estimate.peak.total]
    lines = [f"{'with one change':<72}{'GiB':>9}"]
    for setting in sorted(saving, key=lambda setting: setting.total):
        lines.append(_row(setting.text, setting.total) + ("   fits" if setting.fits else ""))
    return lines


def _exchanged(plan: Plan) -> list[str]:
    lines = [f"{'received by each rank in a step':<72}{'GiB':>9}"]
    return lines + [_row(COLLECTIVES[name], value) for name, value in volumes(plan).items() if value]


def as_json(run: Run, device: Device) -> dict[str, object]:
    """The same as plain values, in bytes."""
    advice = advise(run, device)
    result = advice.estimate
    return {
        "parameters": result.parameters,
        "gradients": result.gradients,
        "optimizer": result.optimizer,
        "host": result.host,
        "peak": {"when": result.peak.when, "total": result.peak.total, **result.peak.amounts},
        "fits": device.fits(result),
        "knobs": [_plain(setting) for setting in advice.single],
        "settings": [_plain(setting) for setting in advice.fitting],
        "received": volumes(run.plan),
    }


def _plain(setting: Setting) -> dict[str, object]:
    return {name: getattr(setting, name) for name in ("text", "notes", "total", "host", "fits")}
