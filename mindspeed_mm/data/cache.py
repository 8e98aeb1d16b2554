"""A directory that one process builds while the rest waits.

The finished directory appears by a rename, so a killed build leaves nothing that looks finished. The lock is the
operating system's and is released when its process dies.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mindspeed_mm.errors import UserError

logger = logging.getLogger(__name__)
_PROCESS_START = time.time()
_FINISHED = "finished"


def build_once(target: Path, build: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Make sure that ``target`` exists, building it if it does not.

    Args:
        target: directory named after everything that decides its content.
        build: fills an empty directory.
        overwrite: rebuild, unless ``target`` is newer than this process, since another process of the same job has
            then rebuilt it.

    Returns:
        ``target``, which now exists. Waits without a limit while another process builds it.

    Raises:
        UserError: if the directory cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir {target.parent} cannot be made: {error.strerror}; choose another") from error
    if _is_current(target, overwrite):
        return target
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that builds %s", target)
        lock.acquire()
    except OSError as error:
        raise UserError(f"cache_dir {target.parent} cannot be written: {error.strerror}; choose another") from error
    except NotImplementedError as error:
        raise UserError(
            f"cache_dir {target.parent} is on a file system without file locks, which keep processes from "
            "building twice; choose another"
        ) from error
    try:
        os.listdir(target.parent)  # refreshes a network file system's cache, which may not have the target yet
        if not _is_current(target, overwrite):
            _build(target, build)
    finally:
        lock.release()
    return target


def final_path(directory: Path) -> Path:
    """Where the directory that is being built will be when it is finished, for messages."""
    return directory.with_name(directory.name.partition(".building-")[0])


def _is_current(target: Path, overwrite: bool) -> bool:
    try:
        built = (target / _FINISHED).stat().st_mtime
    except OSError:
        return False
    return not overwrite or built > _PROCESS_START


def _build(target: Path, build: Callable[[Path], None]) -> None:
    for leftover in target.parent.glob(f"{target.name}.building-*"):  # of processes that died; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f"{target.name}.building-{os.getpid()}")
    try:
        temporary.mkdir()
        build(temporary)
        (temporary / _FINISHED).touch()
        if target.exists():
            old = target.with_name(f"{target.name}.building-old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or " ".join(str(error).split())
        where = f"cache_dir {target.parent}"
        raise UserError(f"{where} cannot be written: {reason}; free disk space or choose another") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
