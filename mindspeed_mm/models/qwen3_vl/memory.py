"""Memory and communication of Qwen3-VL, for the estimate. No torch.

Legend: c bytes of a number in forward and backward. Widths are in numbers per patch, and activations are per patch
until they are multiplied by the number of patches.
"""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed_mm.models.layers.memory import (
    DecoderMemory,
    attention_exchange,
    kept_by_adapters,
    layer_norm_shapes,
    linear_shapes,
)
from mindspeed_mm.models.memory import Activations, Plan, Shapes, Unit, others, parameters, passes
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig

ENCODER, PROJECTOR, DECODER = "vision_encoder", "vision_projector", "text_decoder"
_PREFIX = {part: f"image_encoder.{part}" for part in (ENCODER, PROJECTOR)}
_BLOCK_LINEARS = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"


def memory_units(plan: Plan) -> Iterator[Unit]:
    """See :meth:`mindspeed_mm.models.spec.ModelSpec.memory_units`."""
    vision, shards = plan.model_config.vision, plan.sharding_size
    decoder = _decoder(plan)
    encoder, projector = _PREFIX[ENCODER], _PREFIX[PROJECTOR]
    embedding = {
        **linear_shapes("patch_embed.proj", vision.patch_dim, vision.hidden_size, bias=True),
        "pos_embed.weight": (vision.num_position_embeddings, vision.hidden_size),
    }
    yield Unit(
        name="patch embedding", kind="root", shards=shards, terms=("vision", "vision"),
        parameters=(*parameters(encoder, embedding, trains=plan.trains(ENCODER)), *decoder.root_parameters()),
        activations=_patch_embedding(plan), runs_backward=plan.trains(ENCODER),
    )  # fmt: skip
    shapes = _block_shapes(vision)
    for index in range(vision.depth):
        yield Unit(
            name=f"vision block {index}", kind="layer", index=index, shards=shards, terms=("vision", "vision"),
            parameters=parameters(f"{encoder}.layers.{index}", shapes, trains=plan.trains(ENCODER)),
            activations=_block(plan, f"{encoder}.layers.{index}"), runs_backward=plan.trains(ENCODER),
        )  # fmt: skip
    mergers = ["merger", *(f"deepstack_mergers.{index}" for index in range(len(vision.deepstack_visual_indexes)))]
    for index, name in enumerate(mergers):
        shapes = _merger_shapes(vision, norm_after_merge=index > 0)
        yield Unit(
            name=f"merger {index}", kind="module", shards=shards, terms=("vision", "vision"),
            parameters=parameters(f"{projector}.{name}", shapes, trains=plan.trains(PROJECTOR)),
            activations=_merger(plan, f"{projector}.{name}"), runs_backward=plan.trains(ENCODER, PROJECTOR),
        )  # fmt: skip
    yield from decoder.units()


def memory_exchanges(plan: Plan) -> dict[str, float]:
    """See :meth:`mindspeed_mm.models.spec.ModelSpec.memory_exchanges`."""
    vision, exchanges = plan.model_config.vision, _decoder(plan).exchanges()
    exchanges["context_all_to_all"] += attention_exchange(
        plan, layers=vision.depth, tokens=_local_patches(plan), query=vision.hidden_size, key_value=vision.hidden_size,
        trains=_learns(plan, ENCODER),
    )  # fmt: skip
    merged = plan.patches // vision.merge_unit * (1 + len(vision.deepstack_visual_indexes))
    times = passes(trains=_learns(plan, ENCODER) or _learns(plan, PROJECTOR), again=False)
    gathered = times * merged * vision.out_hidden_size * plan.compute_bytes * others(plan.context_size)
    return {**exchanges, "vision_all_gather": gathered}


def _decoder(plan: Plan) -> DecoderMemory:
    return DecoderMemory(
        plan=plan, config=plan.model_config.text, prefix=DECODER, trains=plan.trains(DECODER),
        runs_backward=plan.trains(ENCODER, PROJECTOR, DECODER),
    )  # fmt: skip


def _learns(plan: Plan, part: str) -> bool:
    """Whether a part of the vision tower trains or has adapters."""
    return plan.trains(part) or plan.adapts(_PREFIX[part])


