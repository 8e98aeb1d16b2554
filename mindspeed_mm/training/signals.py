"""Signals that stop a run gracefully: it saves after the present step, on all ranks together.

A signal may reach one rank, or all of them at different moments. Each rank only records it. The request travels with
the step's metrics, so that all ranks see it after the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mindspeed_mm.training.launch_environment import RUN_STATE, with_variables

STOPPED_STATUS = 75
"""Exit status of a run that stopped on request, saved, and can be continued."""
QUIT_STATUS = 130
"""Exit status after a second Ctrl-C: nothing was saved."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WAIT_SECONDS = 5.0


class StopRequest:
    """Records the signals that arrive inside the ``with`` block; called once in every step."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal is not None

    def __enter__(self) -> StopRequest:
        """Handle SIGTERM, SIGUSR1 and SIGINT, and report to the launcher that a signal now saves."""
        self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        end_launcher_with(None)  # with torchrun's status, whatever an earlier attempt ended with
        _report_to_launcher(f"pid.{os.environ.get('LOCAL_RANK', '0')}", str(os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers; a rank that torchrun started, and that now ends, ignores the signals instead."""
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGINT:
                _write(" second Ctrl-C: stopping at once, without saving\n")
                os._exit(QUIT_STATUS)
            return
        self._signal = signal.Signals(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            # the launcher passes Ctrl-C and other signals on as this one
            name = "stop requested" if number == signal.SIGUSR1 else self._signal.name
            _write(f" {name}: the run will save and stop after this step; Ctrl-C now stops it at once\n")


def exit_status(*, stopped: bool) -> int:
    """Status that this process should end with after training.

    torchrun takes any status but 0 for a failure, which it reports at length and answers with a restart. So under
    torchrun a stopped process ends with 0, and the launcher, which reads a file written here, with 75.
    """
    if not stopped:
        end_launcher_with(0)
        return 0
    told = end_launcher_with(STOPPED_STATUS)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # which torchrun makes after failures
    if "TORCHELASTIC_RUN_ID" in os.environ and (told or restarts or RUN_STATE not in os.environ):
        return 0
    return STOPPED_STATUS


def status_after_error(line: str) -> int:
    """Status that this process should end with after a user's error; ``line`` says what it is.

    torchrun takes any status but 0 for a failure, which it reports with a traceback. Where all ranks end with such an
    error, none is left waiting: under the launcher, which prints the line and ends with status 2, they all end with 0.
    Elsewhere rank 0 prints the line: torchrun ends the others while they wait here, unless the error is theirs alone.
    """
    line = with_variables(line, os.environ)
    told = end_launcher_with(2, error=line)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # which torchrun makes after failures only
    if told and not restarts and _all_ranks_arrive():
        return 0
    if RUN_STATE not in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(_WAIT_SECONDS)
    print(line, file=sys.stderr, flush=True)
    return 2


def _all_ranks_arrive() -> bool:
    """Whether every rank calls this, within a few seconds. Ranks count themselves in torchrun's store."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return True
    from mindspeed_mm.backend.process_group import connect_store

    with contextlib.suppress(RuntimeError):  # of the store, when torchrun has gone
        if store := connect_store("users' errors", timeout_seconds=_WAIT_SECONDS):
            deadline = time.monotonic() + _WAIT_SECONDS
            arrived = store.add("ranks", 1)
            while arrived < world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                arrived = store.add("ranks", 0)
            return arrived == world_size
    return False


def end_launcher_with(status: int | None, *, error: str = "") -> bool:
    """Ask the launcher, if there is one, to end with ``status``, or with torchrun's for None.

    ``error`` is a line for it to print last, below torchrun's report of the failure.

    Returns:
        Whether there is a launcher and it was told.
    """
    return _report_to_launcher("status", "" if status is None else str(status)) and _report_to_launcher("error", error)


def _report_to_launcher(name: str, content: str) -> bool:
    directory = os.environ.get(RUN_STATE)
    if not directory:
        return False
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)  # old files in TMPDIR may have been removed
        (Path(directory) / name).write_text(content and f"{content}\n")
    except OSError as error:  # the launcher then ends with torchrun's status
        where = f"TMPDIR {Path(directory).parent}"
        _write(f" warning: cannot report {name.partition('.')[0]} to the launcher: {where}: {error.strerror}\n")
        return False
    return True


def _write(message: str) -> None:
    # a handler may interrupt a print, whose buffer cannot be entered twice
    os.write(2, message.encode())
