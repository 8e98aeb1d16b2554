"""``--mm-model``: options of the model. Its architecture is the Hugging Face config's; repeated here it is checked."""

from __future__ import annotations

from typing import Annotated, Literal

from mindspeed_mm.config.flags import LoraArgs
from mindspeed_mm.config.schema import REQUIRED, StrictModel, effective, no_effect, refused, renamed

LossType = Literal["default", "per_sample_loss", "per_token_loss", "square_loss"]
LossMode = Literal["default", "per_sample", "per_token", "square"]
"""The values of ``LossType`` without their ending."""
AttentionName = Annotated[
    Literal["eager", "sdpa", "math", "varlen", "flash_attention_2", "npu_fusion_attention"],
    renamed(products="math"),
]

_CONFIG_DECIDES = "the Hugging Face config decides the architecture"
_ATTENTION = (
    "attention kernel: eager (written out, slow), sdpa (PyTorch's), math (a CPU's, faster in bf16), "
    "varlen (PyTorch's for packed sequences, on a GPU), flash_attention_2 (the device's fused kernel for packed "
    "sequences: flash-attn on a GPU, npu_fusion_attention on an NPU; without one the device's best, which the log "
    "names), npu_fusion_attention; null: the device's best"
)
_LAYOUT = "micro-batches are packed, in the layout TND"
_SYNCHRONIZE = (
    "synchronise with the device after each layer, so that the host does not allocate memory for later layers"
)
_RECOMPUTE = "recompute activations in backward, as --recompute-granularity, which applies to both encoder and decoder"
_CHECKED = "checked against the Hugging Face config"
_NAMES = (
    "a glob over parameter names, or the path of a module or parameter; names of the mcore or the Hugging Face model; "
    "or regex: and a regular expression for the beginning of Hugging Face names"
)


class VisionEncoderConfig(StrictModel):
    """Vision tower: patch and position embedding and all blocks."""

    model_id: str | None = no_effect(None, _CONFIG_DECIDES)
    num_layers: int | None = effective(None, f"number of blocks, {_CHECKED}", ge=1)
    hidden_size: int | None = effective(None, f"width in channels, {_CHECKED}", ge=1)
    num_attention_heads: int | None = effective(None, f"attention heads, {_CHECKED}", ge=1)
    freeze: bool = effective(True, "do not train these parameters")
    attn_implementation: AttentionName | None = effective(None, _ATTENTION)
    attn_layout: str = refused("TND", _LAYOUT)
    synchronize_per_layer: bool = effective(False, _SYNCHRONIZE)
    recompute_granularity: Literal["full", "selective"] | None = effective(
        None, f"{_RECOMPUTE}; not compared while freeze is true, since nothing is recomputed then"
    )


class VisionProjectorConfig(StrictModel):
    """The mergers that turn 2x2 patches into one text token, including those of the deepstack outputs."""

    model_id: str | None = no_effect(None, _CONFIG_DECIDES)
    num_layers: int | None = no_effect(
        None, "there is one merger, and one more for each entry of the Hugging Face config's deepstack_visual_indexes"
    )
    freeze: bool = effective(True, "do not train these parameters")


class ImageEncoderConfig(StrictModel):
    """What images and videos pass through."""

    vision_encoder: VisionEncoderConfig = VisionEncoderConfig()
    vision_projector: VisionProjectorConfig = VisionProjectorConfig()


class TextDecoderConfig(StrictModel):
    """Text decoder: embedding, all layers and the output layer."""

    model_id: str | None = no_effect(None, _CONFIG_DECIDES)
    num_layers: int | None = effective(None, f"number of layers, {_CHECKED}", ge=1)
    hidden_size: int | None = effective(None, f"width in channels, {_CHECKED}", ge=1)
    num_attention_heads: int | None = effective(None, f"query heads, {_CHECKED}", ge=1)
    max_position_embeddings: int | None = effective(None, f"longest sequence in tokens, {_CHECKED}", ge=1)
    freeze: bool = effective(False, "do not train these parameters")
    use_npu_fused_moe: bool = effective(
        True, "grouped GEMM for the experts, on every device that has it; false: the reference loop over experts"
    )
    attn_implementation: AttentionName | None = effective(None, _ATTENTION)
    attn_layout: str = refused("TND", _LAYOUT)
    is_causal: bool = no_effect(
        True, "text attention is always causal; in MindSpeed-MM, false materialises the causal mask and true does not"
    )
    activation_offload: bool = effective(
        False, "keep the activations saved for backward in host memory; under full recompute the layer inputs only"
    )
    synchronize_per_layer: bool = effective(False, _SYNCHRONIZE)
    recompute_granularity: Literal["full", "selective"] | None = effective(None, _RECOMPUTE)


