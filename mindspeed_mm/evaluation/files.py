"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.files import make_directory, new_file
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_directory, is_file, reason, shorten


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside into one line.

    Raises:
        UserError: naming ``--output``.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"--output {shorten(path)} cannot be written: {reason(error)}; give another path") from error


def check_output(path: str, data: str) -> None:
    """Check that ``--output`` can be written, by making its directory and a file there.

    Raises:
        UserError: if not, or if it is the file of questions.
    """
    with writing(path):
        if is_directory(path):
            raise ValueError("it is a directory")
        if os.path.exists(path):
            if not is_file(path):
                raise ValueError("it is not a regular file")
            if os.path.samefile(path, data):
                raise ValueError("it is the --data file")
        check_directory(Path(os.path.realpath(path)).parent)


def check_directory(directory: Path) -> None:
    """Make a directory and its parents, and try to write a file there.

    Raises:
        OSError: if that fails.
    """
    for path in (*reversed(directory.parents), directory):
        make_directory(path)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(directory))
    with tempfile.TemporaryFile(dir=directory):
        pass


def write_output(path: str | Path, result: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    # half characters, as in a path that is not UTF-8, become JSON's escapes
    content = (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with new_file(temporary) as file:
                file.write(content)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
