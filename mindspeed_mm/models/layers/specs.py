"""megatron-core specs and configurations of transformer layers."""

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
from mindspeed_mm.backend.kernels.compiled import check_compiler
from mindspeed_mm.backend.kernels.cross_entropy import CrossEntropyKernel, torch_cross_entropy
from mindspeed_mm.backend.kernels.elementwise import RMSNormKernel, RotaryKernel, RouterKernel, SplitKernel
from mindspeed_mm.backend.kernels.experts import ExpertKernel
from mindspeed_mm.backend.kernels.permutation import TokenPermuter
from mindspeed_mm.backend.kernels.registry import (
    attention_kernel,
    combine_backward_kernel,
    combine_kernel,
    cross_entropy_kernel,
    expert_kernel,
    expert_kernel_name,
    rms_norm_kernel,
    rotary_kernel,
    router_kernel,
    split_kernel,
    token_permuter,
    use_triton,
)
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.layers.attention import CoreAttention, PackedSelfAttention
from mindspeed_mm.models.layers.config import DecoderConfig
from mindspeed_mm.models.layers.linear import Linear
from mindspeed_mm.models.layers.moe import Experts, MoELayer, MoESubmodules, TopKRouter
from mindspeed_mm.models.layers.norm import RMSNorm
from mindspeed_mm.models.layers.token_dispatcher import IndexPermuter
from mindspeed_mm.models.spec import ModelBuildOptions

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The implementations that the specs plug in, chosen once when the model is built.

    Attributes:
        experts: None where no layer has experts, and so is ``permuter``.
        experts_weigh: whether ``experts`` multiplies each row by its routing weight.
        router: takes the place of softmax and top-k, unless it is None.
        split: takes the place of head norms and rotary kernel, unless it is None.
        cross_entropy: of the loss head.
    """

    attention: AttentionKernel
    rms_norm: RMSNormKernel
    rotary: RotaryKernel
    experts: ExpertKernel | None = None
    permuter: TokenPermuter | None = None
    experts_weigh: bool = False
    split: SplitKernel | None = None
    router: RouterKernel | None = None
    cross_entropy: CrossEntropyKernel = torch_cross_entropy


def decoder_kernels(config: DecoderConfig, options: ModelBuildOptions, *, device: str, dtype: torch.dtype) -> Kernels:
    """The kernels of a decoder.

    Args:
        config: the decoder's.
        options: the user's choices.
        device: kind of device (``Backend.name``).
        dtype: what the model computes in.

    Raises:
        UserError: if an implementation is not available on the device.
    """
    compiled = options.compile_small_operators
    if compiled:
        check_compiler(device=device)
    triton = options.triton_kernels and not compiled and use_triton(device)
    name = expert_kernel_name(
        fused=options.fused_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        device=device,
        dtype=dtype,
        triton=triton,
    )
    permuter = IndexPermuter(combine_kernel(device=device, triton=triton), combine_backward_kernel(triton=triton))
    return Kernels(
        attention=attention_kernel(options.text_attn_implementation, device=device),
        rms_norm=rms_norm_kernel(device=device, compiled=compiled, triton=triton),
        rotary=rotary_kernel(device=device, compiled=compiled),
        experts=expert_kernel(name, device=device, compiled=compiled),
        permuter=token_permuter(permuter, fused=options.fused_experts, device=device),
        experts_weigh=name == "triton_grouped_mm",
        split=split_kernel(triton=triton),
        router=router_kernel(triton=triton),
        cross_entropy=cross_entropy_kernel(triton=triton),
    )


def decoder_config(config: DecoderConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of a decoder layer."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        activation_func=activation(config.hidden_act),
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        add_bias_linear=False,
        **common_options(dtype),
    )


def common_options(dtype: torch.dtype) -> dict[str, object]:
    """What every layer's configuration sets alike: no dropout, no fusion of megatron's, no initialisation."""
    return {
        "params_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,  # plain torch.empty, which a meta-device context can catch
        "perform_initialization": False,
    }


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that ``config.json`` calls ``name``."""
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} in config.json is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm_spec(kernels: Kernels) -> ModuleSpec:
    """RMSNorm with the device's kernel."""
    return ModuleSpec(module=RMSNorm, params={"kernel": kernels.rms_norm})


def decoder_layer_spec(config: DecoderConfig, layer: int, kernels: Kernels) -> ModuleSpec:
    """Decoder layer ``layer`` (from 0): causal attention, and experts or a dense MLP."""
    norm = rms_norm_spec(kernels)
    head_norm = norm if config.qk_layernorm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention_spec(AttnMaskType.causal, kernels, head_norm=head_norm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_moe_spec(config, kernels) if config.is_moe_layer(layer) else mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def attention_spec(mask: AttnMaskType, kernels: Kernels, *, head_norm: ModuleSpec | None) -> ModuleSpec:
    """Self-attention over packed sequences; ``head_norm`` normalises queries and keys per head."""
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": mask, "rotary_kernel": kernels.rotary, "split_kernel": kernels.split},
        submodules=SelfAttentionSubmodules(
            linear_qkv=Linear,
            core_attention=ModuleSpec(module=CoreAttention, params={"kernel": kernels.attention}),
            linear_proj=Linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def mlp_spec() -> ModuleSpec:
    """Dense MLP, gated where the configuration says so."""
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear))


def _moe_spec(config: DecoderConfig, kernels: Kernels) -> ModuleSpec:
    experts = {"num_experts": config.num_experts, "intermediate_size": config.moe_intermediate_size}
    router = {"num_experts": config.num_experts, "top_k": config.num_experts_per_token, "choose": kernels.router}
    return ModuleSpec(
        module=MoELayer,
        params={"permuter": kernels.permuter, "experts_weigh": kernels.experts_weigh},
        submodules=MoESubmodules(
            router=ModuleSpec(module=TopKRouter, params=router),
            experts=ModuleSpec(module=Experts, params={**experts, "kernel": kernels.experts}),
        ),
    )