class LossConfig(StrictModel):
    """Which loss, and how it is computed."""

    loss_type: LossType | None = effective(
        None, "mean of the token losses; per_token_loss and per_sample_loss: as the flags of these names; square_loss: "
        "a sample's weight is the square root of its number of target tokens; default: mean over micro-batches of "
        "their token means; null: by the flags",
    )
    router_aux_loss_coef: float | None = effective(
        None, "coefficient of the routers' load-balancing loss; null: --moe-aux-loss-coeff, else 0", ge=0
    )

    compute_mode: Literal["default", "chunk"] = effective(
        "default", "default: the logits of all target tokens at once; chunk: of chunk_size tokens at a time"
    )
    chunk_size: int = effective(1024, "target tokens per chunk, with compute_mode chunk", ge=1)


class PatchConfig(StrictModel):
    """Switches of MindSpeed-MM's patches."""

    clip_grad_async: bool = no_effect(False, "clipping never synchronises with the device")
    bridge_patch: bool = no_effect(False, "without --load the weights of init_from_hf_path are read")
    scale_grad: bool = no_effect(True, "gradients are always those of the loss over the global batch")


class LearningRateScale(StrictModel):
    """A factor on the learning rate of some parameters."""

    match: str = effective(REQUIRED, f"the parameters: {_NAMES}")
    scale: float = effective(REQUIRED, "factor on the learning rate", gt=0)


class WeightDecayScale(StrictModel):
    """A factor on the weight decay of some parameters."""

    match: str = effective(REQUIRED, f"the parameters: {_NAMES}")
    scale: float = effective(REQUIRED, "factor on the weight decay; without one: 0 for vectors, 1 for the rest", ge=0)


class ModelOptions(StrictModel):
    """The whole file."""

    model_id: str = effective(REQUIRED, "kind of model, checked against the Hugging Face config's model_type")
    init_from_hf_path: str = effective(REQUIRED, "Hugging Face directory with the model's config and weights")
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    text_decoder: TextDecoderConfig = TextDecoderConfig()
    freeze: list[str] = effective([], f"parameters that do not train, besides frozen parts; each entry: {_NAMES}")
    lr_scaling_plan: list[LearningRateScale] = effective([], "factors on the learning rate; a later entry wins")
    weight_decay_scaling_plan: list[WeightDecayScale] = effective(
        [], "factors on the weight decay; a later entry wins"
    )
    lora_args: LoraArgs = LoraArgs()
    loss_cfg: LossConfig = LossConfig()
    patch: PatchConfig = PatchConfig()

    @property
    def frozen_parts(self) -> dict[str, str]:
        """Part of the model that does not train -> path of the switch that freezes it."""
        encoder = self.image_encoder
        switches = {
            "image_encoder.vision_encoder": encoder.vision_encoder.freeze,
            "image_encoder.vision_projector": encoder.vision_projector.freeze,
            "text_decoder": self.text_decoder.freeze,
        }
        return {path.rpartition(".")[2]: f"{path}.freeze" for path, freeze in switches.items() if freeze}

    @property
    def recompute_granularity(self) -> dict[str, str | None]:
        """Path of each switch of recomputation -> its value; frozen parts have nothing to recompute."""
        vision = self.image_encoder.vision_encoder
        found: dict[str, str | None] = {"text_decoder.recompute_granularity": self.text_decoder.recompute_granularity}
        if not vision.freeze:
            found["image_encoder.vision_encoder.recompute_granularity"] = vision.recompute_granularity
        return found

    @property
    def activation_offload(self) -> bool:
        """Whether activations that decoder layers keep are moved to the host."""
        return self.text_decoder.activation_offload

    @property
    def loss_chunk_size(self) -> int | None:
        """Target tokens whose logits exist at a time; None for all."""
        return self.loss_cfg.chunk_size if self.loss_cfg.compute_mode == "chunk" else None