def _local_patches(plan: Plan) -> int:
    """Patches on this rank; one merge block stands for none."""
    unit = plan.model_config.vision.merge_unit
    return max(1, -(-plan.patches // (unit * plan.context_size))) * unit


def _block_shapes(vision: Qwen3VLVisionConfig) -> Shapes:
    width = vision.hidden_size
    return {
        **layer_norm_shapes("input_layernorm", width),
        **linear_shapes("self_attention.linear_proj", width, width, bias=True),
        **linear_shapes("self_attention.linear_qkv", width, 3 * width, bias=True),
        **layer_norm_shapes("pre_mlp_layernorm", width),
        **linear_shapes("mlp.linear_fc1", width, vision.intermediate_size, bias=True),
        **linear_shapes("mlp.linear_fc2", vision.intermediate_size, width, bias=True),
    }


def _merger_shapes(vision: Qwen3VLVisionConfig, *, norm_after_merge: bool) -> Shapes:
    merged = vision.hidden_size * vision.merge_unit
    return {
        **layer_norm_shapes("norm", merged if norm_after_merge else vision.hidden_size),
        **linear_shapes("linear_fc1", merged, merged, bias=True),
        **linear_shapes("linear_fc2", merged, vision.out_hidden_size, bias=True),
    }


def _patch_embedding(plan: Plan) -> Activations:
    """Pixels -> the tower's input, with its position embeddings."""
    vision, c, patches = plan.model_config.vision, plan.compute_bytes, _local_patches(plan)
    pixels, positions = patches * vision.patch_dim, 4 * patches * vision.hidden_size
    return Activations(
        mlp=c * pixels, forward=max(3 * 4 * pixels, (c + 4 + 4) * positions), backward_mlp=(c + 4) * positions
    )


def _block(plan: Plan, name: str) -> Activations:
    """A vision block. Products keep their inputs where the weight trains or has adapters."""
    vision, c, kernels = plan.model_config.vision, plan.compute_bytes, plan.kernels
    width, inner, selective = vision.hidden_size, vision.intermediate_size, plan.recompute_granularity == "selective"
    adapted = [plan.low_rank(f"{name}.{linear}.weight") for linear in _BLOCK_LINEARS]
    into_qkv, into_proj, into_fc1, into_fc2 = (plan.trains(ENCODER) or one.rank > 0 for one in adapted)
    core = c * width + vision.num_heads * kernels.softmax_bytes
    context = c * width if (kernels.joins_segments or plan.context_size > 1 or selective) and into_proj else 0
    before_rotary = 2 * c * width if kernels.rotary_keeps_input else 0
    norm = c * width + 8
    per_patch = Activations(
        attention=norm + c * (into_qkv * width + 3 * width + 2 * width) + before_rotary + core + context,
        mlp=norm + c * (into_fc1 * width + (1 + into_fc2) * inner),
        experts=c * (1 + into_fc2) * inner,
        core=core,
        inputs=c * width,
        # the rotary product is fp32
        forward=max(c * 2 * inner, 3 * c * width + 4 * 3 * width),
        backward_mlp=2 * c * inner,
        backward_attention=c * 4 * width + 4 * 3 * width,
    )
    patches = _local_patches(plan)
    of_mlp = kept_by_adapters(plan, patches, *adapted[2:])
    return per_patch.times(patches).plus(
        attention=kept_by_adapters(plan, patches, *adapted[:2]), mlp=of_mlp, experts=of_mlp
    )


def _merger(plan: Plan, name: str) -> Activations:
    """One of the mergers; its MLP is as wide as the patches that it merges."""
    vision, c, patches = plan.model_config.vision, plan.compute_bytes, _local_patches(plan)
    numbers = patches * vision.hidden_size
    results = patches // vision.merge_unit * vision.out_hidden_size
    adapted = [plan.low_rank(f"{name}.{linear}.weight") for linear in ("linear_fc1", "linear_fc2")]
    into_fc1, into_fc2 = (plan.trains(PROJECTOR) or one.rank > 0 for one in adapted)
    into_norm = plan.trains(PROJECTOR) or _learns(plan, ENCODER)
    kept = c * numbers * (into_norm + into_fc1 + 1 + into_fc2)
    return Activations(
        mlp=kept + kept_by_adapters(plan, patches // vision.merge_unit, *adapted),
        forward=3 * c * numbers + c * results, backward_mlp=3 * c * numbers,
    )  # fmt: skip
