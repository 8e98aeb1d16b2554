"""Heartbeats between ranks through the job's store; neither the device nor the process group takes part."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_FAREWELL = b"ended"
_ASKED, _PRINTED = "asked", "printed"
_RANKS_PER_SECOND = 50  # that one rank reads


class Heartbeat:
    """Sends this rank's heartbeat and reads the others', in a thread of its own, since the store may not answer.

    Attributes:
        asked: last iteration that some rank asked reports of; -1 for none.
    """

    def __init__(self, *, rank: int, world_size: int, poll_seconds: float) -> None:
        """``poll_seconds``: between two heartbeats; longer in jobs of thousands of ranks."""
        self.asked = -1
        self._rank = rank
        self._world_size = world_size
        self._seconds = max(poll_seconds, world_size / _RANKS_PER_SECOND)
        self._store: Any | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the store: the watchdog uses it, too
        self._answered = time.monotonic()  # when the store last did
        self._heard: dict[int, tuple[bytes, float]] = {}

    def start(self, connect: Callable[[], Any | None], describe: Callable[[], str], closed: threading.Event) -> None:
        """Connect and send heartbeats until ``closed``; ``describe`` gives the text of each."""
        if self._world_size == 1:
            return
        self._store = connect()
        if self._store is None:
            return
        self._answered = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(connect, describe, closed), name="heartbeat", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Wait for the thread, which sends a last heartbeat; but not for a store that does not answer."""
        if self._thread is not None:
            self._thread.join(timeout=2 * self._seconds)

    def silent(self, limit: float) -> list[tuple[int, float, str]]:
        """(rank, seconds, text of the last heartbeat) of each rank without one for ``limit`` seconds.

        The store is part of rank 0: if it does not answer, rank 0 is the silent one.
        """
        now = time.monotonic()
        if self._thread is None:
            return []
        if now - self._answered > limit:
            heard, _ = self._heard.get(0, (b"", 0.0))
            last = heard.decode().partition("|")[2] or "nothing"
            return [(0, now - self._answered, f"{last} (nor does the store on its host answer)")]
        return [
            (rank, now - since, words.decode().partition("|")[2] or "nothing")
            for rank, (words, since) in list(self._heard.items())
            if words != _FAREWELL and now - since > limit
        ]

    def ask_for_reports(self, iteration: int) -> None:
        """Make every rank report."""
        self._with_store(lambda store: store.set(_ASKED, str(iteration)))

    def post_summary(self, iteration: int, text: str) -> None:
        """Store this rank's line of a report."""
        self._with_store(lambda store: store.set(f"hang/{iteration}/{self._rank}", text))

    def gather_summaries(self, iteration: int, *, own: str, seconds: float) -> dict[int, str | None]:
        """Every rank's line, None for a rank that stored none within ``seconds``."""
        found: dict[int, str | None] = dict.fromkeys(range(self._world_size))
        found[self._rank] = own
        end = time.monotonic() + seconds
        while self._store is not None and None in found.values() and time.monotonic() < end:
            for rank in [rank for rank, text in found.items() if text is None]:
                answer = self._with_store(lambda store, key=f"hang/{iteration}/{rank}": _read(store, key))
                found[rank] = None if answer is None else answer.decode()
            time.sleep(self._seconds / 4)
        return found

    def mark_printed(self, iteration: int) -> None:
        """Store that the report is complete."""
        self._with_store(lambda store: store.set(f"{_PRINTED}/{iteration}", "1"))

    def wait_for_print(self, iteration: int, *, seconds: float) -> None:
        """Wait until the report is complete, at most ``seconds``."""
        end = time.monotonic() + seconds
        while self._store is not None and time.monotonic() < end:
            if self._with_store(lambda store: _read(store, f"{_PRINTED}/{iteration}")) is not None:
                return
            time.sleep(self._seconds / 4)

    def _with_store(self, use: Callable[[Any], Any]) -> Any:
        """Result of ``use`` on the store; None where there is no store or it fails."""
        if self._store is None or not self._lock.acquire(timeout=self._seconds * 5):
            return None
        try:
            answer = use(self._store)
            self._answered = time.monotonic()
            return answer
        except RuntimeError:  # the store has lost its connection; the next heartbeat makes a new one
            self._store = None
            return None
        finally:
            self._lock.release()

    def _run(
        self, connect: Callable[[], Any | None], describe: Callable[[], str], closed: threading.Event
    ) -> None:
        count = 0
        while not closed.is_set():
            count += 1
            if self._store is None:
                with contextlib.suppress(RuntimeError):
                    self._store = connect()
            beat = f"{count}|{describe()}"
            self._with_store(lambda store, beat=beat: store.set(f"beat/{self._rank}", beat))
            self._listen()
            closed.wait(self._seconds)
        self._with_store(lambda store: store.set(f"beat/{self._rank}", _FAREWELL))

    def _listen(self) -> None:
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            words = self._with_store(lambda store, key=f"beat/{rank}": _read(store, key))
            former = self._heard.get(rank)
            if former is None or (words is not None and words != former[0]):
                self._heard[rank] = (words or b"", time.monotonic())
        asked = self._with_store(lambda store: _read(store, _ASKED))
        if asked is not None:
            self.asked = int(asked)


def _read(store: dist.Store, key: str) -> bytes | None:
    """A key's value, or None where it is not set yet; ``get`` alone would wait for it."""
    return store.get(key) if store.check([key]) else None
