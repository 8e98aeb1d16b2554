"""Kills a conversion at chosen points and resumes it, many times. Started by ``test_convert_kill.py``.

Usage: python kill_conversion.py WORKDIR {hf_to_dcp,dcp_to_hf} NUMBER_OF_POINTS [overwrite]

A point is where the process opens, renames, creates or removes a file below WORKDIR, or reads, flushes or writes a part
of one. The conversion runs in a forked child, which kills itself with SIGKILL at the point, perhaps within a write.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.checkpoint import directory, files, safetensors_io, storage
from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp
from tests.ut.checkpoint.tiny import random_config, write_hf_directory

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
CALLS = ("write", "fsync", "preadv")
COMMIT_POINTS = 70
"""Points from the last chunk of a tensor to the end of the process."""


class KillSwitch:
    """Counts points, and kills this process at the chosen one."""

    def __init__(self, root: Path, kill_at: int | None) -> None:
        self.count = 0
        self._root, self._kill_at = str(root), kill_at
        self._lock = threading.RLock()

    def install(self) -> None:
        sys.addaudithook(self._audit)
        for name in CALLS:
            setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, function: Callable[..., Any], descriptor: int, *arguments: Any) -> Any:
        def tear() -> None:
            if function.__name__ == "write":  # half of it
                function(descriptor, arguments[0][: len(arguments[0]) // 2])

        self._point(tear)
        return function(descriptor, *arguments)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in EVENTS and str(arguments[0]).startswith(self._root):
            self._point()

    def _point(self, last: Callable[[], Any] = lambda: None) -> None:
        """Count a point; at the chosen one, do ``last`` and die."""
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                last()
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], None], root: Path, kill_at: int | None) -> tuple[int, int]:
    """Run ``action`` in a forked child; returns its wait status and the number of points it passed."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            torch.set_num_threads(1)  # replaces the pool that was forked, which two threads at once cannot
            switch = KillSwitch(root, kill_at)
            switch.install()
            action()
            os.write(write_end, str(switch.count).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)
    _, status = os.waitpid(child, 0)
    points = os.read(read_end, 20)
    os.close(read_end)
    return status, int(points or 0)


def content(directory_: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory_)): p.read_bytes() for p in sorted(directory_.rglob("*")) if p.is_file()}


class Conversion:
    """One of the two commands below ``root / "work"``, with or without an existing result to replace."""

    def __init__(self, root: Path, command: str, *, replaces: bool) -> None:
        self.place, self._root, self._command, self._replaces = root / "work", root, command, replaces
        self.target = self.place / "result" / ("release" if command == "hf_to_dcp" else "")
        write_hf_directory(root / "hf", random_config(random.Random(1), moe=True), layout="v5")
        if command == "dcp_to_hf":
            hf_to_dcp(root / "hf", root / "dcp")
        if replaces:
            self._run("fp32")
            self.place.rename(root / "before")

    def prepare(self) -> None:
        """Restore the state before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        if self._replaces:
            shutil.copytree(self._root / "before", self.place)

    def run(self) -> None:
        self._run("keep")

    def _run(self, dtype: str) -> None:
        options = {"workers": 2, "overwrite": self._replaces, "dtype": dtype}
        if self._command == "hf_to_dcp":
            hf_to_dcp(self._root / "hf", self.place / "result", **options)
        else:
            dcp_to_hf(
                self._root / "dcp", self.place / "result", self._root / "hf", max_shard_size=30_000, **options
            )

    def check_killed(self) -> bool:
        """Check that the result, if any, is complete and that the tracker points to it; returns whether it exists."""
        complete = self.target.exists()
        if complete:
            directory.verify_directory(self.target, checksums=True)
        elif self._replaces:
            directory.verify_directory(directory.replaced_name(self.target), checksums=True)
        if self._command == "hf_to_dcp" and directory.read_tracker(self.place / "result") is not None:
            directory.verify_directory(directory.resolve_checkpoint(self.place / "result"), checksums=True)
        return complete


def chosen_points(rng: random.Random, total: int, points: int) -> list[int]:
    """A third of them among the last, where the result is renamed, the rest anywhere."""
    late = total - COMMIT_POINTS
    return sorted(rng.sample(range(1, late), points - points // 3) + rng.sample(range(late, total + 1), points // 3))


def main() -> None:
    root, command, points = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    replaces = sys.argv[4:] == ["overwrite"]
    torch.set_num_threads(1)
    safetensors_io.READ_BYTES = 2000
    storage.FILE_BYTES = 30_000
    files.WRITE_BYTES = 2000
    rng = random.Random(0)
    conversion = Conversion(root, command, replaces=replaces)
    place = conversion.place
    conversion.prepare()
    status, total = in_child(conversion.run, root, None)
    assert status == 0
    reference = content(place)
    kept = absent = 0
    for kill_at in chosen_points(rng, total, points):
        conversion.prepare()
        status, _ = in_child(conversion.run, root, kill_at)
        assert os.WIFSIGNALED(status) or status == 0, f"point {kill_at}: status {status}"
        complete = conversion.check_killed()
        absent += not complete
        kept += len(list(place.rglob(f"{directory.FINISHED}/*.*.json"))) > 0
        if replaces or not complete or list(place.rglob("plan.json")):
            status, _ = in_child(conversion.run, root, None)
            assert status == 0, f"point {kill_at}: resuming failed"
        assert content(place) == reference, f"point {kill_at}: another result"
    print(f"{points} of {total} points, {kept} with finished files to keep, {absent} without the target")


if __name__ == "__main__":
    main()
