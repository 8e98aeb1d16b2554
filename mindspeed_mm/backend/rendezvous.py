"""How ranks find each other: the job's key-value store, and the network interface to the other hosts."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
from typing import Any

import torch.distributed as dist

_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux


def interface_towards(host: str) -> str | None:
    """Name of the interface through which this machine reaches ``host``; None where that cannot be told.

    Gloo takes the interface of the machine's own name, which is the loopback device on many machines: the others could
    not reach it there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but chooses the way
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except OSError:
        pass
    return None


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
