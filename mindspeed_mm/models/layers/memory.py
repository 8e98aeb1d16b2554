"""Memory and communication of the parts that families share: a decoder with its embeddings and its loss head. No torch.

Legend: c bytes of a number in forward and backward. All other names are written out: widths are in numbers per token,
and activations are per token until they are multiplied by the number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mindspeed_mm.models.layers.config import DecoderConfig
from mindspeed_mm.models.memory import (
    Activations,
    LowRank,
    Parameter,
    Plan,
    Shapes,
    Unit,
    others,
    parameters,
    passes,
)

_ALIGNMENT = 16
"""Bytes to which experts' kernels pad the ranks of adapters."""


def linear_shapes(name: str, inputs: int, outputs: int, *, bias: bool) -> Shapes:
    """Parameters of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def layer_norm_shapes(name: str, width: int) -> Shapes:
    """Parameters of a LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def kept_by_adapters(plan: Plan, count: int, *adapted: LowRank) -> int:
    """Bytes kept by the adapters of linear layers that take ``count`` tokens: x A, and the joined factors."""
    return plan.compute_bytes * sum(count * one.rank + one.size for one in adapted)


def attention_exchange(
    plan: Plan, *, layers: int, tokens: int, query: int, key_value: int, trains: bool
) -> float:
    """Bytes that a rank receives in the all-to-all around the attention of a stack in a micro-batch.

    Args:
        plan: the run.
        layers: of the stack.
        tokens: on this rank.
        query: width of all query heads together.
        key_value: width of all key heads together, which the values have too.
        trains: whether backward runs through the stack.
    """
    recompute = plan.recompute_granularity
    # running the core attention again ends before its result is sent back, which nothing is computed from
    there = (query + 2 * key_value) * passes(trains=trains, again=recompute is not None)
    back = query * passes(trains=trains, again=recompute == "full")
    return layers * tokens * (there + back) * plan.compute_bytes * others(plan.context_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMemory:
    """A decoder's units and exchanges.

    Attributes:
        plan: the run.
        config: of the decoder.
        prefix: of its parameters' names.
        trains: whether its parameters train.
        runs_backward: whether autograd runs through it: it trains, or something before it does.
    """

    plan: Plan
    config: DecoderConfig
    prefix: str
    trains: bool
    runs_backward: bool

    def root_parameters(self) -> Iterator[Parameter]:
        """What is gathered once per step: the final norm, tied embeddings, and norms and routers if aligned."""
        config = self.config
        yield from self._parameters("", {"final_layernorm.weight": (config.hidden_size,)})
        if config.tie_word_embeddings:
            yield from self._parameters(".embedding", self._embedding())
        for index in range(config.num_layers if self.plan.align_fsdp_param_groups else 0):
            yield from self._parameters(f".layers.{index}", _root_group(self._layer(index), belongs=True))

    def units(self) -> Iterator[Unit]:
        """Wrap units in the order of forward, the loss head last."""
        plan, config, shards = self.plan, self.config, self.plan.sharding_size
        if not config.tie_word_embeddings:
            embedding = self._parameters(".embedding", self._embedding())
            yield Unit(name="embedding", kind="embedding", parameters=embedding, shards=shards,
                       runs_backward=self.trains)  # fmt: skip
        kinds = [(config.is_moe_layer(index), *self._adapted(index)) for index in range(config.num_layers)]
        activations = {kind: self.layer_activations(*kind) for kind in set(kinds)}
        for index in range(config.num_layers):
            prefix, shapes = f".layers.{index}", self._layer(index)
            if plan.align_fsdp_param_groups:
                shapes = _root_group(shapes, belongs=False)
            experts = self._experts() if config.is_moe_layer(index) else {}
            expert_unit = None
            if experts and plan.expert_size > 1:
                expert_unit = Unit(
                    name=f"experts of layer {index}", kind="experts", shards=shards // plan.expert_size, axis=1,
                    parameters=self._parameters(prefix, experts, expert_size=plan.expert_size),
                    runs_backward=self.runs_backward,
                )  # fmt: skip
                experts = {}
            yield Unit(
                name=f"decoder layer {index}", kind="layer", index=index, shards=shards, experts=expert_unit,
                parameters=self._parameters(prefix, {**shapes, **experts}),
                activations=activations[kinds[index]], runs_backward=self.runs_backward,
                offloaded=plan.activation_offload,
            )  # fmt: skip
            if expert_unit is not None:
                yield expert_unit
        head = {} if config.tie_word_embeddings else {"output_layer.weight": (config.vocab_size, config.hidden_size)}
        yield Unit(
            name="loss head", kind="head", parameters=self._parameters("", head), shards=shards,
            activations=self.head_activations(), terms=("text", "head"), runs_backward=self.runs_backward,
        )  # fmt: skip

    def exchanges(self) -> dict[str, float]:
        """Bytes that a rank receives in a micro-batch, by collective (see ``tools.memory.communication``)."""
        plan, config = self.plan, self.config
        moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
        permuted = plan.local_tokens * config.num_experts_per_token * plan.imbalance
        one_way = permuted * config.hidden_size * plan.compute_bytes * others(plan.expert_size)
        attention = attention_exchange(
            plan, layers=config.num_layers, tokens=plan.local_tokens, query=config.num_heads * config.head_dim,
            key_value=max(config.num_kv_heads, plan.context_size) * config.head_dim, trains=True,
        )  # fmt: skip
        again = plan.recompute_granularity == "full"
        return {
            "expert_all_to_all": 2 * moe_layers * one_way * passes(trains=True, again=again),
            "context_all_to_all": attention,
        }

    def layer_activations(
        self, sparse: bool, qkv: LowRank, proj: LowRank, first: LowRank, second: LowRank
    ) -> Activations:
        """Of a layer with experts or with an MLP. Products keep their inputs where the weight trains or has adapters.

        Args:
            sparse: whether it has experts.
            qkv: adapters of the joint projection.
            proj: of the projection behind attention.
            first: of the first weight of the experts or the MLP.
            second: of the second.
        """
        plan, config, c, kernels = self.plan, self.config, self.plan.compute_bytes, self.plan.kernels
        width = config.hidden_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        split = plan.context_size > 1
        core = c * query + config.num_heads * kernels.softmax_bytes // (plan.context_size if split else 1)
        # joined segments, and what comes back from the other ranks, are tensors of their own
        separate = kernels.joins_segments or split or plan.recompute_granularity == "selective"
        context = c * query if separate and (self.trains or proj.rank) else 0
        entering = c * width if self.trains or qkv.rank else 0
        # the values are views of the joint projection, which therefore stays as a whole
        joint = c * (query + 2 * max(key, plan.context_size * config.head_dim if split else 0))
        rotated = 0 if split else c * (query + key)
        before_rotary = c * (query + key) if kernels.rotary_keeps_input else 0
        attention = self._norm(width) + entering + joint + rotated + before_rotary + core + context
        if config.qk_layernorm:
            attention += self._norm(query, count=config.num_heads) + self._norm(key, count=config.num_kv_heads)
        working_numbers = 3 * query + 4 * key + 2 * width
        of_mlp = self._expert_activations if sparse else self._mlp_activations
        mlp, experts, forward, backward_mlp = of_mlp(first, second)
        # what enters the router is kept for its weight's gradient; the experts keep the permuted tokens
        into_mlp = c * width if self.trains or (first.rank and not sparse) else 0
        per_token = Activations(
            attention=attention,
            mlp=self._norm(width) + into_mlp + mlp,
            experts=experts,
            core=core,
            # the order of the permuted tokens stays with the graph, whatever is computed again
            inputs=c * width + (16 * config.num_experts_per_token if sparse else 0),
            forward=max(forward, c * (query + 2 * key)) + (0 if kernels.fused_norm else 4 * width),
            backward_mlp=backward_mlp,
            backward_attention=c * working_numbers + (0 if kernels.fused_norm else 8 * max(width, query)),
        )
        factors = self._expert_factors(first, second) if sparse else kept_by_adapters(plan, 0, first, second)
        return per_token.times(plan.local_tokens).plus(
            attention=kept_by_adapters(plan, plan.local_tokens, qkv, proj), mlp=factors, experts=factors
        )

    def head_activations(self) -> Activations:
        """Of the final norm, logits and cross-entropy, whose gradients are made in forward, a chunk at a time."""
        plan, config, c = self.plan, self.config, self.plan.compute_bytes
        width, vocabulary, count = config.hidden_size, config.vocab_size, plan.local_target_tokens
        chunk = min(count, plan.loss_chunk_size or count)
        gradients = c * count * width + (c * vocabulary * width if self.trains else 0)
        sums = vocabulary * width * (4 + c) if chunk < count and self.trains else 0
        # fp32 logits, with the temporary of their log-sum-exp or with their gradient in the compute type
        logits = chunk * vocabulary * (4 + max(4, c))
        return Activations(
            # with the rotary angles, which all layers share
            attention=(self._norm(width) + 2 * c * config.head_dim) * plan.local_tokens,
            mlp=gradients,
            forward=c * count * width + max(logits + sums, chunk * vocabulary * (4 + c) + gradients + sums),
            backward_mlp=gradients,
            backward_attention=3 * c * width * plan.local_tokens,
        )

    def _norm(self, width: int, *, count: int = 1) -> int:
        """RMSNorm of ``width`` numbers in ``count`` groups, per token."""
        written_out = 8 if self.trains else 4
        return (self.plan.compute_bytes if self.plan.kernels.fused_norm else written_out) * width + 4 * count

    def _adapted(self, index: int) -> tuple[LowRank, ...]:
        """Adapters of a layer: of attention's two weights, and of the two of its experts or its MLP."""
        moe = self.config.is_moe_layer(index)
        mlp = ("experts.gate_up_proj", "experts.down_proj") if moe else ("linear_fc1.weight", "linear_fc2.weight")
        names = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", *(f"mlp.{m}" for m in mlp)
        return tuple(self.plan.low_rank(f"{self.prefix}.layers.{index}.{name}") for name in names)

    def _padded(self, rank: int) -> int:
        """The rank with which experts' adapters are computed."""
        multiple = _ALIGNMENT // self.plan.compute_bytes
        return -(-rank // multiple) * multiple

    def _expert_factors(self, *adapted: LowRank) -> int:
        """Bytes of the padded factors of the experts' adapters, which are copies."""
        copies = [one for one in adapted if one.rank != self._padded(one.rank)]
        numbers = sum(one.size // one.rank * self._padded(one.rank) for one in copies)
        return self.plan.compute_bytes * numbers // self.plan.expert_size

    def _expert_activations(self, *adapted: LowRank) -> tuple[int, int, int, int]:
        """(kept behind the norm, of that by the experts, needed in forward, needed in backward), per token."""
        plan, config, c, kernels = self.plan, self.config, self.plan.compute_bytes, self.plan.kernels
        chosen, width, inner = config.num_experts_per_token, config.hidden_size, config.moe_intermediate_size
        here = chosen * (plan.imbalance if plan.expert_size > 1 else 1.0)
        routing = 4 * config.num_experts + (8 + 4 + c + 16) * chosen
        after_swiglu = 0 if kernels.inner_again else inner + (0 if kernels.fused_swiglu else inner)
        low_rank = sum(self._padded(one.rank) for one in adapted)
        inside = c * here * (2 * inner + after_swiglu + low_rank)
        kept = routing + c * here * width + inside + c * chosen * width
        exchanged = c * here * width if plan.expert_size > 1 else 0
        forward = c * chosen * width + exchanged
        fp32_copies = (3 if c < 4 else 1) * 4 * chosen * width if kernels.fp32_weighting else 0
        backward = 2 * c * chosen * width + max(fp32_copies, exchanged + c * here * 2 * inner)
        return round(kept), round(inside), round(forward), round(backward)

    def _mlp_activations(self, first: LowRank, second: LowRank) -> tuple[int, int, int, int]:
        """As :meth:`_expert_activations`, for a dense gated MLP."""
        c, inner = self.plan.compute_bytes, self.config.intermediate_size
        fused = self.plan.kernels.fused_swiglu
        entering_second = inner if self.trains or second.rank else 0
        inside = c * (2 * inner + entering_second + (0 if fused else inner) + first.rank + second.rank)
        return inside, inside, c * inner, c * 4 * inner

    def _parameters(self, suffix: str, shapes: Shapes, *, expert_size: int = 1) -> tuple[Parameter, ...]:
        return parameters(self.prefix + suffix, shapes, trains=self.trains, expert_size=expert_size)

    def _embedding(self) -> Shapes:
        return {"word_embeddings.weight": (self.config.vocab_size, self.config.hidden_size)}

    def _experts(self) -> Shapes:
        config = self.config
        experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        return {
            "mlp.experts.gate_up_proj": (experts, width, 2 * inner),
            "mlp.experts.down_proj": (experts, inner, width),
        }

    def _layer(self, index: int) -> Shapes:
        """Without experts."""
        config = self.config
        width = config.hidden_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = {
            "input_layernorm.weight": (width,),
            **linear_shapes("self_attention.linear_proj", query, width, bias=False),
            **linear_shapes("self_attention.linear_qkv", width, query + 2 * key, bias=False),
            "pre_mlp_layernorm.weight": (width,),
        }
        if config.qk_layernorm:
            shapes["self_attention.q_layernorm.weight"] = (config.head_dim,)
            shapes["self_attention.k_layernorm.weight"] = (config.head_dim,)
        if config.is_moe_layer(index):
            return {**shapes, "mlp.router.weight": (config.num_experts, width)}
        return {
            **shapes,
            **linear_shapes("mlp.linear_fc1", width, 2 * config.intermediate_size, bias=False),
            **linear_shapes("mlp.linear_fc2", config.intermediate_size, width, bias=False),
        }


def _root_group(shapes: Shapes, *, belongs: bool) -> Shapes:
    """Norms and routers, or all but these."""
    return {name: shape for name, shape in shapes.items() if ("norm" in name or "router" in name) is belongs}
