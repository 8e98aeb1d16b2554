"""megatron-core specs and configurations of Qwen3-VL's layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mindspeed_mm.backend.kernels.attention import AttentionKernel
from mindspeed_mm.backend.kernels.elementwise import RMSNormKernel, RotaryKernel
from mindspeed_mm.backend.kernels.experts import ExpertKernel
from mindspeed_mm.backend.kernels.permutation import TokenPermuter
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.attention import CoreAttention, LayerNorm, Linear, PackedSelfAttention, RMSNorm
from mindspeed_mm.models.layers.moe import Experts, MoELayer, MoESubmodules, TopKRouter
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLTextConfig, Qwen3VLVisionConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementations that the specs plug in, chosen once when the model is built."""

    text_attention: AttentionKernel
    vision_attention: AttentionKernel
    experts: ExpertKernel
    rows: TokenPermuter
    rms_norm: RMSNormKernel
    rotary: RotaryKernel


def text_config(model_config: Qwen3VLTextConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of a decoder layer."""
    return TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_heads,
        num_query_groups=model_config.num_kv_heads,
        kv_channels=model_config.head_dim,
        ffn_hidden_size=model_config.intermediate_size,
        activation_func=_activation(model_config.hidden_act),
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=model_config.rms_norm_eps,
        add_bias_linear=False,
        **_common(dtype),
    )


def vision_config(model_config: Qwen3VLVisionConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of a vision block."""
    return TransformerConfig(
        num_layers=model_config.depth,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_heads,
        kv_channels=model_config.head_dim,
        ffn_hidden_size=model_config.intermediate_size,
        activation_func=_activation(model_config.hidden_act),
        normalization="LayerNorm",
        layernorm_epsilon=model_config.layernorm_epsilon,
        add_bias_linear=True,
        **_common(dtype),
    )


def _common(dtype: torch.dtype) -> dict[str, object]:
    return {
        "params_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,  # plain torch.empty, which a meta-device context can catch
        "perform_initialization": False,
    }


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} in config.json is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm_spec(kernels: Kernels) -> ModuleSpec:
    """RMSNorm with the device's kernel."""
    return ModuleSpec(module=RMSNorm, params={"kernel": kernels.rms_norm})


def decoder_layer_spec(model_config: Qwen3VLTextConfig, layer: int, kernels: Kernels) -> ModuleSpec:
    """Decoder layer ``layer`` (from 0): causal attention with per-head norms, and experts or a dense MLP."""
    norm = rms_norm_spec(kernels)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(AttnMaskType.causal, kernels.text_attention, kernels, head_norm=norm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_moe_spec(model_config, kernels) if model_config.is_moe_layer(layer) else _mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def vision_layer_spec(kernels: Kernels) -> ModuleSpec:
    """Vision block: full attention within each picture, dense MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=_attention_spec(AttnMaskType.no_mask, kernels.vision_attention, kernels, head_norm=None),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=_mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(
    mask: AttnMaskType, kernel: AttentionKernel, kernels: Kernels, *, head_norm: ModuleSpec | None
) -> ModuleSpec:
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": mask, "rotary_kernel": kernels.rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=Linear,
            core_attention=ModuleSpec(module=CoreAttention, params={"kernel": kernel}),
            linear_proj=Linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _mlp_spec() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear))


def _moe_spec(model_config: Qwen3VLTextConfig, kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        params={"permuter": kernels.rows},
        submodules=MoESubmodules(
            router=ModuleSpec(module=TopKRouter, params={"model_config": model_config}),
            experts=ModuleSpec(module=Experts, params={"model_config": model_config, "kernel": kernels.experts}),
        ),
    )
