"""What an interrupted conversion has already written, so that the next one can keep it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint.checksum import file_checksum
from mindspeed_mm.checkpoint.directory import partial_name, read_manifest, replaced_name
from mindspeed_mm.checkpoint.executor import counted
from mindspeed_mm.checkpoint.files import make_directory, remove, write_atomically
from mindspeed_mm.errors import UserError

_PLAN = "plan.json"


class Journal:
    """A hidden directory beside the target with the plan of a conversion and one record per finished file.

    A record is written after its file is flushed to disk, so a file without a record counts for nothing. Records are
    believed only for the same plan, and only after the file's checksum is found to be the recorded one.
    """

    def __init__(self, target: Path, plan: str) -> None:
        """
        Args:
            target: the directory that is being made.
            plan: fingerprint of everything that decides the bytes of the result.
        """
        self.plan = plan
        self._target = target
        self._partial = partial_name(target)
        self._directory = target.with_name(f".{target.name}.journal")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the target for this process; the lock falls with the process, however it ends.

        After an error, what was written is removed if no file of it is finished.

        Raises:
            UserError: if another process is writing the same target.
        """
        make_directory(self._directory)
        with (self._directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is writing {self._target}; wait for it to end") from error
            try:
                yield
            except BaseException:
                if not any(self._directory.glob("*.record")):
                    remove(self._partial)
                    remove(self._directory)
                raise

    def resume(self) -> dict[str, dict[str, Any]]:
        """Records of the finished files of an earlier attempt at the same plan, by file name.

        Files that are not finished, or whose checksum is another, are removed.
        """
        finished: dict[str, dict[str, Any]] = {}
        if self._read(_PLAN) == {"plan": self.plan}:
            records = {
                path.name.removesuffix(".record"): self._read(path.name) for path in self._directory.glob("*.record")
            }
            if records:
                print(f"checking {counted(len(records), 'file')} that an interrupted run has finished")
            with ThreadPoolExecutor() as pool:
                intact = pool.map(lambda name: self._intact(name, records[name]), records)
                finished = {name: records[name] for name, good in zip(records, intact, strict=True) if good}
        if not finished:
            self.clear()
        for path in self._partial.glob("*"):
            if path.name not in finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        make_directory(self._directory)
        write_atomically(self._directory / _PLAN, json.dumps({"plan": self.plan}).encode())
        return finished

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Record a file that is complete and on disk; ``record`` has its ``size`` and ``checksum``."""
        write_atomically(self._directory / f"{name}.record", json.dumps(record).encode())

    def is_done(self) -> bool:
        """Whether an earlier attempt at this plan completed the target and ended before it removed the journal."""
        if self._read(_PLAN) != {"plan": self.plan} or not self._target.exists():
            return False
        try:
            return read_manifest(self._target)["metadata"].get("plan") == self.plan
        except UserError:
            return False

    def clear(self) -> None:
        """Forget everything but the lock."""
        for path in self._directory.glob("*"):
            if path.name != "lock":
                path.unlink()

    def remove(self) -> None:
        """Remove the journal, and what the target replaced if that is still there; the target is complete.

        The plan goes last, so that removal can be taken up again.
        """
        remove(replaced_name(self._target))
        for path in sorted(self._directory.glob("*"), key=lambda path: path.name == _PLAN):
            path.unlink()
        self._directory.rmdir()

    def _intact(self, name: str, record: dict[str, Any] | None) -> bool:
        path = self._partial / name
        if record is None or not path.is_file() or path.stat().st_size != record.get("size"):
            return False
        return file_checksum(path) == record.get("checksum")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self._directory / name).read_text())
        except (OSError, ValueError):
            return None
