"""Log lines of the package, collected by a test, and the one line of a user's error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator


class _Handler(logging.Handler):
    def __init__(self, receive: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        self._receive(record.getMessage())


@contextlib.contextmanager
def log_lines(receive: Callable[[str], None], name: str = "mindspeed_mm.checkpoint") -> Iterator[None]:
    """Call ``receive`` with every message that a logger of the package gets, from INFO on.

    Unlike ``caplog`` it works in processes without pytest, and after the package's logging was set up.
    """
    logger, handler = logging.getLogger(name), _Handler(receive)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def assert_one_line(outcome: tuple[int, str], *pieces: str) -> None:
    """A command's status and standard error are those of a user's error, in one line that has these pieces."""
    status, error = outcome
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for piece in pieces:
        assert piece in error
