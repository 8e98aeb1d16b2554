"""A connection of one's own to the job's key-value store, beside the one that the process group uses."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist


def own_store(prefix: str, *, timeout_seconds: float) -> Any | None:
    """Connect to the store that torchrun's processes met through; None where the process was not started by it.

    The process group's own connection must not be shared with another thread: whoever waits on it blocks the other.

    Args:
        prefix: put before all keys, together with the number of torchrun's restarts.
        timeout_seconds: of one operation, where the store answers at all.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"{prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
