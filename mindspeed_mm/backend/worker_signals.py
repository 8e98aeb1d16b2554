"""Signal handling of a rank's worker processes, such as data loader workers.

A terminal's Ctrl-C and torchrun's SIGTERM reach every process of a process group. The rank saves a checkpoint before it
exits, and needs its workers until then.
"""

from __future__ import annotations

import os
import signal
import threading


def ignore_group_signals() -> None:
    """Make this worker exit only when its parent asks; to be called first in the worker.

    SIGINT and SIGUSR1 are ignored. SIGTERM, with which ``multiprocessing`` ends a worker, is obeyed from the
    parent. If the parent dies, PyTorch's and multiprocessing's own checks end the worker.
    """
    parent = os.getppid()
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked in all threads, SIGTERM is fetched with its sender's process id, which a handler does not get.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_parent_asks, args=(parent,), name="signals", daemon=True).start()


def _exit_when_parent_asks(parent: int) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)
