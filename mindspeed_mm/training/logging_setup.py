"""Logging of a training run: the package's logger prints to the console, rank 0 everything and other ranks warnings."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time

from mindspeed_mm.progress import above_the_bar

RAW = {"raw": True}
"""``extra`` of a record that is printed as it is, like the training log's lines."""


ALL_RANKS = {"all_ranks": True}
"""``extra`` of a record that other ranks print, too, though it is not a warning."""

RANK_0_ONLY = {"all_ranks": False}
"""``extra`` of a warning that is the same on all ranks."""


class _ConsoleHandler(logging.Handler):
    """Prints rank 0's records and the warnings of other ranks, to whatever ``sys.stdout`` is at the moment."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._is_main = rank == 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this rank prints the record."""
        return self._is_main or getattr(record, "all_ranks", record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with above_the_bar():
                print(self.format(record), flush=True)
        except (OSError, ValueError):  # a closed console, as after "| head", does not stop training
            with contextlib.suppress(OSError):
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), 1)  # else the interpreter's last flush would fail, too
                print("warning: standard output is closed; training goes on", file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    """`` [  12.3 s] message``, with seconds since the start; warnings say so, and which other rank they are from."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._started = time.time()

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if getattr(record, "raw", False):
            return message
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = f"rank {self._rank}: " if self._rank else ""
        return f" [{record.created - self._started:6.1f} s] {level}{rank}{message}"


def setup_logging(rank: int) -> None:
    """Send the package's log records to the console; calling it again starts the clock anew."""
    handler = _ConsoleHandler(rank)
    handler.setFormatter(_Formatter(rank))
    logger = logging.getLogger("mindspeed_mm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
