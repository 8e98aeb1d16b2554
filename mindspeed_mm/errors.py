"""The one error type that a user's mistake raises."""

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
