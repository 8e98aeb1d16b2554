"""Peak memory of a training step: a walk over the model's wrap units, forward and backward.

FSDP2 as of torch 2.7 to 2.13: a gathered unit exists twice in forward (the buffer of the collective is kept until the
next unit's is copied out) and once in backward; prefetched units exist as that buffer; the buffer of a reduction is
kept until the next reduction begins. A unit that is not sharded is copied, not gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from mindspeed_mm.models.memory import MASTER_BYTES, Activations, Plan, Unit
from mindspeed_mm.tools.memory.plan import units_of

Amounts = dict[str, int]
"""Bytes by term, one of ``TERMS``."""

TERMS = {
    "parameters": "parameters, this rank's shards",
    "gradients": "gradients, fp32, this rank's shards",
    "optimizer": "optimizer state, this rank's shards",
    "text": "activations kept by decoder layers",
    "experts": "activations kept by experts and dense MLPs",
    "vision": "activations kept by vision blocks and mergers",
    "head": "logits, cross-entropy and their gradients",
    "gathered": "unsharded parameters of the running unit, and all-gather buffers",
    "prefetched": "all-gather buffers of prefetched units",
    "reduction": "unsharded gradients of a unit, and reduce-scatter buffers",
    "working": "temporary tensors of the running layer",
}


_NOTHING: Amounts = dict.fromkeys(TERMS, 0)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Memory at one moment of the step."""

    when: str
    amounts: Amounts

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.amounts.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One rank's memory.

    Attributes:
        parameters: bytes of its shards, on the device or on the host.
        gradients: likewise.
        optimizer: likewise.
        after_forward: memory at the end of forward, when most activations are there.
        peak: the moment of most memory on the device.
        host: bytes in the host's memory, shards and activations.
    """

    parameters: int
    gradients: int
    optimizer: int
    after_forward: Snapshot
    peak: Snapshot
    host: int


class _Step:
    """Walks one micro-batch, the last, through the model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.units = units_of(plan)
        trained, everything = (sum(unit.shard(training_only=only) for unit in self.units) for only in (True, False))
        self.trained = MASTER_BYTES * trained
        self.parameters = self.trained + plan.frozen_param_bytes * (everything - trained)
        self.optimizer = sum(unit.optimizer_bytes(plan.optimizer_state) for unit in self.units)
        self.static: Amounts = {}
        if not plan.offload_to_cpu:
            self.static = {"parameters": self.parameters, "optimizer": self.optimizer}
            # gradients of earlier micro-batches are there from the start, those of this one come in backward
            self.static["gradients"] = self.trained if plan.micro_batches > 1 else 0
        self.kept: Amounts = {"text": 0, "experts": 0, "vision": 0, "head": 0}
        self.on_host = 0
        root = self.units[0]
        self.root = plan.compute_bytes * root.gathered()
        if plan.is_single_device:
            in_compute_type = plan.frozen_param_bytes == plan.compute_bytes
            copied = sum(unit.gathered(training_only=in_compute_type) for unit in self.units)
            self.root = plan.compute_bytes * copied if plan.compute_bytes < MASTER_BYTES else 0
        self.reducing = 0
        self.stay: list[int] = []

    def moment(self, when: str, **more: int) -> Snapshot:
        amounts = {**_NOTHING, **self.static, **self.kept}
        for name, value in more.items():
            amounts[name] += value
        amounts["gathered"] += self.root + sum(self.stay)
        amounts["reduction"] += self.reducing
        return Snapshot(when, amounts)

    def run_again(self, unit: Unit) -> bool:
        """Whether backward runs the unit's layer again, from its input."""
        plan = self.plan
        if plan.recompute_granularity != "full" or unit.kind != "layer":
            return False
        return plan.recompute_method == "uniform" or unit.index < plan.recompute_num_layers

    def keeps(self, unit: Unit) -> Amounts:
        """What the unit adds to the kept activations."""
        if not unit.runs_backward:
            return {}
        if self.run_again(unit):
            first = self.plan.recompute_method == "block" or unit.index % self.plan.recompute_num_layers == 0
            return {unit.terms[0]: unit.activations.inputs if first else 0}
        return self._kept_by_term(unit)

    def _kept_by_term(self, unit: Unit) -> Amounts:
        kept = unit.activations
        again = self.plan.recompute_granularity == "selective"
        core, inside = (kept.core, kept.experts) if again else (0, 0)
        return _add({unit.terms[0]: kept.attention - core}, {unit.terms[1]: kept.mlp - inside})

    def gathered(self, unit: Unit, *, forward: bool) -> int:
        """The running unit's gathered parameters, and those of the experts that are wrapped within it."""
        if self.plan.is_single_device:
            return 0
        own = [unit] if unit.experts is None else [unit, unit.experts]
        copies = [2 if forward and one.shards > 1 else 1 for one in own]
        return self.plan.compute_bytes * sum(n * one.gathered() for n, one in zip(copies, own, strict=True))

    def buffers(self, units: Sequence[Unit]) -> int:
        """Buffers of units that are gathered ahead."""
        return sum(self.plan.compute_bytes * unit.gathered() for unit in units if unit.shards > 1)

    def forward(self) -> Iterator[Snapshot]:
        """All moments of forward; kept activations grow."""
        plan = self.plan
        root = self.units[0]
        yield self.moment(f"forward, {root.name}", working=root.activations.forward)
        for name, value in self.keeps(root).items():
            self.kept[name] += value
        units = self.units[1:]
        for position, unit in enumerate(units):
            own = 0 if unit.experts is None else 1
            ahead = units[position + 1 + own : position + 1 + own + plan.num_to_forward_prefetch]
            held = {"gathered": self.gathered(unit, forward=True), "prefetched": self.buffers(ahead)}
            if plan.kernels.collective_copies:
                copied = {"prefetched": self.buffers(ahead[-1:])}
                yield self.moment(f"all-gather before {unit.name}", **_add(held, copied))
            running = {
                **held,
                "head" if unit.kind == "head" else "working": unit.activations.forward,
            }
            inside = 0 if unit.kind == "head" else self._kept_while_running(unit.activations)
            yield self.moment(f"forward, {unit.name}", **_add(running, {"working": inside}))
            for name, value in self.keeps(unit).items():
                self.on_host += value if unit.offloaded else 0
                self.kept[name] += 0 if unit.offloaded else value
            if not plan.is_single_device and (not plan.reshard_after_forward or unit.kind == "head"):
                self.stay.append(plan.compute_bytes * unit.gathered())

    def _kept_while_running(self, kept: Activations) -> int:
        """A layer's tensors exist while it runs forward, though few of them at once where it keeps none."""
        return max(kept.attention, kept.mlp) // 2

    def backward(self) -> Iterator[Snapshot]:
        """All moments of backward; kept activations shrink, gradients grow."""
        plan = self.plan
        units = self.units[1:]
        first = next((position for position, unit in enumerate(units) if unit.runs_backward), len(units))
        for position in reversed(range(first, len(units))):
            unit = units[position]
            if not unit.runs_backward:
                continue
            ahead = max(1, plan.num_to_backward_prefetch)  # for 0 FSDP2 gathers one ahead by itself
            yield from self._backward_of(unit, units[max(first, position - ahead) : position])
        yield self._reduce(self.units[0], "backward, what is gathered once per step")

    def _backward_of(self, unit: Unit, ahead: Sequence[Unit]) -> Iterator[Snapshot]:
        plan, part, name = self.plan, unit.activations, unit.name
        again, own = self.run_again(unit), self.keeps(unit)
        full = self._kept_by_term(unit)
        on_device = not unit.offloaded
        recomputed = sum(full.values()) if again or not on_device else 0
        if plan.recompute_granularity == "selective" and unit.kind == "layer":
            recomputed = part.experts
        if plan.recompute_method == "uniform" and again:
            recomputed *= plan.recompute_num_layers
        # what stays after forward, as the loss head always does, is there already
        stays = not plan.is_single_device and (not plan.reshard_after_forward or unit.kind == "head")
        held = {
            "gathered": 0 if stays else self.gathered(unit, forward=False),
            "prefetched": self.buffers(ahead) if plan.reshard_after_forward else 0,
        }
        gradient = plan.compute_bytes * unit.gathered(training_only=True)
        working = part.backward_mlp
        yield self.moment(f"backward, {name}", **_add(held, {"working": working + recomputed}))
        # the MLP's activations are gone, its weights' gradients are there
        gone = min(recomputed, part.mlp) if recomputed else 0
        if on_device and not recomputed:
            self.kept["experts"] -= full.get("experts", 0)
            own = {key: value for key, value in own.items() if key != "experts"}
        working = part.backward_attention + recomputed - gone
        yield self.moment(f"backward, {name}", **_add(held, {"working": working, "reduction": gradient}))
        for key, value in own.items():
            self.kept[key] -= value if on_device else 0
        if stays:
            self.stay.pop()
        yield self._reduce(unit, f"reduction of {name}", prefetched=held["prefetched"])

    def _reduce(self, unit: Unit, when: str, *, prefetched: int = 0) -> Snapshot:
        """The unit's gradients are reduced over ranks; its gathered parameters are freed."""
        plan = self.plan
        whole, shard = unit.gathered(training_only=True), unit.shard(training_only=True)
        self.reducing = 0 if plan.is_single_device else plan.reduce_bytes * whole
        copies = 2 if unit.axis else 1
        copied = plan.reduce_bytes * whole if plan.kernels.collective_copies and unit.shards > 1 else 0
        result = plan.reduce_bytes * shard if plan.micro_batches > 1 or plan.offload_to_cpu else 0
        if plan.micro_batches == 1 and not plan.offload_to_cpu:
            self.static["gradients"] += MASTER_BYTES * shard
        return self.moment(when, prefetched=prefetched, reduction=copies * plan.compute_bytes * whole + result + copied)


def _add(first: Amounts, second: Amounts) -> Amounts:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def estimate(plan: Plan) -> Estimate:
    """Walk one step through."""
    step = _Step(plan)
    forward = max(step.forward(), key=lambda moment: moment.total)
    after = step.moment("end of forward")
    host = step.on_host
    backward = max(step.backward(), key=lambda moment: moment.total)
    trained = step.trained
    if plan.offload_to_cpu:
        host += step.parameters + trained + step.optimizer
    return Estimate(
        parameters=step.parameters,
        gradients=trained,
        optimizer=step.optimizer,
        after_forward=after,
        peak=max(forward, backward, key=lambda moment: moment.total),
        host=host,
    )
