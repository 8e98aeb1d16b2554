"""What the parts of the model keep for backward, and what they need while they run, in bytes on one process.

Legend: c bytes of a number in forward and backward. All other names are written out: widths are in numbers per token or
per patch, and a part is per token or per patch until it is multiplied by their count.
"""

from __future__ import annotations

import dataclasses

from mindspeed_mm.tools.memory.plan import Plan


@dataclasses.dataclass(frozen=True)
class Part:
    """A layer or another part that autograd runs through.

    Attributes:
        attention: kept for backward by attention and its norm.
        mlp: kept by the experts or the MLP, and their norm.
        experts: how much of ``mlp`` belongs to the experts or the MLP themselves, which ``selective`` computes again.
        core: how much of ``attention`` belongs to the core attention, which ``selective`` computes again.
        inputs: what ``full`` keeps instead.
        forward: needed besides while forward runs.
        backward_mlp: needed besides while backward of the MLP or the experts runs.
        backward_attention: needed besides while backward of attention runs.
    """

    attention: int = 0
    mlp: int = 0
    experts: int = 0
    core: int = 0
    inputs: int = 0
    forward: int = 0
    backward_mlp: int = 0
    backward_attention: int = 0

    @property
    def kept(self) -> int:
        """All that is kept where nothing is computed again."""
        return self.attention + self.mlp

    @property
    def kept_selectively(self) -> int:
        """What is kept where the core attention and the experts are computed again."""
        return self.kept - self.experts - self.core


def _norm(plan: Plan, width: int, *, rows: int = 1) -> int:
    """RMSNorm over ``rows`` parts of ``width`` numbers, per token."""
    written_out = 8 if plan.train_text else 4
    return (plan.compute_bytes if plan.kernels.fused_norm else written_out) * width + 4 * rows


def decoder_layer(plan: Plan, layer: int) -> Part:
    """A decoder layer. Where it does not train, products need not keep what went into them."""
    text, c, kernels = plan.model_config.text, plan.compute_bytes, plan.kernels
    width, query, key = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shared = plan.context_size > 1
    core = c * query + text.num_heads * kernels.softmax_bytes // (plan.context_size if shared else 1)
    # joined segments, and what comes back from the other processes, are tensors of their own
    separate = kernels.joins_segments or shared or plan.recompute == "selective"
    context = c * query if separate and plan.train_text else 0
    entering = c * width if plan.train_text else 0
    # the values are views of the joint projection, which therefore stays as a whole
    joint = c * (query + 2 * max(key, plan.context_size * text.head_dim if shared else 0))
    rotated = 0 if shared else c * (query + key)
    before_rotary = c * (query + key) if kernels.rotary_keeps_input else 0
    attention = (
        _norm(plan, width) + entering + joint + rotated + before_rotary + core + context
        + _norm(plan, query, rows=text.num_heads) + _norm(plan, key, rows=text.num_kv_heads)
    )  # fmt: skip
    working_numbers = 3 * query + 4 * key + 2 * width
    backward_attention = c * working_numbers + (0 if kernels.fused_norm else 8 * max(width, query))
    sparse = text.is_moe_layer(layer)
    mlp, experts, forward, backward_mlp = _experts(plan) if sparse else _dense(plan, text.intermediate_size)
    per_token = Part(
        attention=attention,
        mlp=_norm(plan, width) + entering + mlp,
        experts=experts,
        core=core,
        # the order of the rows stays with the graph, whatever is computed again
        inputs=c * width + (16 * text.num_experts_per_token if sparse else 0),
        forward=max(forward, c * (query + 2 * key)) + (0 if kernels.fused_norm else 4 * width),
        backward_mlp=backward_mlp,
        backward_attention=backward_attention,
    )
    return _times(per_token, plan.local_tokens)


