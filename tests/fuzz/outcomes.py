"""Runs a function on a broken input and says what came of it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mindspeed_mm.errors import UserError

LIMIT_SECONDS = 20
LIMIT_BYTES = 2 << 30


class _TooSlow(BaseException):
    """Not an Exception, so that no reader turns it into a line."""


@dataclasses.dataclass
class Outcomes:
    """What came of the inputs tried.

    Attributes:
        counts: how many were usable, refused, or ended in one of the faults: traceback, bad line, hang, memory.
        faults: a description of each fault.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    def run(self, name: str, function: Callable[[], Any], *, seconds: float = LIMIT_SECONDS) -> Any:
        """Call ``function`` and count the outcome; gives its result, or None if it raised.

        Args:
            name: of the input, enough to make it again.
            function: reads the input; a UserError is the right way to refuse it.
            seconds: a hang beyond.
        """
        before = _peak_bytes()
        result = None
        outcome, fault = "usable", ""
        try:
            with _time_limit(seconds):
                result = function()
        except UserError as error:
            outcome = "refused"
            text = str(error)
            if not text or "\n" in text or len(text) > 2000:
                outcome, fault = "bad line", repr(text[:300])
        except _TooSlow:
            outcome, fault = "hang", f"more than {seconds} s"
        except Exception:
            outcome, fault = "traceback", traceback.format_exc(limit=-4)
        if _peak_bytes() - before > LIMIT_BYTES:
            outcome, fault = "memory", f"{(_peak_bytes() - before) / 2**30:.1f} GiB"
        if fault:
            self.add_fault(name, outcome, fault)
        else:
            self.counts[outcome] += 1
        return result

    def add_fault(self, name: str, outcome: str, fault: str) -> None:
        """Count a fault of the input ``name`` under ``outcome``."""
        self.counts[outcome] += 1
        self.faults.append(f"{name}: {outcome}: {fault}")

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in sorted(self.counts.items()))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooSlow

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


