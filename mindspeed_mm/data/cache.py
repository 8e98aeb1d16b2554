"""A directory that one process builds while the rest waits.

The finished directory appears by a rename, so a killed build leaves nothing that looks finished. It records sizes and
checksums of its files; one that is damaged is built again. The lock is the operating system's and is released when its
process dies.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import reason

logger = logging.getLogger(__name__)
_PROCESS_START = time.time()
_FINISHED = "finished"
_BLOCK = 1 << 22


def image_directory(cache_dir: str | None) -> Path:
    """Where images are kept that records hold themselves or name by a URL; imports nothing of ``datasets``."""
    if cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
        home = Path(os.environ.get("HF_HOME", home))
        cache_dir = os.path.join(os.environ.get("HF_DATASETS_CACHE", home / "datasets"), "mindspeed_mm")
    return Path(cache_dir) / "images"


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
            if (target / _FINISHED).exists() and (damage := _damage(target)):
                logger.warning("%s is damaged (%s) and is rebuilt", target, damage)
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
    return not (overwrite and built <= _PROCESS_START) and not _damage(target)


def _damage(target: Path) -> str:
    """What is wrong with the files of a finished directory; empty if nothing is."""
    try:
        recorded = json.loads((target / _FINISHED).read_bytes() or b"null")
        if not isinstance(recorded, dict):
            return f"{_FINISHED} names no files"
        for name, (size, checksum) in recorded.items():
            if (target / name).stat().st_size != size:
                return f"{name} has another size"
            if _checksum(target / name) != checksum:
                return f"{name} has another checksum"
    except OSError as error:
        return f"{error.filename}: {reason(error)}"
    except (ValueError, TypeError, RecursionError) as error:
        return f"{_FINISHED}: {reason(error)}"
    return ""


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _remove(path: Path) -> None:
    """Remove a directory, or what has taken its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _build(target: Path, build: Callable[[Path], None]) -> None:
    for leftover in target.parent.glob(f"{target.name}.building-*"):  # of processes that died; we hold the lock
        _remove(leftover)
    temporary = target.with_name(f"{target.name}.building-{os.getpid()}")
    try:
        temporary.mkdir()
        build(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        facts = {str(path.relative_to(temporary)): (path.stat().st_size, _checksum(path)) for path in files}
        (temporary / _FINISHED).write_text(json.dumps(facts))
        if target.exists():
            old = target.with_name(f"{target.name}.building-old")
            target.rename(old)
            temporary.rename(target)
            _remove(old)
        else:
            temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        where = f"cache_dir {target.parent}"
        raise UserError(f"{where} cannot be written: {reason(error)}; free disk space or choose another") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
