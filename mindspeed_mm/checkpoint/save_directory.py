"""The ``--save`` directory: one run's at a time; at its start there, clean, writable, the same one on all machines."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from mindspeed_mm.checkpoint import retention
from mindspeed_mm.checkpoint.files import make_directory, new_file
from mindspeed_mm.checkpoint.loader import agreed_error
from mindspeed_mm.checkpoint.save_lock import SaveLock
from mindspeed_mm.errors import UserError

_PATIENCE = 10.0  # seconds until a network file system has to show what another machine has written


@contextlib.contextmanager
def held_save_directory(root: str | None) -> Iterator[None]:
    """Keep other runs from saving into ``root`` inside the block. Entered by all processes together.

    Args:
        root: ``--save``; nothing is held for None.

    Raises:
        UserError: on all processes, if another run saves there now.
    """
    lock = SaveLock(Path(root)) if root is not None and dist.get_rank() == 0 else None
    try:
        if root is not None:
            with agreed_error():
                note = lock.take() if lock is not None else None
            if note is not None:
                print(f" {note}", flush=True)
        yield
    finally:
        if lock is not None:
            lock.release()


def open_save_directory(root: Path) -> list[str]:
    """Make the directory, and clean it of what an interrupted run has left. Called by all processes together.

    Returns:
        On rank 0 a line for each thing that was cleaned.

    Raises:
        UserError: on all processes, if rank 0 cannot write there, or others do not see what it writes.
    """
    rank = dist.get_rank()
    probe = root / f"{retention.PROBE}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    message: list[str | None] = [None, str(probe)]
    done: list[str] = []
    if rank == 0:
        try:
            make_directory(root)
            done = retention.clean(root)
            with new_file(probe):
                pass
        except OSError as error:
            message[0] = f"--save {root} cannot be written ({error.strerror or error}); name another directory"
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
    probe = Path(str(message[1]))
    blind: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if appears(probe) else f"rank {rank} on {socket.gethostname()}")
    if rank == 0:
        with contextlib.suppress(OSError):  # the next start removes it
            probe.unlink(missing_ok=True)
    if any(blind):
        raise UserError(
            f"--save {root} is not the same directory on all machines: {next(filter(None, blind))} does not see what "
            "rank 0 writes there; name a directory on a file system that they share"
        )
    return done


def appears(path: Path) -> bool:
    """Whether a path that exists on another machine is seen here within a few seconds."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
