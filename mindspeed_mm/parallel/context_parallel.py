"""Context parallelism by Ulysses (https://arxiv.org/abs/2309.14509): the ranks of a group share one packed micro-batch.

Each has a contiguous part of its tokens and of its patches. Around attention an all-to-all exchanges tokens for heads,
so that every rank attends over whole sequences with a part of the heads; samples may be split anywhere.

Legend: T tokens and N patches of the whole micro-batch after padding, t = T / size, M = N / merge unit, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mindspeed_mm.backend.kernels.attention import AttentionKernel, Segments
from mindspeed_mm.interfaces.batch import Batch, VisionBatch
from mindspeed_mm.models.model import ParallelPlan
from mindspeed_mm.parallel.collectives import all_gather, all_to_all


def split_batch(batch: Batch, *, rank: int, size: int, merge_unit: int) -> Batch:
    """This rank's part of a micro-batch in host memory.

    Tokens and patches are padded to multiples of ``size`` by a segment of their own at the end, which no sample attends
    to and whose results are not used.

    Args:
        batch: the whole micro-batch, the same on all ranks of the group.
        rank: of this process in the group.
        size: of the group.
        merge_unit: patches that must stay together.

    Returns:
        t of the tokens with the target positions among them. ``cu_seqlens`` still describe the whole sequence, since
        attention runs over all of it, and ``target_tokens_per_sample`` the whole samples, since the loss is
        normalised by all of them.
    """
    length = -(-batch.num_tokens // size)
    start = rank * length
    offsets, max_seqlen = _with_padding(batch.cu_seqlens_host, length * size, batch.max_seqlen)
    mine = (batch.label_index >= start) & (batch.label_index < start + length)
    return dataclasses.replace(
        batch,
        input_ids=_part(batch.input_ids, 0, start, length),
        position_ids=_part(batch.position_ids, batch.position_ids.dim() - 1, start, length),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        cu_seqlens_host=offsets,
        max_seqlen=max_seqlen,
        label_index=batch.label_index[mine] - start,
        labels=batch.labels[mine],
        label_sample=batch.label_sample[mine],
        padding=length - max(0, min(length, batch.num_tokens - start)),
        vision=None
        if batch.vision is None
        else _split_vision(batch.vision, rank=rank, size=size, merge_unit=merge_unit, start=start, length=length),
    )


def _split_vision(
    vision: VisionBatch, *, rank: int, size: int, merge_unit: int, start: int, length: int
) -> VisionBatch:
    patches = -(-vision.cu_seqlens_host[-1] // (merge_unit * size)) * merge_unit
    first = rank * patches
    offsets, max_seqlen = _with_padding(vision.cu_seqlens_host, patches * size, vision.max_seqlen)
    mine = (vision.placeholder_index >= start) & (vision.placeholder_index < start + length)
    return dataclasses.replace(
        vision,
        pixels=_part(vision.pixels, 0, first, patches),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        cu_seqlens_host=offsets,
        max_seqlen=max_seqlen,
        position_ids=_part(vision.position_ids, 1, first, patches),
        interp_index=_part(vision.interp_index, 1, first, patches),
        interp_weight=_part(vision.interp_weight, 1, first, patches),
        placeholder_index=vision.placeholder_index[mine] - start,
        merged_index=mine.nonzero().squeeze(1),
    )


def _with_padding(offsets: Sequence[int], total: int, longest: int) -> tuple[list[int], int]:
    """Segment boundaries up to ``total``, with the padding as a segment, and the longest segment."""
    padding = total - offsets[-1]
    return [*offsets, total] if padding else list(offsets), max(longest, padding)


def _part(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    """``length`` entries from ``start`` along ``axis``, padded with zeros beyond the tensor's end."""
    available = max(0, min(length, tensor.shape[axis] - start))
    part = tensor.narrow(axis, min(start, tensor.shape[axis]), available)
    padding = [0, 0] * (tensor.dim() - 1 - axis) + [0, length - available]
    return F.pad(part, padding).contiguous()


@dataclasses.dataclass(frozen=True)
class UlyssesAttention:
    """An attention kernel over all tokens with a part of the heads, between two all-to-alls."""

    kernel: AttentionKernel
    group: dist.ProcessGroup

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
    ) -> Tensor:
        """query [t, Hq, D], key and value [t, Hkv, D] -> [t, Hq, D]; ``segments`` are those of all T tokens."""
        size = self.group.size()
        if key.shape[1] < size:  # fewer key/value heads than ranks: several ranks get the same one
            key, value = (tensor.repeat_interleave(size // tensor.shape[1], dim=1) for tensor in (key, value))
        heads = [tensor.shape[1] // size for tensor in (query, key, value)]
        # [t, H, D] -> [size, t, H / size, D], by receiver
        blocks = [tensor.unflatten(1, (size, -1)).transpose(0, 1) for tensor in (query, key, value)]
        exchanged = self._exchange(torch.cat(blocks, dim=2))
        query, key, value = exchanged.flatten(0, 1).split(heads, dim=1)
        output = self.kernel(query, key, value, segments=segments, causal=causal, scale=scale)
        # [T, Hq / size, D], by receiver of the tokens -> [t, Hq, D]
        returned = self._exchange(output.unflatten(0, (size, -1)))
        return returned.transpose(0, 1).flatten(1, 2)

    def _exchange(self, blocks: Tensor) -> Tensor:
        """[size, ...] by receiver -> [size, ...] by sender."""
        one_each = [1] * self.group.size()
        return all_to_all(blocks, one_each, one_each, self.group)


@dataclasses.dataclass(frozen=True)
class VisionExchange:
    """Gives every rank the merged patches whose placeholders are among its tokens."""

    group: dist.ProcessGroup

    def __call__(
        self, embeddings: Tensor, deepstack: Sequence[Tensor], vision: VisionBatch
    ) -> tuple[Tensor, list[Tensor]]:
        """Each [M / size, H] -> [placeholders here, H]; a dummy's result is not used, and stays as it is."""
        if vision.is_dummy:
            return embeddings, list(deepstack)
        joined = all_gather(torch.stack((embeddings, *deepstack), dim=1), self.group)
        own = joined.index_select(0, vision.merged_index).unbind(1)
        return own[0], list(own[1:])


def apply_context_parallelism(plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Let the ranks of the one-dimensional ``mesh`` share their micro-batches."""
    group = mesh.get_group()
    for module in plan.attention:
        module.kernel = UlyssesAttention(module.kernel, group)
    if plan.set_vision_exchange is not None:
        plan.set_vision_exchange(VisionExchange(group))