def _experts(plan: Plan) -> tuple[int, int, int, int]:
    """(kept behind the norm, of that by the experts, needed in forward, needed in backward), per token."""
    text, c, kernels = plan.model_config.text, plan.compute_bytes, plan.kernels
    rows, width, inner = text.num_experts_per_token, text.hidden_size, text.moe_intermediate_size
    here = rows * (plan.imbalance if plan.expert_size > 1 else 1.0)
    routing = 4 * text.num_experts + (8 + 4 + c + 16) * rows
    after_swiglu = 0 if kernels.inner_again else inner + (0 if kernels.fused_swiglu else inner)
    inside = c * here * (2 * inner + after_swiglu)
    kept = routing + c * here * width + inside + c * rows * width
    exchanged = c * here * width if plan.expert_size > 1 else 0
    forward = c * rows * width + exchanged
    fp32_copies = (3 if c < 4 else 1) * 4 * rows * width if kernels.fp32_weighting else 0
    backward = 2 * c * rows * width + max(fp32_copies, exchanged + c * here * 2 * inner)
    return round(kept), round(inside), round(forward), round(backward)


def _dense(plan: Plan, inner: int) -> tuple[int, int, int, int]:
    """As :func:`_experts`, for a dense gated MLP."""
    c = plan.compute_bytes
    inside = c * (2 * inner + (inner if plan.train_text else 0) + (0 if plan.kernels.fused_swiglu else inner))
    return inside, inside, c * inner, c * 4 * inner


def vision_block(plan: Plan) -> Part:
    """A vision block."""
    vision, c = plan.model_config.vision, plan.compute_bytes
    width, inner = vision.hidden_size, vision.intermediate_size
    core = c * width + vision.num_heads * plan.kernels.softmax_bytes
    context = c * width if plan.kernels.joins_segments or plan.context_size > 1 or plan.recompute == "selective" else 0
    before_rotary = 2 * c * width if plan.kernels.rotary_keeps_input else 0
    norm = c * width + 8
    per_patch = Part(
        attention=norm + c * (width + 3 * width + 2 * width) + before_rotary + core + context,
        mlp=norm + c * (width + 2 * inner),
        experts=2 * c * inner,
        core=core,
        inputs=c * width,
        # the rotary product is fp32
        forward=max(c * 2 * inner, 3 * c * width + 4 * 3 * width),
        backward_mlp=2 * c * inner,
        backward_attention=c * 4 * width + 4 * 3 * width,
    )
    part = _times(per_patch, plan.local_patches)
    if plan.recompute == "selective":
        part = dataclasses.replace(part, experts=2 * c * inner * plan.local_patches)
    return part


def merger(plan: Plan) -> Part:
    """One of the mergers; its MLP is as wide as the patches that it merges."""
    vision, c = plan.model_config.vision, plan.compute_bytes
    numbers = plan.local_patches * vision.hidden_size
    results = plan.local_patches // vision.merge_unit * vision.out_hidden_size
    return Part(mlp=4 * c * numbers, forward=3 * c * numbers + c * results, backward_mlp=3 * c * numbers)


def patch_embedding(plan: Plan) -> Part:
    """Pixels -> the tower's input, with its position embeddings."""
    vision, c = plan.model_config.vision, plan.compute_bytes
    pixels = plan.local_patches * vision.patch_dim
    positions = 4 * plan.local_patches * vision.hidden_size
    return Part(mlp=c * pixels, forward=max(3 * 4 * pixels, (c + 4 + 4) * positions), backward_mlp=(c + 4) * positions)


def loss_head(plan: Plan) -> Part:
    """Final norm, logits and cross-entropy, whose gradients are made in forward; a chunk's logits exist at a time."""
    text, c = plan.model_config.text, plan.compute_bytes
    width, vocabulary, count = text.hidden_size, text.vocab_size, plan.local_target_tokens
    chunk = min(count, plan.loss_chunk or count)
    chunked = chunk < count
    gradients = c * count * width + (c * vocabulary * width if plan.train_text else 0)
    sums = vocabulary * width * (4 + c) if chunked and plan.train_text else 0
    # fp32 logits, with the temporary of their log-sum-exp or with their gradient in the compute type
    logits = chunk * vocabulary * (4 + max(4, c))
    return Part(
        # with the rotary angles, which all layers share
        attention=(_norm(plan, width) + 2 * c * text.head_dim) * plan.local_tokens,
        mlp=gradients,
        forward=c * count * width + max(logits + sums, chunk * vocabulary * (4 + c) + gradients + sums),
        backward_mlp=gradients,
        backward_attention=3 * c * width * plan.local_tokens,
    )


def _times(part: Part, count: int) -> Part:
    return Part(*(value * count for value in dataclasses.astuple(part)))
