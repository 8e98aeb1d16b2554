"""Vision tower and projector.

Legend: N patches of all images of a micro-batch, H vision width, M = N / 4 merged patches, O text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.attention import Segments
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import VisionBatch
from mindspeed_mm.interfaces.media import PixelNorm
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy, run_layers
from mindspeed_mm.models.layers.attention import PackedSequence, RotaryAngles
from mindspeed_mm.models.layers.linear import AdaptableLinear
from mindspeed_mm.models.layers.norm import LayerNorm
from mindspeed_mm.models.layers.rotary import VisionRotary
from mindspeed_mm.models.layers.specs import Kernels, activation, attention_spec, common_options, mlp_spec
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig


def vision_config(model_config: Qwen3VLVisionConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of a vision block."""
    return TransformerConfig(
        num_layers=model_config.depth,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_heads,
        kv_channels=model_config.head_dim,
        ffn_hidden_size=model_config.intermediate_size,
        activation_func=activation(model_config.hidden_act),
        normalization="LayerNorm",
        layernorm_epsilon=model_config.layernorm_epsilon,
        add_bias_linear=True,
        **common_options(dtype),
    )


def vision_layer_spec(kernels: Kernels) -> ModuleSpec:
    """Vision block: full attention within each image, dense MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=attention_spec(AttnMaskType.no_mask, kernels, head_norm=None),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class PixelNormalisation(nn.Module):
    """uint8 pixels -> the tower's input, equal to the bit to the image processor's."""

    def __init__(self, norm: PixelNorm) -> None:
        super().__init__()
        # The processor multiplies by its factor in float64 and rounds; a product in fp32 differs, this quotient does
        # not for the factor 1/255, which every published checkpoint has. The divisor is a tensor, since accelerators
        # turn a division by a number into a product with its reciprocal.
        self._constants = {
            "divisor": torch.tensor(1.0 / norm.rescale_factor, device="cpu"),
            "mean": torch.tensor(norm.mean, device="cpu").view(1, -1, 1),
            "std": torch.tensor(norm.std, device="cpu").view(1, -1, 1),
        }
        for name, constant in self._constants.items():
            self.register_buffer(name, constant.clone(), persistent=False)
        levels = torch.arange(256, dtype=torch.uint8, device="cpu").expand(len(norm.mean), 256).reshape(1, -1)
        if not torch.equal(self(levels).view(-1, 256), torch.from_numpy(norm.table())):
            raise UserError(
                f"preprocessor_config.json: rescale_factor {norm.rescale_factor} cannot be applied exactly on the "
                "device; Qwen3-VL's is 1/255 (0.00392156862745098)"
            )

    def reset_buffers(self) -> None:
        """Fill the buffers again after the module was moved off the meta device."""
        for name, constant in self._constants.items():
            getattr(self, name).copy_(constant)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, patch_dim], channels first within a row -> fp32 [N, patch_dim]."""
        by_channel = pixels.view(pixels.shape[0], self.mean.shape[1], -1).float()
        # in place: a pack's pixels in fp32 are larger than any other activation of it
        return by_channel.div_(self.divisor).sub_(self.mean).div_(self.std).view(pixels.shape)


