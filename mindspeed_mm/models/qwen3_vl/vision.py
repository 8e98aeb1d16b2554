"""Vision tower and projector.

Legend: N patches of all pictures of a micro-batch, H vision width, M = N / 4 merged patches, O text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.attention import Segments
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.batch import VisionBatch
from mindspeed_mm.interfaces.media import PixelNorm
from mindspeed_mm.models.layers.activation_checkpoint import ActivationCheckpointPolicy, run_layers
from mindspeed_mm.models.layers.attention import LayerNorm, PackedSequence, RotaryAngles
from mindspeed_mm.models.layers.rotary import VisionRotary
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLVisionConfig


class PixelNormalisation(nn.Module):
    """uint8 pixels -> the tower's input, to the bit what the image processor makes of them."""

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
    """A convolution whose kernel equals its stride, written as the matrix product it is."""

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
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size, dtype=config.params_dtype)
        self.linear_fc2 = nn.Linear(self.merged_size, model_config.out_hidden_size, dtype=config.params_dtype)

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
    """Vision encoder and projector; whichever is frozen, with nothing trainable before it, runs without autograd."""

    def __init__(self, vision_encoder: VisionEncoder, vision_projector: VisionProjector) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.vision_projector = vision_projector
        self.encoder_trains = True
        self.projector_trains = True

    def forward(self, vision: VisionBatch) -> tuple[Tensor, list[Tensor]]:
        """-> (embeddings [M, O], deepstack embeddings, each [M, O])."""
        enabled = torch.is_grad_enabled()
        with torch.set_grad_enabled(enabled and self.encoder_trains):
            hidden, taken = self.vision_encoder(vision)
        with torch.set_grad_enabled(enabled and (self.encoder_trains or self.projector_trains)):
            return self.vision_projector(hidden, taken)
