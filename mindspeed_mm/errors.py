"""The one error type that a user's mistake raises."""


class UserError(Exception):
    """A mistake in a file, flag or environment that the user can mend.

    The message is a single line that names the file or flag, the value found and the remedy. Entry points print it
    without a traceback and exit with status 2.
    """
