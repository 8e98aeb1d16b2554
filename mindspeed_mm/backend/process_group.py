"""The job's process group and its key-value store."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm.backend.device import Backend
from mindspeed_mm.backend.fsdp_compat import patch_fsdp

_SIOCGIFADDR = 0x8915  # Linux: ioctl for an interface's address
_timeout = datetime.timedelta(minutes=30)
_HOST_FACTOR = 4  # a rank may be this many timeouts later than another, whose disk is faster
_host_groups: dict[str, Any] = {}


def communication_note(backend: Backend, requested: str) -> str | None:
    """A log line if ``--distributed-backend`` names another library than the device's; None otherwise.

    None for ``nccl`` on every device: the recipe's launchers, written for NPUs, always pass it.
    """
    if requested in ("auto", "nccl", backend.communication):
        return None
    return (
        f"--distributed-backend {requested}: {backend.name} always uses its own collective library, "
        f"{backend.communication}"
    )


def init_distributed(backend: Backend, *, timeout_minutes: int, host_tensors: bool = False) -> None:
    """Initialise the default process group from torchrun's environment; without torchrun a group of one rank.

    Args:
        backend: the device of this rank.
        timeout_minutes: timeout of one collective.
        host_tensors: whether collectives run on host tensors too.
    """
    global _timeout
    if dist.is_initialized():
        return
    patch_fsdp(backend.communication)
    _set_gloo_interface()
    libraries = backend.communication
    if host_tensors and backend.is_accelerator:
        libraries = f"cpu:gloo,{backend.name}:{libraries}"
    timeout = _timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        store = _process_group_store(timeout=timeout)
        options = {} if store is None else {
            "store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])
        }
        dist.init_process_group(libraries, timeout=timeout, **options)
    else:
        dist.init_process_group(libraries, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _set_gloo_interface() -> None:
    """Select gloo's network interface in a job of several hosts, unless the user has."""
    multiple_hosts = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if multiple_hosts and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = _interface_towards(os.environ.get("MASTER_ADDR", "localhost"))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def host_group() -> dist.ProcessGroup:
    """The gloo group of all ranks through which checkpoints exchange objects; the first call is a collective.

    A thread uses it while training uses the default group, whose library may exchange nothing but device tensors.
    """
    world = dist.group.WORLD
    if _host_groups.get("world") is not world:
        _host_groups.update(world=world, gloo=dist.new_group(backend="gloo", timeout=_HOST_FACTOR * _timeout))
    return _host_groups["gloo"]


def shutdown_distributed() -> None:
    """Destroy the default process group, if there is one."""
    if not dist.is_initialized():
        return
    # torch 2.7 destroys a group while it holds the GIL and joins the library's threads there, which need the GIL to
    # release the tensors of their last collective: a deadlock. References held here defer the libraries' destruction to
    # clear(), which releases the GIL.
    libraries = [
        group._get_backend(torch.device(device))
        for group in dist.distributed_c10d._world.pg_map for device in group._device_types
    ]
    _host_groups.clear()
    dist.destroy_process_group()
    libraries.clear()


def _interface_towards(host: str) -> str | None:
    """Name of the network interface through which this machine reaches ``host``; None if it cannot be determined.

    gloo uses the interface of the machine's own host name, which on many machines is the loopback device: other hosts
    cannot reach it there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but selects the route
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except OSError:
        pass
    return None


def _process_group_store(*, timeout: datetime.timedelta) -> Any | None:
    """torchrun's store for the process group, with a prefix for each restart.

    torchrun keeps one store over all restarts. On the bare store a restarted process group may read the addresses of
    the previous ranks, and wait for them until its timeout.

    Returns:
        The store; None if torchrun hosts none, so that rank 0 has to.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _connect("group", timeout)


def connect_store(prefix: str, *, timeout_seconds: float) -> Any | None:
    """A separate connection to the job's store; None without torchrun.

    The process group's own connection must not be shared between threads: a waiting operation blocks all others.

    Args:
        prefix: prepended to all keys.
        timeout_seconds: of one operation, while the store is reachable.
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
