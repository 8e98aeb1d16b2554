"""The file by which a profile is asked for while training runs."""

from __future__ import annotations

import json
from pathlib import Path

from mindspeed_mm.config.files import load_config
from mindspeed_mm.config.tools_config import DYNAMIC_FILE, DynamicRequest
from mindspeed_mm.errors import UserError

_SHOWN = (
    "is_valid", "start_step", "active", "prof_dir", "record_shapes", "profile_memory", "with_stack", "is_rank",
    "rank_list",
)  # fmt: skip
"""Fields that the file to be edited begins with."""


class RequestFile:
    """``profiler_config.json`` in a directory. What it holds when the run starts asks for nothing yet.

    Attributes:
        path: the file.
    """

    def __init__(self, directory: Path, *, writes: bool) -> None:
        """``writes``: whether this process leaves a file to be edited where there is none.

        Raises:
            UserError: if the directory cannot be written to.
        """
        self.path = directory / DYNAMIC_FILE
        if writes and not self.path.exists():
            template = DynamicRequest().model_dump(include=set(_SHOWN))
            try:
                self.path.write_text(json.dumps(template, indent=4) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(
                    f"tools file: profile.dynamic_param.config_path: {self.path} cannot be written: {error.strerror}"
                ) from error
        self._seen = self._stamp()

    def changed(self) -> DynamicRequest | None:
        """What the file asks for, if it has been written anew since the last call.

        Raises:
            UserError: naming the mistake in it.
        """
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return None
        self._seen = stamp
        return load_config(self.path, DynamicRequest, flag="profile.dynamic_param.config_path")

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs once the file is written anew; None where there is none at present."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
