"""How the processes agree on one save beside the training, without a collective and from any thread.

They meet in the key-value store of the process group. It is only ever asked and told, and never waited in: a wait there
would hold back the training's own use of it.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_PAUSES = (0.002, 0.1)  # seconds between two questions: at first, and after a second of asking
_CONCLUSION, _FAILURE, _READY = "conclusion", "failure", "ready"


class SaveCoordinator:
    """One save: every rank announces, rank 0 opens, every rank reports, and rank 0 concludes.

    Attributes:
        rank: of this process.
    """

    def __init__(self, store: dist.Store, *, number: int, rank: int, world_size: int) -> None:
        """
        Args:
            store: of the process group.
            number: of this save, counted by every process alike.
            rank: of this process.
            world_size: number of processes.
        """
        self.rank = rank
        self._store = dist.PrefixStore(f"checkpoint/{number}", store)
        self._world_size = world_size

    @property
    def is_main(self) -> bool:
        """Whether this process opens and concludes."""
        return self.rank == 0

    def announce(self, content: Any) -> None:
        """Tell rank 0, before anything is written, what this process is going to write."""
        self._set(f"plan/{self.rank}", content)

    def plans(self) -> list[Any]:
        """On rank 0: what all processes announced, in the order of ranks."""
        return [self._get(f"plan/{rank}") for rank in range(self._world_size)]

    def open(self) -> None:
        """On rank 0: let the others write."""
        self._set(_READY, True)

    def wait_until_open(self) -> bool:
        """Wait for rank 0; false where it gave the save up instead."""
        self._poll(lambda: self._has(_READY) or self._has(_CONCLUSION))
        return self._has(_READY)

    def report(self, content: Any, *, failed: bool = False) -> None:
        """Tell rank 0 what this process has written, or why it could not, so that the others need not go on."""
        if failed:
            self._set(_FAILURE, True)
        self._set(f"report/{self.rank}", content)

    def has_failed(self) -> bool:
        """Whether some process could not write."""
        return self._has(_FAILURE)

    def beat(self, count: int) -> None:
        """Let the others see that this process gets on: ``count`` is any number that grows."""
        self._store.set(f"beat/{self.rank}", str(count))

    def beats(self) -> list[bytes | None]:
        """The last word of every process, in the order of ranks; the same list twice means that nobody got on."""
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        return [self._store.get(key) if self._has(key) else None for key in keys]

    def reports(self) -> list[Any]:
        """On rank 0: the reports of all processes, in the order of ranks; none of them writes any more then."""
        return [self._get(f"report/{rank}") for rank in range(self._world_size)]

    def conclude(self, content: Any) -> None:
        """On rank 0: tell the others what came of it."""
        self._set(_CONCLUSION, content)

    def conclusion(self) -> Any:
        """What came of it, once rank 0 says so."""
        return self._get(_CONCLUSION)

    def missing_reports(self) -> list[int]:
        """Ranks that have not reported yet."""
        return [rank for rank in range(self._world_size) if not self._has(f"report/{rank}")]

    def forget(self) -> None:
        """On rank 0: remove what it alone has read, which can be megabytes."""
        for rank in range(self._world_size):
            for kind in ("plan", "report"):
                self._store.delete_key(f"{kind}/{rank}")

    def _set(self, key: str, content: Any) -> None:
        self._store.set(key, zlib.compress(json.dumps(content).encode(), 1))

    def _get(self, key: str) -> Any:
        self._poll(lambda: self._has(key))
        return json.loads(zlib.decompress(self._store.get(key)))

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _poll(self, holds: Callable[[], bool]) -> None:
        started = time.monotonic()
        while not holds():
            time.sleep(_PAUSES[time.monotonic() - started > 1.0])
