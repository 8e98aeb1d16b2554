"""State that an optimizer keeps of each parameter: names, shapes and dtypes. Imports no torch: memory estimates and the
checks of a checkpoint before any rank is started need it too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_mm.config.flags import OptimizerArgs

StateEntry = tuple[tuple[int, ...], str]
"""Shape of a whole tensor, before sharding, and its dtype."""

_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}


@dataclasses.dataclass(frozen=True)
class OptimizerStateLayout:
    """What the optimizer that the flags select keeps of each parameter.

    Tensors have the parameter's number of dimensions and are sharded as it is, but for scalars, which every rank holds.
    """

    @classmethod
    def of(cls, args: OptimizerArgs) -> OptimizerStateLayout:
        """The layout of a run with these flags."""
        return cls()

    @property
    def flags(self) -> dict[str, tuple[str, str]]:
        """Flags that decide the layout: flag -> value, default. A run with other values cannot load this state."""
        return {"--optimizer-selection": ("fused_torch_adamw", "fused_torch_adamw")}

    @property
    def description(self) -> str:
        """What the state is, for reports."""
        return "AdamW's two moments, fp32"

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, StateEntry]:
        """Key -> whole tensor of a parameter's state.

        Args:
            name: of the parameter in the model.
            shape: of the whole parameter.
        """
        return {"step": ((), "float32"), "exp_avg": (shape, "float32"), "exp_avg_sq": (shape, "float32")}

    def nbytes(self, name: str, shape: tuple[int, ...], *, held: int | None = None) -> int:
        """Bytes of a parameter's state, without scalars.

        Args:
            name: of the parameter in the model.
            shape: of the whole parameter.
            held: elements of the parameter that a rank holds; None for all.
        """
        size = math.prod(shape)
        held = size if held is None else held
        tensors = [(math.prod(shape), dtype) for shape, dtype in self.tensors(name, tuple(shape)).values() if shape]
        return sum(-(-numbers * held // max(1, size)) * _BYTES[dtype] for numbers, dtype in tensors)
