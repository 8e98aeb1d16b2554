"""Stand-ins for process groups: one whose collectives do nothing, and ranks as threads of one test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist


def init_fake_process_group(rank: int, world_size: int) -> None:
    """Make this process one rank of a group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


class ThreadGroup:
    """One thread's view of a group of threads, in the place of a ``ProcessGroup``."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.board, self.barrier = rank, board, barrier

    def size(self) -> int:
        """Number of ranks."""
        return len(self.board)


def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    receive: Sequence[int] | None = None,
    send: Sequence[int] | None = None,
    *,
    group: ThreadGroup,
) -> None:
    """``torch.distributed.all_to_all_single`` between threads, to be monkeypatched in its place."""
    group.board[group.rank] = tensor.chunk(group.size()) if send is None else tensor.split(list(send))
    group.barrier.wait()
    parts = [parts[group.rank] for parts in group.board]
    assert receive is None or [len(part) for part in parts] == list(receive)
    output.copy_(torch.cat(parts))
    group.barrier.wait()


def in_threads(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Run ``function(group)`` in one thread per rank; the results by rank."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def run(group: ThreadGroup) -> Any:
        try:
            return function(group)
        except BaseException:
            barrier.abort()  # releases the threads that wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, [ThreadGroup(rank, board, barrier) for rank in range(size)]))
