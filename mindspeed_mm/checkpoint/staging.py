"""Copies of a state on the host, in memory that is kept from save to save."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.checkpoint.shards import Item
from mindspeed_mm.errors import UserError

_BLOCK = 1 << 30  # bytes; page-locked memory is given out in powers of two, so one large block could waste half of it
_ALIGNMENT = 64  # bytes, more than any type needs


class StagingBuffers:
    """Memory for one copy of what a process writes.

    Attributes:
        reserved: bytes taken so far.
    """

    def __init__(self, *, pinned: bool) -> None:
        """``pinned``: take page-locked memory, into which a device copies by itself."""
        self.reserved = 0
        self._pinned = pinned
        self._blocks: list[Tensor] = []

    def reserve(self, nbytes: int) -> None:
        """Take memory for items of ``nbytes`` bytes in all, so that the first copy does not wait for it."""
        while self.reserved < nbytes:
            self._add_block(min(_BLOCK, nbytes - self.reserved))

    def copy(self, items: Sequence[Item]) -> list[Item]:
        """The same items with copies of their values, which are complete once the device's queue is done.

        The copies are overwritten by the next call.
        """
        free = [0] * len(self._blocks)  # where the unused part of each block begins
        copies: dict[int, Tensor] = {}
        # large ones first, and the small ones into the gaps
        for index in sorted(range(len(items)), key=lambda index: -items[index].values.nbytes):
            values = items[index].values
            memory = self._take(values.nbytes, free)
            copies[index] = memory.view(values.dtype).view(values.shape)
            copies[index].copy_(values, non_blocking=True)
        return [dataclasses.replace(item, values=copies[index]) for index, item in enumerate(items)]

    def _take(self, nbytes: int, free: list[int]) -> Tensor:
        for number, block in enumerate(self._blocks):
            start = free[number]
            if start + nbytes <= block.numel():
                free[number] = start + nbytes + -nbytes % _ALIGNMENT
                return block[start : start + nbytes]
        self._add_block(max(nbytes, 1 << 20))
        free.append(0)
        return self._take(nbytes, free)

    def _add_block(self, nbytes: int) -> None:
        block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        block.zero_()  # the pages come when they are touched
        self._blocks.append(block)
        self.reserved += nbytes


def check_host_memory(nbytes: int) -> None:
    """Refuse copies that do not fit into this machine's memory.

    Args:
        nbytes: that one process copies; each of its neighbours on the machine is taken to do the same.

    Raises:
        UserError: with both numbers.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = _available_bytes()
    if available is not None and nbytes * processes > available:
        raise UserError(
            f"--async-save keeps a copy of what is saved in host memory: {nbytes * processes / 1e9:.1f} GB for the "
            f"{processes} processes of this machine, which has {available / 1e9:.1f} GB left; leave --async-save out"
        )


def _available_bytes() -> int | None:
    """Memory that programs can still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
