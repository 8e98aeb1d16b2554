"""Attention by ``torch_npu.npu_fusion_attention``, in its packed layout.

Arguments and limits are those of torch_npu's own documentation (``torch_npu/_op_plugin_docs.py``), for 2.7.1 to 2.13.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mindspeed_mm.backend.kernels.segments import Segments

MOST_SEGMENTS = 1024  # of one call in the packed layout
_CAUSAL = 3  # sparse_mode: the mask's diagonal ends at the lower right corner of each segment
_COMPRESSED = 2048  # edge of the mask that stands for causal masks of any size


@functools.cache
def _causal_mask(device: torch.device) -> Tensor:
    """bool [2048, 2048], True where a key is hidden."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """See :class:`mindspeed_mm.backend.kernels.attention.AttentionKernel`; the lengths go in as host lists."""
    ends = segments.host_offsets[1:]
    if len(ends) <= MOST_SEGMENTS:
        return _attend(query, key, value, ends, causal=causal, scale=scale)
    outputs, start = [], 0
    for first in range(0, len(ends), MOST_SEGMENTS):
        part = ends[first : first + MOST_SEGMENTS]
        tokens = slice(start, part[-1])
        relative = [end - start for end in part]
        outputs.append(_attend(query[tokens], key[tokens], value[tokens], relative, causal=causal, scale=scale))
        start = part[-1]
    return torch.cat(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, ends: list[int], *, causal: bool, scale: float) -> Tensor:
    """query [T, Hq, D], key and value [T, Hkv, D]; ``ends`` rise to T."""
    import torch_npu

    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        atten_mask=_causal_mask(query.device) if causal else None,  # without a mask all of a segment is seen
        scale=scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=_CAUSAL if causal else 0,
    )[0]