class PatchEmbedding(nn.Module):
    """A convolution whose kernel equals its stride, as a matrix product."""

    def __init__(self, model_config: Qwen3VLVisionConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(model_config.patch_dim, model_config.hidden_size, dtype=config.params_dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """[N, patch_dim] of any float type -> [N, H]."""
        return self.proj(patches.to(self.proj.weight.dtype))


class VisionEncoder(nn.Module):
    """Patches -> hidden states after the last block, and after the deepstack blocks."""

    def __init__(
        self,
        model_config: Qwen3VLVisionConfig,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        pixel_norm: PixelNorm,
    ) -> None:
        super().__init__()
        self.model_config = model_config
        self.pixel_norm = PixelNormalisation(pixel_norm)
        self.patch_embed = PatchEmbedding(model_config, config)
        self.pos_embed = nn.Embedding(
            model_config.num_position_embeddings, model_config.hidden_size, dtype=config.params_dtype
        )
        self.rotary = VisionRotary(model_config.head_dim, model_config.rope_theta)
        self.layers = nn.ModuleList(
            build_module(layer_spec, config=config, layer_number=index + 1) for index in range(model_config.depth)
        )
        self.policy = ActivationCheckpointPolicy()

    def forward(self, vision: VisionBatch) -> tuple[Tensor, list[Tensor]]:
        """-> (hidden [N, H], one [N, H] per deepstack index)."""
        hidden = self.patch_embed(self.pixel_norm(vision.pixels))
        weights = vision.interp_weight.unsqueeze(-1)
        hidden = hidden + (self.pos_embed(vision.interp_index) * weights).sum(dim=0).to(hidden.dtype)
        packed = PackedSequence(
            segments=Segments(vision.cu_seqlens, vision.cu_seqlens_host, vision.max_seqlen),
            angles=RotaryAngles(*self.rotary(vision.position_ids)),
        )

        def step(index: int, hidden: Tensor) -> tuple[Tensor, ...]:
            hidden, _ = self.layers[index](hidden, packed_seq_params=packed)
            return (hidden, hidden) if index in self.model_config.deepstack_visual_indexes else (hidden,)

        hidden, *taken = run_layers(self.layers, hidden.unsqueeze(1), step, self.policy)
        return hidden.squeeze(1), [state.squeeze(1) for state in taken]


class PatchMerger(nn.Module):
    """2x2 neighbouring patches -> one text token: norm before or after the merge, two linear layers with GELU."""

    def __init__(self, model_config: Qwen3VLVisionConfig, config: TransformerConfig, *, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = model_config.hidden_size * model_config.merge_unit
        self.norm_after_merge = norm_after_merge
        norm_size = self.merged_size if norm_after_merge else model_config.hidden_size
        self.norm = LayerNorm(config, norm_size, model_config.layernorm_epsilon)
        self.linear_fc1 = AdaptableLinear(self.merged_size, self.merged_size, dtype=config.params_dtype)
        self.linear_fc2 = AdaptableLinear(self.merged_size, model_config.out_hidden_size, dtype=config.params_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [M, O]."""
        if self.norm_after_merge:
            merged = self.norm(hidden.view(-1, self.merged_size))
        else:
            merged = self.norm(hidden).view(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(merged)))


class VisionProjector(nn.Module):
    """The merger, and one more for each deepstack output."""

    def __init__(self, model_config: Qwen3VLVisionConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.merger = PatchMerger(model_config, config, norm_after_merge=False)
        self.deepstack_mergers = nn.ModuleList(
            PatchMerger(model_config, config, norm_after_merge=True) for _ in model_config.deepstack_visual_indexes
        )

    def forward(self, hidden: Tensor, taken: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """hidden [N, H] and the deepstack states [N, H] -> ([M, O], one [M, O] per deepstack index)."""
        return self.merger(hidden), [merger(state) for merger, state in zip(self.deepstack_mergers, taken, strict=True)]


class ImageEncoder(nn.Module):
    """Vision encoder and projector. A part runs without autograd if neither it nor a part before it trains."""

    def __init__(self, vision_encoder: VisionEncoder, vision_projector: VisionProjector) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.vision_projector = vision_projector

    def forward(self, vision: VisionBatch) -> tuple[Tensor, list[Tensor]]:
        """-> (embeddings [M, O], deepstack embeddings, each [M, O])."""
        encoder_grad = torch.is_grad_enabled() and _trains(self.vision_encoder)
        projector_grad = torch.is_grad_enabled() and (encoder_grad or _trains(self.vision_projector))
        with torch.set_grad_enabled(encoder_grad):
            hidden, taken = self.vision_encoder(vision)
        with torch.set_grad_enabled(projector_grad):
            return self.vision_projector(hidden, taken)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
