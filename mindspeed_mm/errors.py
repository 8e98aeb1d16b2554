"""The one error type that a user's mistake raises, and how a command-line program ends with it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

_LONGEST = 1500


class UserError(Exception):
    """A mistake in a file, flag or environment that the user can mend.

    The message is a single line that names the file or flag, the value found and the remedy. Entry points print it
    without a traceback and exit with status 2. Data that a message quotes can neither break the line nor fill the
    screen: line breaks and control characters are escaped, and the middle of a long message is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str, limit: int = _LONGEST) -> str:
    """``message`` without line breaks and control characters, at most about ``limit`` characters long."""
    if len(message) > limit:
        message = f"{message[: limit * 3 // 4]} ... {message[-limit // 4 :]}"
    if message.isprintable():
        return message
    return "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode("ascii") for c in message
    )


def report_errors(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a command-line program, and print what ends it early in one line on standard error.

    A command should import its slow modules itself, so that Ctrl-C is answered meanwhile, too.

    Args:
        command: the program; returns its exit status, None for 0.
        interrupted: what to print after Ctrl-C.

    Returns:
        The exit status: the command's, 2 for an error of the user or the system, 130 after Ctrl-C, 141 where the
        reader of standard output, such as ``head``, has ended.
    """
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack characters of the data
    try:
        try:
            status = command() or 0
        except SystemExit as stop:  # --help has been printed
            status = int(stop.code or 0)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if not _can_flush() or (error.errno == errno.ENOSPC and not place):
            place = "standard output cannot be written: "
        remedy = "; change its permissions, or run as its owner" if isinstance(error, PermissionError) else ""
        print(f"error: {one_line(f'{place}{error.strerror or error}{remedy}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _can_flush() -> bool:
    """Whether standard output can be written; if not, its buffer is discarded, so that the interpreter ends quietly."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
        return False
    return True


def _discard_output() -> None:
    """Send the rest of the buffer nowhere: writing it would fail once more when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
