"""Helper processes of a training process: they outlive signals that are meant for it.

A terminal's Ctrl-C and torchrun's SIGTERM reach every process of a group. The training process saves before it ends,
and needs its helpers until then.
"""

from __future__ import annotations

import os
import signal
import threading


def shield_from_signals() -> None:
    """Make this helper process end when its parent says so, and not before. Call it first thing in the helper.

    SIGINT and SIGUSR1 are ignored. SIGTERM, which is how ``multiprocessing`` ends a helper, is obeyed if the parent
    sent it. A parent that dies without a word takes its helper along through PyTorch's and multiprocessing's own watch.
    """
    parent = os.getppid()
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked in all threads, it waits to be fetched with its sender's name, which a handler would not learn.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(parent,), name="signals", daemon=True).start()


def _obey(parent: int) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)
