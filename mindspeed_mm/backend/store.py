"""Connections to the key-value store through which a job's processes meet."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist


def group_store(*, timeout: datetime.timedelta) -> Any | None:
    """For the process group: torchrun's store, with a place of its own for each of its restarts.

    torchrun keeps one store over all restarts. A process group that is started again on the bare store may read where
    the processes before it could be reached, and wait for them until its time is up.

    Returns:
        The store; None where torchrun keeps none, so that rank 0 has to.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _connect("group", timeout)


def own_store(prefix: str, *, timeout_seconds: float) -> Any | None:
    """A connection beside the process group's; None where this process was not started by torchrun.

    The process group's own must not be shared with another thread: whoever waits on it blocks the other.

    Args:
        prefix: put before all keys.
        timeout_seconds: of one operation, where the store answers at all.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    return _connect(prefix, datetime.timedelta(seconds=timeout_seconds))


def _connect(prefix: str, timeout: datetime.timedelta) -> Any:
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"{prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
