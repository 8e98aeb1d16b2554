"""Threads that take the places of processes: collectives of any number of them, forward and backward, in one test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Member:
    """One thread's view of a group; what a ``ProcessGroup`` is to a process."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.board, self.barrier = rank, board, barrier

    def size(self) -> int:
        """Number of members."""
        return len(self.board)


def all_to_all_single(
    output: torch.Tensor,
    rows: torch.Tensor,
    receive: Sequence[int] | None = None,
    send: Sequence[int] | None = None,
    *,
    group: Member,
) -> None:
    """``torch.distributed.all_to_all_single`` between the members; put it in its place by monkeypatch."""
    group.board[group.rank] = rows.chunk(group.size()) if send is None else rows.split(list(send))
    group.barrier.wait()
    parts = [parts[group.rank] for parts in group.board]
    assert receive is None or [len(part) for part in parts] == list(receive)
    output.copy_(torch.cat(parts))
    group.barrier.wait()


def in_threads(size: int, function: Callable[[Member], Any]) -> list[Any]:
    """``function(member)`` of all members of a group at once; the results by rank."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def run(member: Member) -> Any:
        try:
            return function(member)
        except BaseException:
            barrier.abort()  # or the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, [Member(rank, board, barrier) for rank in range(size)]))
