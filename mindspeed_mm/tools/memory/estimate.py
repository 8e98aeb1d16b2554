"""A training step walked through: what is held at its fullest moment.

FSDP2's habits, seen in torch 2.7 to 2.13: a gathered unit exists twice in forward (the buffer of the collective is
kept until the next unit's is copied out) and once in backward; prefetched units exist as that buffer; the buffer of a
reduction is kept until the next reduction begins. A unit with one holder is copied, not gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from mindspeed_mm.tools.memory import activations
from mindspeed_mm.tools.memory.activations import Part
from mindspeed_mm.tools.memory.parameters import Unit, units_of
from mindspeed_mm.tools.memory.plan import MASTER, Plan

Amounts = dict[str, int]
"""Bytes by term, one of ``TERMS``."""

TERMS = {
    "parameters": "parameters, fp32, this process's shards",
    "gradients": "gradients, fp32, this process's shards",
    "optimizer": "AdamW's two moments, fp32, this process's shards",
    "text": "activations kept by decoder layers",
    "experts": "activations kept by experts and dense MLPs",
    "vision": "activations kept by vision blocks and mergers",
    "head": "logits, cross-entropy and their gradients",
    "gathered": "gathered parameters of the running unit, and collectives' buffers of it",
    "prefetched": "buffers of units gathered ahead",
    "reduction": "whole gradients of a unit, and buffers of their reduction",
    "working": "temporary tensors of the running layer",
}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is held at one moment of the step."""

    when: str
    amounts: Amounts

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.amounts.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One process's memory.

    Attributes:
        parameters: bytes of its shards, on the device or on the host.
        gradients: likewise.
        optimizer: likewise.
        after_forward: what is held at the end of forward, when most activations are there.
        peak: the fullest moment on the device.
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
        self.parameters = MASTER * sum(unit.shard() for unit in self.units)
        self.trained = MASTER * sum(unit.shard(training_only=True) for unit in self.units)
        self.static: Amounts = {}
        if not plan.shards_on_host:
            tensors = sum(p.trains for unit in self.units for p in unit.parameters)
            optimizer = 2 * self.trained + 4 * tensors
            self.static = {"parameters": self.parameters, "optimizer": optimizer}
            # gradients of earlier micro-batches are there from the start, those of this one come in backward
            self.static["gradients"] = self.trained if plan.micro_batches > 1 else 0
        self.kept: Amounts = {"text": 0, "experts": 0, "vision": 0, "head": 0}
        self.on_host = 0
        root = self.units[0]
        self.root = plan.compute_bytes * root.gathered()
        if plan.is_single_device:
            copied = sum(unit.gathered() for unit in self.units)
            self.root = plan.compute_bytes * copied if plan.compute_bytes < MASTER else 0
        self.experts = {unit.index: unit for unit in self.units if unit.kind == "experts"}
        self.reducing = 0
        self.stay: list[int] = []

    def moment(self, when: str, **more: int) -> Snapshot:
        amounts = dict.fromkeys(TERMS, 0)
        for part in (self.static, self.kept, more):
            for name, value in part.items():
                amounts[name] += value
        amounts["gathered"] += self.root + sum(self.stay)
        amounts["reduction"] += self.reducing
        return Snapshot(when, amounts)

    def part_of(self, unit: Unit) -> Part:
        """What the unit's modules keep and need; spread experts are counted with their layer."""
        plan = self.plan
        if unit.kind == "vision":
            return activations.vision_block(plan)
        if unit.kind == "merger":
            return activations.merger(plan)
        if unit.kind == "decoder":
            return activations.decoder_layer(plan, unit.index)
        return activations.loss_head(plan) if unit.kind == "head" else Part()

    def has_backward(self, unit: Unit) -> bool:
        """Whether autograd runs through the unit: it trains, or something before it does."""
        plan = self.plan
        if unit.kind == "vision":
            return plan.train_vision
        if unit.kind == "merger":
            return plan.train_vision or plan.train_projector
        return plan.train_text or ((plan.train_vision or plan.train_projector) and unit.kind != "embedding")

    def run_again(self, unit: Unit) -> bool:
        """Whether backward runs the unit's layer again, from its input."""
        plan = self.plan
        if plan.recompute != "full" or unit.kind not in ("vision", "decoder"):
            return False
        return plan.recompute_method == "uniform" or unit.index < plan.recompute_layers

    def keeps(self, unit: Unit, part: Part) -> Amounts:
        """What the unit adds to what is kept."""
        if not self.has_backward(unit):
            return {}
        if self.run_again(unit):
            first = self.plan.recompute_method == "block" or unit.index % self.plan.recompute_layers == 0
            return {"vision" if unit.kind == "vision" else "text": part.inputs if first else 0}
        return self._split(unit, part)

    def _split(self, unit: Unit, part: Part) -> Amounts:
        again = self.plan.recompute == "selective"
        core, inside = (part.core, part.experts) if again else (0, 0)
        if unit.kind in ("vision", "merger"):
            return {"vision": part.kept - core - inside}
        if unit.kind == "head":
            return {"text": part.attention, "head": part.mlp}
        return {"text": part.attention - core, "experts": part.mlp - inside}

    def gathered(self, unit: Unit, *, forward: bool) -> int:
        """The running unit's gathered parameters, and those of its experts where they are spread."""
        if self.plan.is_single_device:
            return 0
        own = [unit, *([self.experts[unit.index]] if unit.kind == "decoder" and unit.index in self.experts else [])]
        copies = [2 if forward and part.holders > 1 else 1 for part in own]
        return self.plan.compute_bytes * sum(n * part.gathered() for n, part in zip(copies, own, strict=True))

    def buffers(self, units: Sequence[Unit]) -> int:
        """Buffers of units that are gathered ahead."""
        return sum(self.plan.compute_bytes * unit.gathered() for unit in units if unit.holders > 1)

    def forward(self) -> Iterator[Snapshot]:
        """All moments of forward; what is kept grows."""
        plan = self.plan
        pixels = activations.patch_embedding(plan)
        yield self.moment("forward, patch embedding", working=pixels.forward)
        self.kept["vision"] += pixels.mlp if plan.train_vision else 0
        units = self.units[1:]
        for position, unit in enumerate(units):
            part = self.part_of(unit)
            own = 1 if unit.kind == "decoder" and unit.index in self.experts else 0
            ahead = units[position + 1 + own : position + 1 + own + plan.forward_prefetch]
            running = {
                "gathered": self.gathered(unit, forward=True),
                "prefetched": self.buffers(ahead),
                "head" if unit.kind == "head" else "working": part.forward,
            }
            inside = 0 if unit.kind == "head" else self._kept_while_running(part)
            yield self.moment(f"forward, {_name(unit)}", **_add(running, {"working": inside}))
            for name, value in self.keeps(unit, part).items():
                on_host = plan.activations_on_host and unit.kind == "decoder"
                self.on_host += value if on_host else 0
                self.kept[name] += 0 if on_host else value
            if not plan.is_single_device and (not plan.reshard or unit.kind == "head"):
                self.stay.append(plan.compute_bytes * unit.gathered())

    def _kept_while_running(self, part: Part) -> int:
        """A layer's tensors exist while it runs forward, though few of them at once where it keeps none."""
        return max(part.attention, part.mlp) // 2 if part.kept else 0

    def backward(self) -> Iterator[Snapshot]:
        """All moments of backward; what is kept shrinks, gradients grow."""
        plan = self.plan
        units = self.units[1:]
        for position in reversed(range(len(units))):
            unit = units[position]
            if not self.has_backward(unit):
                continue
            yield from self._backward_of(unit, units[max(0, position - max(1, plan.backward_prefetch)) : position])
        yield self._reduce(self.units[0], "backward, what is gathered once per step")

    def _backward_of(self, unit: Unit, ahead: Sequence[Unit]) -> Iterator[Snapshot]:
        plan, part = self.plan, self.part_of(unit)
        again, own = self.run_again(unit), self.keeps(unit, part)
        full = self._split(unit, part)
        on_device = not (plan.activations_on_host and unit.kind == "decoder")
        recomputed = sum(full.values()) if again or not on_device else 0
        if plan.recompute == "selective" and unit.kind in ("vision", "decoder"):
            recomputed = part.experts
        if plan.recompute_method == "uniform" and again:
            recomputed *= plan.recompute_layers
        # what stays after forward, as the loss head always does, is there already
        stays = not plan.is_single_device and (not plan.reshard or unit.kind == "head")
        held = {
            "gathered": 0 if stays else self.gathered(unit, forward=False),
            "prefetched": self.buffers(ahead) if plan.reshard else 0,
        }
        gradient = plan.compute_bytes * unit.gathered(training_only=True)
        name = _name(unit)
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
        """The unit's gradients are summed over processes; its gathered parameters are gone."""
        plan = self.plan
        whole, shard = unit.gathered(training_only=True), unit.shard(training_only=True)
        self.reducing = 0 if plan.is_single_device else plan.reduce_bytes * whole
        copies = 2 if unit.axis else 1
        copied = plan.reduce_bytes * whole if plan.kernels.reduction_copies and unit.holders > 1 else 0
        result = plan.reduce_bytes * shard if plan.micro_batches > 1 or plan.shards_on_host else 0
        if plan.micro_batches == 1 and not plan.shards_on_host:
            self.static["gradients"] += MASTER * shard
        return self.moment(when, prefetched=prefetched, reduction=copies * plan.compute_bytes * whole + result + copied)


def _add(first: Amounts, second: Amounts) -> Amounts:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def _name(unit: Unit) -> str:
    names = {"vision": "vision block", "decoder": "decoder layer", "experts": "experts of layer", "merger": "merger"}
    return f"{names[unit.kind]} {unit.index}" if unit.kind in names else {"head": "loss head"}.get(unit.kind, unit.kind)


def estimate(plan: Plan) -> Estimate:
    """Walk one step through."""
    step = _Step(plan)
    forward = max(step.forward(), key=lambda moment: moment.total)
    after = step.moment("end of forward")
    host = step.on_host
    backward = max(step.backward(), key=lambda moment: moment.total)
    trained = step.trained
    tensors = sum(parameter.trains for unit in step.units for parameter in unit.parameters)
    optimizer = 2 * trained + 4 * tensors
    if plan.shards_on_host:
        host += step.parameters + trained + optimizer
    return Estimate(
        parameters=step.parameters,
        gradients=trained,
        optimizer=optimizer,
        after_forward=after,
        peak=max(forward, backward, key=lambda moment: moment.total),
        host=host,
    )
