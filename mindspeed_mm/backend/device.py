"""The choice of this process's device, and its process group."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from mindspeed_mm.backend import has_torch_npu, npu
from mindspeed_mm.backend.accelerator import Backend, Cuda
from mindspeed_mm.backend.fsdp_compat import mend_fsdp
from mindspeed_mm.backend.rendezvous import group_store, interface_towards
from mindspeed_mm.errors import UserError

_KINDS: dict[str, type[Backend]] = {"cpu": Backend, "cuda": Cuda, "npu": npu.Npu}
__all__ = [
    "Backend",
    "communication_note",
    "find_device",
    "known_devices",
    "load_device",
    "select_backend",
    "start_processes",
    "stop_processes",
]


def known_devices() -> tuple[str, ...]:
    """Names that ``--device`` takes besides ``auto``."""
    return tuple(_KINDS)


def find_device(name: str = "auto", *, processes: int = 0) -> str:
    """The kind of device to use.

    Args:
        name: what ``--device`` says; ``auto`` for the best there is.
        processes: how many the device must serve on this machine.

    Returns:
        ``cpu``, ``cuda`` or ``npu``.

    Raises:
        UserError: if ``name`` is unknown, that device is not usable here, or there are fewer of it than processes.
    """
    if name != "auto" and name not in _KINDS:
        raise UserError(f"--device {name!r} is unknown; choose auto, {', '.join(_KINDS)}")
    if name == "auto":
        name = _detect()
    elif reason := _why_unusable(name):
        raise UserError(f"--device {name}: no usable {name} device on this machine: {reason}")
    if name != "cpu":
        available = getattr(torch, name).device_count()
        if processes > available:
            raise UserError(
                f"{processes} processes are to run on this machine, which has {available} {name} device(s); lower "
                "--nproc_per_node (NPUS_PER_NODE in the launcher)"
            )
    return name


def load_device(name: str = "auto", *, processes: int = 0) -> str:
    """Find the device, and import and set what it needs. To be called before megatron is imported.

    Args:
        name: see :func:`find_device`, as for the rest.
        processes: likewise.
    """
    name = find_device(name, processes=processes)
    if name == "npu":
        npu.prepare()
    return name


def select_backend(name: str = "auto") -> Backend:
    """Bind this process to its device, by ``LOCAL_RANK``.

    Raises:
        UserError: see :func:`find_device`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = load_device(name, processes=local_rank + 1)
    if name == "cpu":
        return Backend(torch.device("cpu"))
    getattr(torch, name).set_device(local_rank)
    return _KINDS[name](torch.device(name, local_rank))


def _why_unusable(name: str) -> str | None:
    if name == "npu":
        return npu.why_unusable()
    if name == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds none; repair the driver, or install another build of torch"
    return None


def _detect() -> str:
    if has_torch_npu() and npu.why_unusable() is None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def communication_note(backend: Backend, requested: str) -> str | None:
    """A sentence for the log where ``--distributed-backend`` names another library than the device's own."""
    if requested == backend.communication:
        return None
    return (
        f"--distributed-backend {requested} means the device's own collective library; "
        f"on {backend.name} that is {backend.communication}"
    )


def start_processes(backend: Backend, *, timeout_minutes: int, host_tensors: bool = False) -> None:
    """Join torchrun's process group (a group of one where started without torchrun).

    Args:
        backend: of the device.
        timeout_minutes: how long a process waits for the others.
        host_tensors: whether tensors in the host's memory are exchanged too.
    """
    if dist.is_initialized():
        return
    mend_fsdp(backend.communication)
    _choose_interface()
    libraries = backend.communication
    if host_tensors and backend.is_accelerator:
        libraries = f"cpu:gloo,{backend.name}:{libraries}"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        store = group_store(timeout=timeout)
        place = {} if store is None else {
            "store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])
        }
        dist.init_process_group(libraries, timeout=timeout, **place)
    else:
        dist.init_process_group(libraries, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _choose_interface() -> None:
    """Lead gloo to the other hosts, unless the user did."""
    several_hosts = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if several_hosts and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(os.environ.get("MASTER_ADDR", "localhost"))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def stop_processes() -> None:
    """Leave the process group, if one was joined."""
    if not dist.is_initialized():
        return
    # torch 2.7 takes a group apart under Python's lock, and waits there for the threads of its library, which want the
    # lock to give up the tensors of their last exchange: neither would go on. The libraries themselves are taken apart
    # without the lock, so these references to them are the last to go.
    libraries = [
        group._get_backend(torch.device(device))
        for group in dist.distributed_c10d._world.pg_map for device in group._device_types
    ]
    dist.destroy_process_group()
    libraries.clear()
