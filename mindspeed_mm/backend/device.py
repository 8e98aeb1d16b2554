"""The device of this process and everything that differs between CPU, CUDA and NPU."""

from __future__ import annotations

import dataclasses
import datetime
import os
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm.backend.fsdp_on_cpu import mend_fsdp
from mindspeed_mm.backend.network import interface_towards
from mindspeed_mm.backend.profiling import NpuProfiler, Profiler, TorchProfiler
from mindspeed_mm.errors import UserError

_COMMUNICATION = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_DETERMINISTIC_VARIABLES = {
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"},
    "npu": {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"},
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """One process's device.

    Attributes:
        name: ``cpu``, ``cuda`` or ``npu``.
        device: the torch device of this process.
        communication: name of the collective library that serves ``device``.
    """

    name: str
    device: torch.device
    communication: str

    @property
    def _module(self) -> ModuleType | None:
        return None if self.name == "cpu" else getattr(torch, self.name)

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has memory and queues of its own."""
        return self._module is not None

    def synchronize(self) -> None:
        """Wait until the device has done all work queued so far."""
        if self._module is not None:
            self._module.synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest number of bytes allocated on the device so far; on a CPU the process's largest resident size."""
        if self._module is not None:
            return int(self._module.max_memory_allocated())
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the host's and the device's random generators, as uint8 tensors on the host."""
        state = {"cpu": torch.get_rng_state()}
        if self._module is not None:
            state[self.name] = self._module.get_rng_state().cpu()
        return state

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`rng_state` returned; a state of another kind of device is left alone."""
        torch.set_rng_state(state["cpu"])
        if self._module is not None and self.name in state:
            self._module.set_rng_state(state[self.name])

    def seed(self, seed: int) -> None:
        """Seed the host's and the device's generators."""
        torch.manual_seed(seed)
        if self._module is not None:
            self._module.manual_seed_all(seed)

    def use_deterministic_kernels(self) -> None:
        """Only kernels that give the same numbers every time; call it before the device or its collectives are used.

        An operation that has no such kernel raises when it is met. Reductions between processes keep their order on
        gloo; the other libraries are asked to by their variables, where the user has not set them.
        """
        for name, value in _DETERMINISTIC_VARIABLES.get(self.name, {}).items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a check of programs, not needed for the numbers

    def profiler(self) -> Profiler:
        """The device's profiler."""
        if self.name == "npu":
            return NpuProfiler()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.name == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return TorchProfiler(activities)

    def memory_history(self) -> Any | None:
        """The device's memory module (``_record_memory_history``, ``_dump_snapshot``), or None on a CPU."""
        return None if self._module is None else self._module.memory


def known_devices() -> tuple[str, ...]:
    """Names that ``--device`` takes besides ``auto``."""
    return tuple(_COMMUNICATION)


def select_backend(name: str = "auto") -> Backend:
    """Bind this process to its device, by ``LOCAL_RANK``.

    Raises:
        UserError: if ``name`` is unknown, or that device is not usable here.
    """
    if name != "auto" and name not in _COMMUNICATION:
        raise UserError(f"--device {name!r} is unknown; choose auto, {', '.join(_COMMUNICATION)}")
    if name == "auto":
        name = _detect()
    elif name != "cpu" and not _available(name):
        raise UserError(
            f"--device {name} was asked for, but torch {torch.__version__} finds no usable {name} device on this "
            "machine; use --device auto, or repair the driver and the installation (scripts/install.sh)"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu":
        return Backend(name=name, device=torch.device("cpu"), communication=_COMMUNICATION[name])
    module = getattr(torch, name)
    if local_rank >= module.device_count():
        raise UserError(
            f"torchrun started process {local_rank + 1} on this machine, which has {module.device_count()} {name} "
            "device(s); lower --nproc_per_node (NPUS_PER_NODE in the launcher)"
        )
    module.set_device(local_rank)
    return Backend(name=name, device=torch.device(name, local_rank), communication=_COMMUNICATION[name])


def _available(name: str) -> bool:
    if name == "npu" and not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401  registers torch.npu
        except (ImportError, OSError):
            return False
    return bool(getattr(torch, name).is_available())


def _detect() -> str:
    for name in ("npu", "cuda"):
        if _available(name):
            return name
    return "cpu"


def communication_note(backend: Backend, requested: str) -> str | None:
    """A sentence for the log where ``--distributed-backend`` names another library than the device's own."""
    if requested == backend.communication:
        return None
    return (
        f"--distributed-backend {requested} means the device's own collective library; "
        f"on {backend.name} that is {backend.communication}"
    )


def start_processes(backend: Backend, *, timeout_minutes: int) -> None:
    """Join torchrun's process group (a group of one where started without torchrun)."""
    if dist.is_initialized():
        return
    if backend.communication == "gloo":
        mend_fsdp()
        _choose_interface()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend.communication, timeout=timeout)
    else:
        dist.init_process_group(backend.communication, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _choose_interface() -> None:
    """Lead gloo to the other hosts, unless the user did."""
    several_hosts = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if several_hosts and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(os.environ.get("MASTER_ADDR", "localhost"))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def stop_processes() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
