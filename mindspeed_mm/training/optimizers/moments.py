"""Moments in fewer bits: bf16 with stochastic rounding, and int8 codes with a scale per block.

    elements [R, L]     consecutive rows of a shard's elements; L: last dimension of the parameter
    codes    [R, L]     uint8
    scales   [R, L / B] fp32; B: ``BLOCK``

Integer operations are those that every device has for int16 and int32: multiplications wrap around, and shifts are
views of the upper halves.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_mm.models.optimizer_state import BLOCK

_MULTIPLIER = 0x45D9F3B  # of an integer hash whose shifts are all by 16 bits
_TINY = torch.finfo(torch.float32).tiny


def name_constant(name: str) -> int:
    """An int32 number of a parameter's name, the same in every run."""
    return _int32(zlib.crc32(name.encode()))


def hash_in_place(values: Tensor) -> Tensor:
    """Hash int32 values in place: a bijection of 32 bits, whose halves are used as two random numbers."""
    low, high = values.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)  # little-endian
    for _ in range(2):
        low.bitwise_xor_(high)
        values.mul_(_MULTIPLIER)
    low.bitwise_xor_(high)
    return values


def row_offsets(shape: Sequence[int], offsets: Sequence[int], local: Sequence[int], *, device: torch.device) -> Tensor:
    """Index of the first element of each row of a shard in the whole tensor, modulo 2**32, int32 [R].

    Args:
        shape: of the whole tensor, of at least two dimensions.
        offsets: first index of the shard on each dimension.
        local: shape of the shard; R is the product of all but the last.
        device: of the result.
    """
    first, stride = torch.full((), _int32(offsets[-1]), dtype=torch.int32, device=device), shape[-1]
    for dimension in reversed(range(len(shape) - 1)):
        starts = torch.arange(local[dimension], dtype=torch.int32, device=device).mul_(_int32(stride))
        starts.add_(_int32(offsets[dimension] * stride))
        first = starts.unsqueeze(-1) + first.reshape(1, -1)
        first, stride = first.reshape(-1), stride * shape[dimension]
    return first


def random_bits(rows: Tensor, length: int, seed: Tensor) -> Tensor:
    """32 bits for each element, which depend on its index in the whole tensor and on the seed alone, int32 [R, L].

    Args:
        rows: index of each row's first element, int32 [R].
        length: L.
        seed: int32 scalar.
    """
    return hash_in_place((rows + seed).unsqueeze(1) + torch.arange(length, dtype=torch.int32, device=rows.device))


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """bf16 of fp32 values: one of both neighbours, each as likely as the value is near to it, so that the mean stays.

    Args:
        values: fp32, finite.
        bits: random numbers below 2**16, of an integer type and the same shape.
    """
    below = values.view(torch.int32) + bits  # carries into the upper half with the probability of the lower half
    return below.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


def halves(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 16 bits of int32 values, each as int32 from 0 to 65535."""
    low, high = bits.view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
    return low.to(torch.int32).bitwise_and_(0xFFFF), high.to(torch.int32).bitwise_and_(0xFFFF)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of the nearest table values and the scales: the largest magnitude of each block of ``BLOCK``.

    Args:
        values: fp32 [R, L], BLOCK divides L.
        signed: whether values may be negative.
    """
    blocks = values.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1).clamp_(min=_TINY)
    normalized = (blocks / scales.unsqueeze(-1)).view(values.shape)
    _, midpoints, first = _tables(signed, values.device)
    # the upper half of a float selects a range that has at most one midpoint between two table values
    upper = normalized.view(torch.int16).unflatten(-1, (-1, 2))[..., 1].to(torch.int32).bitwise_and_(0xFFFF)
    codes = first.index_select(0, upper.view(-1))
    is_above = normalized.view(-1) >= midpoints.index_select(0, codes.to(torch.int32))
    return codes.add_(is_above).view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """fp32 [R, L] of codes [R, L] and scales [R, L / BLOCK]."""
    values, _, _ = _tables(signed, codes.device)
    blocks = values.index_select(0, codes.reshape(-1).to(torch.int32)).view(*scales.shape, BLOCK)
    return blocks.mul_(scales.unsqueeze(-1)).view(codes.shape)


def dynamic_table(*, signed: bool) -> Tensor:
    """Values of the 256 codes, ascending, fp32: the dynamic data type (https://arxiv.org/abs/2110.02861, section 1.3).

    Seven decades below 1, the finer the larger: 2**n means of neighbours on a linear grid from 0.1 to 1, with n from 0
    to 6 (with a sign; else from 1 to 7), and 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        grid = torch.linspace(0.1, 1.0, count + 1)
        means = (10.0 ** (decade - 6)) * ((grid[:-1] + grid[1:]) / 2.0)
        values += means.tolist() + (-means).tolist() * signed
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values [256]; midpoints [256] above each, the last one infinite; code [65536] of the least float of each range.

    A range are the floats with the same upper 16 bits.
    """
    values = dynamic_table(signed=signed)
    midpoints = values[:-1] + (values[1:] - values[:-1]) * 0.5
    upper = torch.arange(65536, dtype=torch.int32)
    least = torch.where(upper < 32768, upper * 65536, (upper - 65536) * 65536 + 65535).view(torch.float32)
    first = torch.searchsorted(midpoints, least, right=True).to(torch.uint8)
    midpoints = torch.cat([midpoints, torch.tensor([torch.inf])])
    return values.to(device), midpoints.to(device), first.to(device)


def _int32(number: int) -> int:
    """A number modulo 2**32, as a signed one."""
    return (number + 2**31) % 2**32 - 2**31
