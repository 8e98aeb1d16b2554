"""Attention over packed sequences, for megatron-core's specs.

Legend: T tokens of the packed sequence, H hidden width, D head width. megatron-core's layers pass [T, 1, H].
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_mm.backend.kernels.attention import AttentionKernel, Segments
from mindspeed_mm.backend.kernels.elementwise import RotaryKernel, SplitKernel


class RotaryAngles:
    """Cosines and sines [T, 1, D] of the rotary angles, in the type of the arithmetic.

    No dataclass: FSDP2 of some versions casts the tensors that it finds in one, of others it does not.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


@dataclasses.dataclass
class PackedSequence(PackedSeqParams):
    """Segments and rotary angles of a packed sequence, the same for every layer of a stack.

    Attributes:
        segments: boundaries that attention does not cross.
        angles: of the rotary positions.
    """

    segments: Segments | None = None
    angles: RotaryAngles | None = None


class CoreAttention(nn.Module):
    """Core attention slot: the kernel comes with the spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        kernel: AttentionKernel,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal = attn_mask_type is AttnMaskType.causal
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]."""
        return self.kernel(query, key, value, segments=segments, causal=self.causal, scale=self.scale)


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention with rotary angles given per token.

    megatron-core 0.12.1 applies rotary positions to packed sequences by splitting them on the host, and restarts the
    positions of each sample at 0. Three-dimensional positions of images are not such an arithmetic progression.
    """

    def __init__(
        self, *arguments: Any, rotary_kernel: RotaryKernel, split_kernel: SplitKernel | None = None, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.rotary_kernel = rotary_kernel
        self.split_kernel = split_kernel

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], None)."""
        packed = packed_seq_params
        split = self._split if self.split_kernel is None else self._split_at_once
        query, key, value = split(hidden_states, packed.angles)
        context = self.core_attention(query, key, value, packed.segments)
        return self.linear_proj(context.flatten(1).unsqueeze(1))

    def _split(self, hidden_states: Tensor, angles: RotaryAngles) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 1, H] -> query [T, Hq, D], key and value [T, Hkv, D]."""
        query, key, value = (tensor.squeeze(1) for tensor in self.get_query_key_value_tensors(hidden_states))
        query = self.rotary_kernel(query, angles.cos, angles.sin)
        return query, self.rotary_kernel(key, angles.cos, angles.sin), value

    def _split_at_once(self, hidden_states: Tensor, angles: RotaryAngles) -> tuple[Tensor, Tensor, Tensor]:
        """Likewise, by one kernel that reads what the projection wrote."""
        mixed, _ = self.linear_qkv(hidden_states)
        norms = self.q_layernorm, self.k_layernorm
        query_weight, key_weight = (None if norm is None else norm.weight for norm in norms)
        return self.split_kernel(
            mixed.squeeze(1), query_weight, key_weight, angles.cos, angles.sin,
            eps=0.0 if self.q_layernorm is None else self.q_layernorm.eps,
            num_query_groups=self.num_query_groups_per_partition,
            queries_per_group=self.num_attention_heads_per_partition // self.num_query_groups_per_partition,
            head_dim=self.hidden_size_per_attention_head,
        )
