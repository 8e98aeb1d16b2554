"""LoRA: which weights get adapters, under which names, and in which shapes. Names and shapes are enough: no torch.

An adapter adds a product of two low-rank factors to a frozen weight: ``y = x W + s (x A) B`` with ``s = alpha / r``
(https://arxiv.org/abs/2106.09685), or ``s = alpha / sqrt(r)`` where it is rank-stabilised
(https://arxiv.org/abs/2312.03732).

Legend: r rank, E experts; ``in`` and ``out`` are the widths of what a weight multiplies and gives.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.schema import split_words
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.parameter_rules import ParameterInfo, ParameterRule, Parts, Settings, resolve
from mindspeed_mm.models.state_dict import NamedShape, Shape, WeightRule

LORA_KEY = "lora"
"""Entry of a checkpoint's metadata: :meth:`LoraOptions.recorded` of the run."""
ALL = "all"
LARGEST = 1e6
"""Of ranks and alpha, beyond any use; products of larger ones overflow."""
FACTORS = ("lora_A", "lora_B")
Groups = Mapping[str, Sequence[str]]
"""Name of a group of weights that can be adapted -> globs of their Hugging Face names."""
_WEIGHT = ".weight"
_FLAG = "--lora-target-modules"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What a run adapts.

    Attributes:
        targets: groups, ``all``, globs, or names of modules or of the experts' parameters, of either model.
        r: rank.
        alpha: numerator of the scale.
        expert_r: rank of each expert's adapters.
        use_rslora: divide alpha by the root of the rank instead of by the rank.
        lr_ratio: learning rate of B relative to A's (LoRA+, https://arxiv.org/abs/2402.12354).
        parts: parts of the model that are adapted; the others train in full unless frozen. None for all.
    """

    targets: tuple[str, ...]
    r: int
    alpha: float
    expert_r: int
    use_rslora: bool = False
    lr_ratio: float = 1.0
    parts: tuple[str, ...] | None = None

    @classmethod
    def from_args(cls, args: TrainingArgs) -> LoraOptions | None:
        """The options of the flags; None for full fine-tuning."""
        if not args.lora:
            return None
        return cls(
            targets=(*split_words(args.lora_target_modules), *split_words(args.lora_target_parameters)),
            r=args.lora_r,
            alpha=args.lora_alpha,
            expert_r=args.lora_expert_r or args.lora_r,
            use_rslora=args.lora_use_rslora,
            lr_ratio=args.lora_lr_ratio,
            parts=split_words(args.lora_apply_modules) if args.lora_mixed_training else None,
        )

    def scale(self, rank: int) -> float:
        """Factor on the product of an adapter of this rank."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint records: all that decides names, shapes and products of the adapters."""
        return {
            "r": self.r, "alpha": self.alpha, "expert_r": self.expert_r, "use_rslora": self.use_rslora,
            "targets": list(self.targets),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The two factors of one Hugging Face weight, or of one weight of all experts of a layer.

    Attributes:
        group: that the weight belongs to.
        base: name of the mcore parameter that holds the weight, perhaps with others.
        source: name and shape of the weight in the published Hugging Face layout: of a linear layer ``...weight``
            [out, in], of experts [E, in, out].
        rank: r.
        scale: factor on the product.
        name: of the factors in the mcore model, without ``lora_A`` and ``lora_B``.
    """

    group: str
    base: str
    source: NamedShape
    rank: int
    scale: float
    name: str

    @property
    def is_experts(self) -> bool:
        """Whether it adapts a weight of all experts of a layer."""
        return len(self.source[1]) == 3

    @property
    def module(self) -> str:
        """Hugging Face name of the adapted module, or of the experts' parameter."""
        return self.source[0].removesuffix(_WEIGHT)

    @property
    def key(self) -> str:
        """Last word of :attr:`module`, which tells apart the adapters of one mcore parameter."""
        return self.module.rpartition(".")[2]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of A and of B: [r, in] and [out, r], of experts [E, in, r] and [E, out, r].

        The rank is the last axis of experts' factors, since expert parallelism and FSDP2 cut the first two.
        """
        if self.is_experts:
            experts, inputs, outputs = self.source[1]
            shapes = (experts, inputs, self.rank), (experts, outputs, self.rank)
        else:
            outputs, inputs = self.source[1]
            shapes = (self.rank, inputs), (outputs, self.rank)
        return dict(zip(self.names, shapes, strict=True))

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in the mcore model."""
        lora_a, lora_b = (self.name + factor for factor in FACTORS)
        return lora_a, lora_b

    @property
    def inputs(self) -> int:
        """Width of what the weight multiplies."""
        return self.source[1][1]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def is_adapter(name: str) -> bool:
    """Whether a parameter of the mcore model is a factor of an adapter."""
    return name.endswith(FACTORS)


def plan_adapters(
    options: LoraOptions, rules: Sequence[WeightRule], groups: Groups, *, frozen: Collection[str] = ()
) -> tuple[Adapter, ...]:
    """The adapters of a model, in the order of its parameters.

    Args:
        options: of the run.
        rules: of the model, in the published expert layout.
        groups: of the family.
        frozen: mcore parameters that the user has frozen, which get no adapter.

    Raises:
        UserError: if a target matches nothing that can be adapted, frozen weights only, or one of the two weights of
            experts without the other.
    """
    candidates = list(_candidates(rules, groups))
    chosen: set[str] = set()
    for target in options.targets:
        matched = [c for c in candidates if _matches(target, c, groups)]
        if not matched:
            raise UserError(_explain_no_match(target, rules, groups, candidates))
        if all(c.rule.target in frozen for c in matched):
            raise UserError(
                f"{_FLAG} {target} matches only weights that the model file freezes or --lora-apply-modules leaves "
                f"out, such as {matched[0].rule.target}; set that part's freeze to false, or leave the target out"
            )
        chosen |= {c.source[0] for c in matched if c.rule.target not in frozen}
    adapters = tuple(c.adapter(options) for c in candidates if c.source[0] in chosen)
    _check_experts(adapters, candidates)
    return adapters


def lora_settings(
    options: LoraOptions,
    adapters: Sequence[Adapter],
    rules: Sequence[ParameterRule],
    parameters: Sequence[ParameterInfo],
    *,
    parts: Parts,
) -> Settings:
    """How a LoRA run trains, keeps and saves each parameter: the model's are frozen, its adapters train.

    Args:
        options: of the run.
        adapters: of the model.
        rules: of the user; learning rates of a part are those of its adapters.
        parameters: of the model without adapters.
        parts: of the model.

    Raises:
        UserError: as :func:`~mindspeed_mm.models.parameter_rules.resolve`, or if the rank of experts has no effect.
    """
    if options.expert_r != options.r and not any(adapter.is_experts for adapter in adapters):
        raise UserError(f"--lora-expert-r {options.expert_r} has no effect: no experts are adapted; leave it out, or "
                        f"add {_FLAG} experts")
    in_full = [glob for part in parts if part not in (options.parts or parts) for glob in parts[part]]
    frozen = {info.name for info in parameters if not any(fnmatch.fnmatchcase(info.name, glob) for glob in in_full)}
    factors = [ParameterInfo(name, shape) for adapter in adapters for name, shape in adapter.shapes.items()]
    settings = dict(resolve(rules, [*parameters, *factors], parts=parts, frozen=frozen))
    for name, lr_ratio in ((n, r) for a in adapters for n, r in zip(a.names, (1.0, options.lr_ratio), strict=True)):
        setting = settings[name]
        settings[name] = dataclasses.replace(setting, adapter=True, lr_scale=setting.lr_scale * lr_ratio)
    return settings


def describe(adapters: Sequence[Adapter], rules: Sequence[WeightRule], groups: Groups) -> list[str]:
    """Start-up lines: for each group what is adapted, or that it is not."""
    sizes = {name: [a for a in adapters if a.group == name] for name in groups}
    present = {c.group for c in _candidates(rules, groups)}
    lines = []
    for group, found in sizes.items():
        if group not in present:
            continue
        if not found:
            lines.append(f"LoRA: {group}: NOT adapted")
            continue
        rank, scale = found[0].rank, found[0].scale
        modules = ", ".join(dict.fromkeys(a.key for a in found))
        lines.append(
            f"LoRA: {group}: {len(found)} weights ({modules}), rank {rank}, scale {scale:g}, "
            f"{sum(a.size for a in found):,} parameters"
        )
    total, base = sum(a.size for a in adapters), sum(math.prod(rule.target_shape) for rule in rules)
    return [*lines, f"LoRA: {total:,} parameters in adapters, {100 * total / base:.2f} % of the model's {base:,}"]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A weight that can be adapted."""

    group: str
    rule: WeightRule
    source: NamedShape

    @property
    def module(self) -> str:
        return self.source[0].removesuffix(_WEIGHT)

    def adapter(self, options: LoraOptions) -> Adapter:
        target, experts = self.rule.target, len(self.source[1]) == 3
        rank = options.expert_r if experts else options.r
        name = f"{target}_" if experts else f"{target.removesuffix(_WEIGHT)}.adapters.{self.module.rpartition('.')[2]}."
        return Adapter(group=self.group, base=target, source=self.source, rank=rank, scale=options.scale(rank),
                       name=name)


def _candidates(rules: Sequence[WeightRule], groups: Groups) -> Iterator[_Candidate]:
    matchers = {name: [re.compile(fnmatch.translate(glob)) for glob in globs] for name, globs in groups.items()}
    for rule in rules:
        for source in rule.sources:
            group = next((n for n, globs in matchers.items() if any(glob.match(source[0]) for glob in globs)), None)
            if group is not None and len(source[1]) >= 2:
                yield _Candidate(group, rule, source)


def _matches(target: str, candidate: _Candidate, groups: Groups) -> bool:
    if target == ALL or target in groups:
        return target in (ALL, candidate.group)
    names = candidate.module, candidate.rule.target.removesuffix(_WEIGHT)
    if any(character in target for character in "*?["):
        return any(fnmatch.fnmatchcase(name, target) for name in names)
    # down_proj is a dense layer's module, too, which PEFT adapts and its parameter of the experts does not
    if len(candidate.source[1]) == 3 and target == "down_proj":
        return False
    return any(f".{target}." in f".{name}." for name in names)


def _check_experts(adapters: Sequence[Adapter], candidates: Sequence[_Candidate]) -> None:
    chosen = {adapter.module for adapter in adapters}
    layers: dict[str, list[str]] = {}
    for candidate in candidates:
        if len(candidate.source[1]) == 3:
            layers.setdefault(candidate.module.rpartition(".")[0], []).append(candidate.module)
    for modules in layers.values():
        missing = [name for name in modules if name not in chosen]
        if missing and len(missing) < len(modules):
            adapted = next(name for name in modules if name in chosen)
            raise UserError(
                f"{_FLAG} adapts {adapted} without {missing[0]}: PEFT's file format cannot tell the two apart, and "
                "vLLM refuses one alone; name both, or the word experts"
            )


def _explain_no_match(
    target: str, rules: Sequence[WeightRule], groups: Groups, candidates: Sequence[_Candidate]
) -> str:
    present = list(dict.fromkeys(c.group for c in candidates))
    words = f"choose of {', '.join((*present, ALL))}, or names such as {', '.join(_short_names(candidates))}"
    if "experts" in present and target.rpartition(".")[2] in ("mlp", "gate_proj", "up_proj", "down_proj"):
        return (f"{_FLAG} {target} matches nothing: the feed-forward layers of this model are routed experts; use the "
                "word experts in place of mlp, gate_proj, up_proj and down_proj")
    if target == "all-linear":
        return f"{_FLAG} {target} is PEFT's word; use {ALL}, which adapts the experts, too"
    if target in groups:
        return f"{_FLAG} {target} matches nothing: this model has no such weights; {words}"
    names = [name for rule in rules for name in (rule.target, *(source for source, _ in rule.sources))]
    others = [name for name in names if f".{target}." in f".{name}." or fnmatch.fnmatchcase(name, target)]
    if others:
        return f"{_FLAG} {target} matches {others[0]}, which is not a linear layer that can be adapted; {words}"
    near = difflib.get_close_matches(target, [*present, ALL, *_short_names(candidates)], n=1, cutoff=0.6)
    return f"{_FLAG} {target} matches nothing in this model; " + (f"did you mean {near[0]}?" if near else words)


def _short_names(candidates: Sequence[_Candidate]) -> list[str]:
    names = [c.module.rpartition(".")[2] for c in candidates if len(c.source[1]) == 2]
    names += [c.rule.target.removesuffix(_WEIGHT).rpartition(".")[2] for c in candidates if len(c.source[1]) == 2]
    return list(dict.fromkeys(names))
