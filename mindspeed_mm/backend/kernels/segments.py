"""What attention over packed sequences takes: where they begin and end, and the form of every kernel."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the sequences of a packed batch of T tokens begin and end.

    Attributes:
        offsets: int32 [B + 1] on the device, from 0 to T.
        host_offsets: the same numbers on the host, so that no kernel has to ask the device.
        max_length: the longest segment.
    """

    offsets: Tensor
    host_offsets: list[int]
    max_length: int

    @property
    def lengths(self) -> list[int]:
        """Tokens in each segment."""
        return [end - start for start, end in itertools.pairwise(self.host_offsets)]


class AttentionKernel(Protocol):
    """``query`` [T, Hq, D], ``key`` and ``value`` [T, Hkv, D] with Hq a multiple of Hkv -> [T, Hq, D]."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, segments: Segments, causal: bool, scale: float
    ) -> Tensor:
        """Softmax(scale * query @ key^T) @ value within each segment."""
