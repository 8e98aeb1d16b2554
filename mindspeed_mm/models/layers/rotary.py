"""Rotary angles: interleaved three-axis positions for text, rows and columns for vision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """``theta ** (-2i / width)`` for i = 0 .. width/2 - 1 in fp32 (https://arxiv.org/abs/2104.09864, section 3.2.2)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (theta**exponents)


def axis_of_frequency(mrope_section: tuple[int, int, int]) -> Tensor:
    """Which position (0 time, 1 row, 2 column) drives each frequency, int64 [D/2].

    The axes alternate T H W T H W ...; rows and columns stop once their section is used up, and time has the rest.
    """
    axes = torch.zeros(sum(mrope_section), dtype=torch.int64, device="cpu")
    for axis in (1, 2):
        axes[axis : mrope_section[axis] * 3 : 3] = axis
    return axes


class TextRotary(nn.Module):
    """Positions int64 [3, T] -> cos and sin [T, 1, D]."""

    def __init__(self, head_dim: int, theta: float, mrope_section: tuple[int, int, int]) -> None:
        super().__init__()
        self._constants = (inverse_frequencies(head_dim, theta), axis_of_frequency(mrope_section))
        self.register_buffer("frequencies", self._constants[0].clone(), persistent=False)
        self.register_buffer("axes", self._constants[1].clone(), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the buffers again after the module was moved off the meta device."""
        self.frequencies.copy_(self._constants[0])
        self.axes.copy_(self._constants[1])

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D] in ``dtype``, computed in fp32."""
        angles = positions[self.axes].t().float() * self.frequencies.float()
        cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(1).to(dtype) for half in (angles.cos(), angles.sin()))
        return cos, sin


class VisionRotary(nn.Module):
    """Row and column int64 [2, N] of each patch -> cos and sin [N, 1, D], in fp32."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self._constant = inverse_frequencies(head_dim // 2, theta)
        self.register_buffer("frequencies", self._constant.clone(), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the buffer again after the module was moved off the meta device."""
        self.frequencies.copy_(self._constant)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, D]: the first quarter of the width from rows, the second from columns, then again."""
        angles = (positions.unsqueeze(-1).float() * self.frequencies.float()).transpose(0, 1).flatten(1)
        cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(1) for half in (angles.cos(), angles.sin()))
        return cos, sin
