"""A state of given tensors, and its progress, for the checkpoint manager."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor


@dataclasses.dataclass
class SavedProgress:
    """Progress of a run that has nothing but an iteration."""

    iteration: int


@dataclasses.dataclass
class SavedTensors:
    """Tensors of this rank by name."""

    tensors: dict[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors."""
        return self.tensors

    def expected_bytes(self) -> int:
        """Enough for any test."""
        return 10_000_000
