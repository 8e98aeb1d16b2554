"""How far a long phase is: a bar on a terminal, or a log line now and then.

The terminal is standard error, or the one that the launcher names: it pipes the output of the ranks through a log file,
so that their own standard error is none. Log lines are printed above the bar. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Between two log lines of a phase; a shorter phase has none."""
TERMINAL_FILE = "terminal"
"""In the launcher's directory for messages: the path of its terminal."""
_ALL_RANKS = {"all_ranks": True}
_PAINT_SECONDS = 0.5  # between two paintings
_QUIET_SECONDS = 0.3  # after a log line, which the launcher may pass on a little later
_LATEST_SECONDS = 2.0  # painted then, though log lines go on and on
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FORMAT_OF_RATES = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Terminal:
    """A terminal that is written to without ever waiting for it; the cursor returns to the beginning of the line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def has_width(self) -> bool:
        """Whether it knows its width."""
        return os.get_terminal_size(self._descriptor).columns > 0

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # it is full, or has been closed
            os.write(self._descriptor, f"{text}\r".encode())  # what others print then overwrites the bar

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        """For the width of the terminal."""
        return self._descriptor


class _Screen:
    """The bar of this process that is on the terminal, painted by a thread."""

    def __init__(self) -> None:
        self.terminal: _Terminal | None = None
        self.lock = threading.RLock()
        self._bar: Any = None
        self._printed = 0.0
        self._changed = threading.Event()

    def show(self, bar: Any) -> None:
        """Paint ``bar`` whenever it has changed."""
        with self.lock:
            first, self._bar = self._bar is None, bar
        if first:
            threading.Thread(target=self._paint, args=(bar,), name="progress bar", daemon=True).start()

    def changed(self) -> None:
        """The bar is to be painted again."""
        self._changed.set()

    def hide(self, bar: Any) -> None:
        """Remove the bar."""
        with self.lock:
            if self._bar is bar:
                self._bar = None
            bar.leave = False
            bar.close()
        self._changed.set()

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """While something else is printed."""
        with self.lock:
            if self._bar is None:
                yield
                return
            self._bar.clear()
            yield
            self._printed = time.monotonic()
        self._changed.set()

    def _paint(self, bar: Any) -> None:
        painted = 0.0
        while True:
            self._changed.wait()
            now = time.monotonic()
            quiet, due = now - self._printed >= _QUIET_SECONDS, now - painted >= _PAINT_SECONDS
            with self.lock:
                if self._bar is not bar:
                    return
                if due and (quiet or now - painted >= _LATEST_SECONDS):
                    self._changed.clear()
                    painted = now
                    bar.refresh()
                    continue
            time.sleep(0.1)


_screen = _Screen()
# a forked process has no such thread, which may have held the lock
os.register_at_fork(after_in_child=_screen.__init__)


def use_terminal(launcher: str | None = None) -> bool:
    """Show bars from now on, if there is a terminal.

    Args:
        launcher: directory in which a launcher may name its terminal; None without a launcher.

    Returns:
        Whether there is one.
    """
    _screen.terminal = None
    descriptor: int | None = None
    if launcher:
        with contextlib.suppress(OSError):
            path = Path(launcher, TERMINAL_FILE).read_text().strip()
            descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    elif sys.stderr is not None and sys.stderr.isatty():
        descriptor = os.dup(sys.stderr.fileno())
    if descriptor is not None and os.isatty(descriptor):
        _screen.terminal = _Terminal(descriptor)
    return _screen.terminal is not None


@contextlib.contextmanager
def above_the_bar() -> Iterator[None]:
    """Inside, something is printed: the bar, if there is one, is removed before and painted again after."""
    with _screen.cleared():
        yield


class Phase:
    """A phase, from its beginning to ``close``; a context manager. ``advance`` may be called in any thread."""

    def __init__(self, title: str, *, unit: str, total: int | None = None, done: int = 0, lines: bool = True) -> None:
        """Begin.

        Args:
            title: of the bar and the lines.
            unit: what is counted; ``B`` for bytes.
            total: how many there are; None if that is not known.
            done: how many were done before.
            lines: whether to log lines where there is no terminal.
        """
        self.title = title
        self._unit, self._total, self._first, self._done = unit, total, done, done
        self._lines = lines
        self._began = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        if _screen.terminal is not None:
            from tqdm import tqdm

            bytes_ = unit == "B"
            width = {"dynamic_ncols": True} if _screen.terminal.has_width else {"ncols": 80}
            self._bar = tqdm(
                desc=title, unit=unit if bytes_ else f" {unit}", unit_scale=bytes_, total=total, initial=done,
                file=_screen.terminal, leave=False, mininterval=1e9, miniters=1, delay=1e-9,
                bar_format=(_FORMAT_OF_RATES if lines else _FORMAT) if total else None, **width,
            )
            _screen.show(self._bar)

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def on_terminal(self) -> bool:
        """Whether it has a bar."""
        return self._bar is not None

    def advance(self, count: int, **shown: str) -> None:
        """Count more; ``shown``: what else the bar shows, by name."""
        now = time.monotonic()
        with self._lock:
            self._done += count
            if self._lines and self._bar is None and now - self._said >= LINE_SECONDS:
                self._said = now
                logger.info(self.describe(), extra=_ALL_RANKS)  # within the lock, so that lines keep their order
        if self._bar is not None:
            with _screen.lock:
                self._bar.n = self._done
                if shown:
                    self._bar.set_postfix(shown, refresh=False)
            _screen.changed()

    def describe(self) -> str:
        """``title: 12.3 of 61.0 GB (20%), 1.2 GB/s, 0:00:41 left``."""
        seconds = max(1e-9, time.monotonic() - self._began)
        rate = (self._done - self._first) / seconds
        text = f"{self.title}: {self._amount(self._done, unit=not self._total)}"
        if self._total:
            text += f" of {self._amount(self._total)} ({100 * self._done / self._total:.0f}%)"
        text += f", {self._amount(rate)}/s"
        if self._total and rate > 0:
            text += f", {format_seconds((self._total - self._done) / rate)} left"
        return text

    def close(self) -> None:
        """End; a bar disappears."""
        if self._bar is not None:
            _screen.hide(self._bar)
            self._bar = None

    def _amount(self, count: float, *, unit: bool = True) -> str:
        if self._unit == "B":
            return f"{count / 1e9:.2f}{' GB' if unit else ''}"
        return f"{count:.0f}{f' {self._unit}' if unit else ''}"


def format_seconds(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
