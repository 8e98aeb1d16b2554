"""From the collator to the model: one packed micro-batch, with everything the device must not compute.

Shapes: T tokens and B samples of the micro-batch, S target tokens, N vision patches in K attention segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mindspeed_mm.interfaces.media import GridTHW

T = TypeVar("T", bound="_TensorFields")


class _TensorFields:
    """Moves the tensors of a dataclass and leaves its host values alone."""

    def _apply(self: T, function: Callable[[Any], Any]) -> T:
        moved = {
            field.name: function(value)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), (Tensor, _TensorFields))
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to(self: T, device: torch.device | str, non_blocking: bool = False) -> T:
        """Copy with every tensor on ``device``; ``non_blocking`` overlaps the copies if the tensors are pinned."""
        return self._apply(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: T) -> T:
        """Copy with every tensor in page-locked memory. The DataLoader calls it in its pinning thread."""
        return self._apply(lambda value: value.pin_memory())

    def share_memory_(self: T) -> T:
        """Move every tensor to shared memory, in place.

        Raises:
            RuntimeError: if there is not enough.
        """
        return self._apply(lambda value: value.share_memory_())


@dataclasses.dataclass
class VisionBatch(_TensorFields):
    """Images and videos of one micro-batch, in the order of their placeholders in the packed sequence.

    Attributes:
        pixels: uint8 [N, patch_dim], flattened patches, each spatial merge block contiguous, not normalised. The device
            computes ``(x / 255 - mean) / std`` in float32.
        cu_seqlens: int32 [K + 1], attention segments: one per image, one per temporal slice of a video.
        cu_seqlens_host: the same numbers as a list, for kernels that want them on the host.
        max_seqlen: patches in the longest segment.
        position_ids: int64 [2, N], row and column of each patch, for the 2-D rotary embedding.
        interp_index: int64 [4, N], rows of the learned position table to gather for each patch.
        interp_weight: float32 [4, N], their bilinear weights.
        placeholder_index: int64 [N / merge_unit], the packed position that each merged patch replaces; empty in a
            dummy.
        grid_thw: temporal slices, rows and columns of patches of each image or video.
        is_dummy: whether this is one merge block of zeros because the micro-batch has no image or video.
        merged_index: int64 [placeholders here], in a part of a micro-batch: which of the whole's merged patches replace
            the part's placeholders; None in a whole micro-batch, whose patches are in that order.
    """

    pixels: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: list[int]
    max_seqlen: int
    position_ids: Tensor
    interp_index: Tensor
    interp_weight: Tensor
    placeholder_index: Tensor
    grid_thw: list[GridTHW]
    is_dummy: bool
    merged_index: Tensor | None = None


@dataclasses.dataclass
class Batch(_TensorFields):
    """One micro-batch: B samples packed into one sequence of T tokens, without padding.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [3, T], time, height and width positions; each sample starts at 0.
        cu_seqlens: int32 [B + 1], sample boundaries; attention never crosses them.
        cu_seqlens_host: the same numbers as a list.
        max_seqlen: tokens of the longest sample.
        label_index: int64 [S], positions whose hidden state predicts a target token.
        labels: int64 [S], the token to predict: ``input_ids[label_index + 1]``.
        label_sample: int64 [S], the sample (0..B-1) of each target token.
        target_tokens_per_sample: target tokens of each sample; length B.
        sample_ids: dataset index of each packed sample; length B.
        vision: the micro-batch's images and videos, or a dummy block, so that every rank calls the vision tower in
            every micro-batch; None for a family without vision.
        sample_channel: int64 [B], number of each sample's data set in a mixture; None without a mixture.
        record_channels: the channel that each sample's record names, empty for none; length B, or 0 if none does.
        padding: tokens at the end that belong to no sample; none in a whole micro-batch, only in a part of one.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: list[int]
    max_seqlen: int
    label_index: Tensor
    labels: Tensor
    label_sample: Tensor
    target_tokens_per_sample: list[int]
    sample_ids: list[int]
    vision: VisionBatch | None
    sample_channel: Tensor | None = None
    record_channels: list[str] = dataclasses.field(default_factory=list)
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """T, tokens of the packed sequence."""
        return self.cu_seqlens_host[-1]

    @property
    def num_target_tokens(self) -> int:
        """S, target tokens; 0 is possible."""
        return sum(self.target_tokens_per_sample)
