"""State that an optimizer keeps of each parameter: names, shapes and dtypes. Imports no torch: memory estimates and the
checks of a checkpoint before any rank is started need it too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mindspeed_mm.config.flags import OptimizerArgs
    from mindspeed_mm.models.parameter_rules import Settings

StateEntry = tuple[tuple[int, ...], str]
"""Shape of a whole tensor, before sharding, and its dtype."""
MomentDtype = Literal["fp32", "bf16", "int8"]

BLOCK = 256
"""Neighbours on the last dimension that share a scale: int8 moments."""
FEWEST_ELEMENTS = 4096
"""Moments of smaller parameters are always fp32."""
_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}


@dataclasses.dataclass(frozen=True)
class OptimizerStateLayout:
    """What the optimizer that the flags select keeps of each parameter.

    Tensors have the parameter's number of dimensions and are sharded as it is, but for scalars, which every rank holds.

    Attributes:
        moment_dtype: of AdamW's moments, where :meth:`dtype_of` does not keep fp32.
    """

    moment_dtype: MomentDtype = "fp32"

    @classmethod
    def of(cls, args: OptimizerArgs, settings: Settings) -> OptimizerStateLayout:
        """The layout of a run with these flags and settings of its parameters."""
        if args.optimizer_selection == "muon":
            names = frozenset(name for name, setting in settings.items() if setting.matrices is not None)
            return MuonStateLayout(names=names)
        return cls(args.moment_dtype)

    @property
    def flags(self) -> dict[str, tuple[str, str]]:
        """Flags that decide the layout: flag -> value, default. A run with other values cannot load this state."""
        return {
            "--optimizer-selection": ("fused_torch_adamw", "fused_torch_adamw"),
            "--moment-dtype": (self.moment_dtype, "fp32"),
        }

    @property
    def description(self) -> str:
        """What the state is, for reports."""
        return f"AdamW's two moments, {self.moment_dtype}"

    def notes(self, settings: Settings) -> list[str]:
        """A line on how much of what trains has moments of ``moment_dtype``; none for fp32."""
        if self.moment_dtype == "fp32":
            return []
        trained = [setting for setting in settings.values() if setting.trainable]
        low = [setting for setting in trained if self.dtype_of(tuple(setting.shape)) == self.moment_dtype]
        share = sum(setting.size for setting in low) / max(1, sum(setting.size for setting in trained))
        return [
            f"--moment-dtype {self.moment_dtype}: moments of {len(low)} of {len(trained)} trained tensors, {share:.1%} "
            f"of their elements; the others keep fp32{'' if low else ', so it has no effect'} (docs/optimizers.md)"
        ]

    def dtype_of(self, shape: tuple[int, ...]) -> MomentDtype:
        """How moments of a parameter are stored: fp32 if it is small or a vector, or for int8 where no blocks fit.

        Decided by the whole parameter, so that it does not depend on the sharding. Vectors are sharded along the last
        dimension, which blocks must not be.
        """
        if len(shape) < 2 or math.prod(shape) < FEWEST_ELEMENTS or (self.moment_dtype == "int8" and shape[-1] % BLOCK):
            return "fp32"
        return self.moment_dtype

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, StateEntry]:
        """Key -> whole tensor of a parameter's state.

        Args:
            name: of the parameter in the model.
            shape: of the whole parameter.
        """
        dtype = {"fp32": "float32", "bf16": "bfloat16", "int8": "uint8"}[self.dtype_of(shape)]
        moment: StateEntry = (shape, dtype)
        tensors: dict[str, StateEntry] = {"step": ((), "float32"), "exp_avg": moment, "exp_avg_sq": moment}
        if dtype == "uint8":
            scales = (*shape[:-1], shape[-1] // BLOCK)
            tensors |= {"exp_avg_scale": (scales, "float32"), "exp_avg_sq_scale": (scales, "float32")}
        return tensors

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


@dataclasses.dataclass(frozen=True)
class MuonStateLayout(OptimizerStateLayout):
    """Muon's momentum of the parameters that it trains, and AdamW's moments of the others.

    Attributes:
        names: of the parameters that Muon trains.
    """

    names: frozenset[str] = frozenset()

    @property
    def flags(self) -> dict[str, tuple[str, str]]:
        """See :class:`OptimizerStateLayout`."""
        return {"--optimizer-selection": ("muon", "fused_torch_adamw"), "--moment-dtype": ("fp32", "fp32")}

    @property
    def description(self) -> str:
        """See :class:`OptimizerStateLayout`."""
        return "Muon's momentum, AdamW's moments of the rest, fp32"

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, StateEntry]:
        """See :class:`OptimizerStateLayout`."""
        return {"momentum_buffer": (shape, "float32")} if name in self.names else super().tensors(name, shape)
